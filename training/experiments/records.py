"""What a run recorded, in short: how it ended, its scores and its curves. Looking takes no more than reading JSON."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .scales import REPO, Run


BLIND_NAME = "blind_loss.json"


@dataclass(frozen=True)
class Record:
    """How a run ended.

    Attributes:
        arguments: of the run.
        diverged_at: the updates before it diverged; None if it did not.
        reason: of the divergence, as run_translation.py says it.
        loss: on the development set at the end, per target token; None if it diverged.
        blind_loss: what a model that sees neither source nor earlier words has there.
        bleu: on the test or, without one, the development set; None where nothing was translated.
        eval_loss: pairs of an update and the development loss there.
        train_loss: the same of the training loss, with smoothed labels.
    """

    arguments: dict[str, Any]
    diverged_at: int | None
    reason: str | None
    loss: float | None
    blind_loss: float
    bleu: float | None
    parameters: int | None
    eval_loss: list[list[float]]
    train_loss: list[list[float]]

    @property
    def failed(self) -> bool:
        """Whether the run diverged, or ends no better than blind."""
        return self.loss is None or not self.loss < self.blind_loss

    @property
    def final_loss(self) -> float:
        """Of the end, infinite if it diverged."""
        return math.inf if self.loss is None else self.loss


def state(run: Run) -> str:
    """How far a run is: "new", "begun", "finished" or "diverged".

    Raises:
        InputError: its folder holds a run of other arguments, or its arguments.json is damaged.
    """
    arguments = run.folder / "arguments.json"
    if not arguments.exists():
        return "new"
    there = _read(arguments)
    differing = [
        f"{name}: {there.get(name)!r} there, {value!r} now"
        for name, value in run.arguments.items()
        if there.get(name) != value
    ]
    if differing:
        raise InputError(
            f"{run.folder} holds a run of other arguments ({'; '.join(differing)}): remove it, or move it away."
        )
    # A session that trains removes both before it starts
    if (run.folder / "divergence.json").exists():
        return "diverged"
    return "finished" if (run.folder / "results.json").exists() else "begun"


def collect(run: Run) -> Record | None:
    """What a run recorded, or None where it is not done.

    Raises:
        InputError: its folder holds a run of other arguments, or its files are damaged.
    """
    if (how := state(run)) not in ("finished", "diverged"):
        return None
    try:
        return _record(run, how)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"The files in {run.folder} are damaged ({error!r}).") from error


def _record(run: Run, how: str) -> Record:
    folder = run.folder
    divergence = _read(folder / "divergence.json") if how == "diverged" else {}
    results = _read(folder / "results.json") if how == "finished" else {}
    history = _read(folder / "trainer_state.json")["log_history"]
    scores = results.get("scores", {})
    return Record(
        arguments=run.arguments,
        diverged_at=divergence.get("step"),
        reason=divergence.get("reason"),
        loss=scores["eval_loss"] if how == "finished" else None,
        blind_loss=_read(REPO / run.arguments["tokenizer_name"] / BLIND_NAME)["loss"],
        bleu=scores.get("test_bleu", scores.get("eval_bleu")),
        parameters=results.get("parameters"),
        eval_loss=_curve(history, "eval_loss"),
        train_loss=_curve(history, "loss"),
    )


def _curve(history: list[dict[str, Any]], name: str) -> list[list[float]]:
    return [[entry["step"], round(float(entry[name]), 4)] for entry in history if name in entry]


def _read(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the file is missing or holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged ({error}).") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object.")
    return value


def to_json(records: dict[str, Record]) -> str:
    """Records by the names of their runs, one a line."""
    lines = (f" {json.dumps(name)}: {json.dumps(asdict(record))}" for name, record in sorted(records.items()))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str) -> dict[str, Record]:
    """The inverse of `to_json`."""
    return {name: Record(**values) for name, values in json.loads(text).items()}

"""What a run recorded, in short: how it ended, its scores and its curves."""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from admin_hf.run.folder import ARGUMENTS_NAME, DIVERGENCE_NAME, RESULTS_NAME, STATE_NAME, complete_checkpoints

from ..errors import InputError
from .scales import REPO, PlannedRun


BLIND_NAME = "blind_loss.json"
SESSIONS_NAME = "sessions.jsonl"
# Which of a run's scores are kept where it has translated, by split and with their signatures
SCORES = ("loss", "bleu", "moses_bleu", "chrf", "ter")

# How a run ends: the detector of run_translation.py stopped it; it is not below the blind guess in training; it is in
# training, but not with dropout off; it is not, and the guess was not measured in training; or none of these
DIVERGED, STALLED, COLLAPSED, FAILED = "diverged", "stalled", "collapsed with dropout off", "failed"
TRAINED = "trained"
OUTCOMES = (TRAINED, STALLED, COLLAPSED, FAILED, DIVERGED)


@dataclass(frozen=True)
class Record:
    """How a run ended, or how far it is.

    Attributes:
        arguments: of the run.
        diverged_at: the updates before it diverged; None if it did not.
        reason: of the divergence, as run_translation.py says it.
        loss: on the development set at the end, per target token; None if it diverged.
        blind_loss: what a model that sees neither source nor earlier words has there.
        bleu: on the test or, without one, the development set; None where nothing was translated.
        eval_loss: pairs of an update and the development loss there.
        train_loss: the same of the training loss, with smoothed labels.
        train_nll: the same of the negative log-likelihood in training, with dropout on.
        scores: of the translations of the development and the test set, with signatures, by name.
        margin: how far below the blind loss a run must end, or it has failed.
        omega: the smallest and the largest ω at the start, where a profile set them.
        seconds: of the training, where one session did it all.
        begun: whether the run is still to go on, so that the curves end before it does.
        sessions: what computed it: commit, processor, threads and PyTorch, each combination once.
        blind_train_loss: what `blind_loss` is for the last of `train_loss`; only of runs that failed, where it could
            be measured.
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
    train_nll: list[list[float]] = field(default_factory=list)
    scores: dict[str, float | str] = field(default_factory=dict)
    margin: float = 0.0
    omega: list[float] = field(default_factory=list)
    seconds: float | None = None
    begun: bool = False
    sessions: list[dict[str, Any]] = field(default_factory=list)
    blind_train_loss: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the run diverged, or ends no better than blind."""
        return not self.distance < 0

    @property
    def outcome(self) -> str:
        """How the run ended: one of [`OUTCOMES`]."""
        if self.loss is None:
            return DIVERGED
        if not self.failed:
            return TRAINED
        if self.training_distance is None:
            return FAILED
        return COLLAPSED if self.training_distance < 0 else STALLED

    @property
    def distance(self) -> float:
        """How far the last development loss is above what it must be below, in nats; infinite if the run diverged."""
        return self.final_loss - self.blind_loss + self.margin

    @property
    def training_distance(self) -> float | None:
        """The same of the last training loss, with dropout on; None where the blind guess was not measured there."""
        if self.blind_train_loss is None or not self.train_loss:
            return None
        return self.train_loss[-1][1] - self.blind_train_loss + self.margin

    @property
    def final_loss(self) -> float:
        """Of the end, infinite if it diverged."""
        return math.inf if self.loss is None else self.loss


def state(run: PlannedRun) -> str:
    """How far a run is: "new", "begun", "trained" (and still to be scored), "finished" or "diverged".

    Raises:
        InputError: its folder holds a run of other arguments, or its arguments.json is damaged.
    """
    arguments = run.folder / ARGUMENTS_NAME
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
    if (run.folder / DIVERGENCE_NAME).exists():
        return "diverged"
    if not (results := run.folder / RESULTS_NAME).exists():
        return "begun"
    score = "test_bleu" if run.scoring.get("do_predict") else "eval_bleu"
    return "trained" if run.scoring and score not in _read(results).get("scores", {}) else "finished"


def collect(run: PlannedRun) -> Record | None:
    """What a run recorded, or None where it has saved nothing yet.

    Raises:
        InputError: its folder holds a run of other arguments, or its files are damaged.
    """
    if (how := state(run)) == "new":
        return None
    folder = run.folder
    if how == "begun":
        if not (checkpoints := complete_checkpoints(run.folder)):
            return None
        folder = checkpoints[-1]
    try:
        return _record(run, how, _read(folder / STATE_NAME)["log_history"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"The files in {run.folder} are damaged ({error!r}).") from error


def _record(run: PlannedRun, how: str, history: list[dict[str, Any]]) -> Record:
    folder = run.folder
    divergence = _read(folder / DIVERGENCE_NAME) if how == "diverged" else {}
    results = _read(folder / RESULTS_NAME) if how in ("trained", "finished") else {}
    scores = results.get("scores", {})
    blind = _read(REPO / run.arguments["tokenizer_name"] / BLIND_NAME)
    # Another experiment may have its folder in common, and translate with it
    translates = bool(run.scoring) or run.arguments.get("predict_with_generate", True)
    names = [f"{split}_{name}" for split in ("eval", "test") for name in SCORES]
    names += [f"{name}_signature" for name in names]
    return Record(
        arguments=run.arguments,
        diverged_at=divergence.get("step"),
        reason=divergence.get("reason"),
        loss=scores["eval_loss"] if how in ("trained", "finished") else None,
        blind_loss=blind["loss"],
        bleu=scores.get("test_bleu", scores.get("eval_bleu")) if translates else None,
        parameters=results.get("parameters"),
        eval_loss=_curve(history, "eval_loss"),
        train_loss=_curve(history, "loss"),
        train_nll=_curve(history, "nll"),
        scores={name: scores[name] for name in names if name in scores} if translates else {},
        margin=blind.get("margin", 0.0),
        omega=results.get("omega", []),
        seconds=results.get("seconds"),
        begun=how in ("begun", "trained"),
        sessions=_sessions(folder / SESSIONS_NAME),
    )


def _sessions(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in dict.fromkeys(lines)]


def known(runs: Iterable[PlannedRun], before: dict[str, Record]) -> dict[str, Record]:
    """What is recorded of runs: in their folders, or else before, with the same arguments.

    Where either says how a run ended, that is taken before what says how far it is.
    """
    records = {}
    for run in runs:
        try:
            here = collect(run)
        except InputError as error:
            print(f"Left out: {error}", file=sys.stderr)
            here = None
        there = [record for record in (here, before.get(run.name)) if record and record.arguments == run.arguments]
        if there:
            records[run.name] = min(there, key=lambda record: record.begun)
    return records


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


def kept(*names: str) -> dict[str, Record]:
    """The records of experiments that docs/experiments/ holds; of several, since they share runs."""
    paths = [REPO / "docs" / "experiments" / f"{name}.json" for name in names]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    return {run: record for text in texts for run, record in from_json(text).items()}

"""The folder of a training run: the names of its files, its checkpoints, and a reader that trusts no file."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..checkpoints import has_weights, says_profiled
from ..profiling import ResidualProfile


# What Trainer writes: of the whole training, and of the sessions by split
STATE_NAME, TRAIN_RESULTS_NAME, ALL_RESULTS_NAME = "trainer_state.json", "train_results.json", "all_results.json"
# What run_translation.py adds, and the folder of its vanilla model
ARGUMENTS_NAME, DATA_NAME = "arguments.json", "data.json"
RESULTS_NAME, DECODES_NAME = "results.json", "decodes.jsonl"
PREDICTIONS_NAME, DIVERGENCE_NAME = "generated_predictions.txt", "divergence.json"
VANILLA_NAME = "vanilla"
# What profiling writes
PROFILE_NAME = "residual_profile.json"

# The names of scores, `eval_bleu` and so on, and the usual names of their parts
SPLITS = {"eval": "validation", "test": "test"}
METRICS = {
    "bleu": "BLEU",
    "moses_bleu": "BLEU of Moses' tokens",
    "chrf": "chrF2",
    "ter": "TER",
    "loss": "loss in nats per token",
}


@dataclass(frozen=True)
class Run:
    """The output folder of a Trainer: a run that is still training, has finished or has diverged.

    If the file of a property is missing, half-written or damaged, the property is empty; it does not raise.

    Args:
        folder: output folder of run_translation.py, or of any Trainer.
    """

    folder: Path

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object in the run's folder."""
        return read_object(self.folder / name)

    def lacks(self, name: str) -> str:
        """Why `read(name)` is empty, as a sentence."""
        if (self.folder / name).exists():
            return f"{name} is damaged, or empty."
        return f"The run has no {name}."

    # --- what was asked ---

    @cached_property
    def arguments(self) -> dict[str, Any]:
        return self.read(ARGUMENTS_NAME)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_object((self.weights or self.folder) / CONFIG_NAME)

    # --- how far it is ---

    # These are looked up each time: a run that is still training deletes checkpoints while the page is made

    @property
    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, the newest last."""
        return complete_checkpoints(self.folder)

    @property
    def weights(self) -> Path | None:
        """The folder of the newest weights: the run's folder once its model is saved, else the newest checkpoint."""
        return next(filter(has_weights, reversed(self._saved)), None)

    @property
    def _saved(self) -> list[Path]:
        """What may hold weights and a state, the newest last."""
        return sorted((*self.checkpoints, self.folder), key=lambda folder: saved_step(folder) or 0)

    @cached_property
    def state(self) -> dict[str, Any]:
        """The newest trainer_state.json: `global_step`, `max_steps`, `log_history`, …"""
        return read_object(self._saved[-1] / STATE_NAME)

    @property
    def step(self) -> int:
        """The number of updates when the newest state was written."""
        return _integer(self.state.get("global_step")) or 0

    @property
    def max_steps(self) -> int:
        return _integer(self.state.get("max_steps")) or 0

    @property
    def finished(self) -> bool:
        return 0 < self.max_steps <= self.step or "train_runtime" in self.read(TRAIN_RESULTS_NAME)

    # --- what was measured ---

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The entries of the log, each with its update as `step`."""
        history = self.state.get("log_history")
        entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
        return [entry for entry in entries if is_number(entry.get("step"))]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Updates and values of a logged quantity, where it is a finite number."""
        return curve(self.log, name)

    @cached_property
    def results(self) -> dict[str, Any]:
        """The scored weights, the number of parameters, and the scores."""
        return self.read(RESULTS_NAME)

    @property
    def scored(self) -> list[str]:
        """The names of the folders with the scored weights: those of the checkpoints, if it was their mean."""
        weights = self.results.get("weights")
        return [Path(str(folder)).name for folder in weights] if isinstance(weights, list) else []

    @cached_property
    def scores(self) -> dict[str, Any]:
        """The final scores and their signatures: `eval_…` for validation and `test_…` for test sentences."""
        scores = self.results.get("scores")
        return self.read(ALL_RESULTS_NAME) | (scores if isinstance(scores, dict) else {})

    @cached_property
    def profile(self) -> ResidualProfile | None:
        try:
            return ResidualProfile.load(self.folder / PROFILE_NAME)
        except (OSError, ValueError):
            return None

    @cached_property
    def is_profiled(self) -> bool | None:
        """Whether the newest weights say that the model was profiled; None where they do not say."""
        try:
            return says_profiled(self.weights) if self.weights is not None else None
        except (OSError, ValueError, SafetensorError):
            return None

    @cached_property
    def divergence(self) -> dict[str, Any]:
        return self.read(DIVERGENCE_NAME)


def predictions_name(language: str = "") -> str:
    """The file of a run's translations; of several target languages, each has its own."""
    return str(Path(PREDICTIONS_NAME).with_suffix(f".{language}.txt")) if language else PREDICTIONS_NAME


# --- its checkpoints ------------------------------------------------------------------------------


def last_checkpoints(run: str | os.PathLike, last: int) -> list[Path]:
    """Find the newest complete checkpoints of a run.

    Args:
        run: the output folder of a Trainer, which contains the folders `checkpoint-500`, `checkpoint-1000`, …
        last: the number of checkpoints.

    Returns:
        Their folders, the newest last.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: it has fewer complete checkpoints, or `last` is below 1.
    """
    if last < 1:
        raise ValueError(f"The number of checkpoints to average is {last}; it must be at least 1.")
    if not Path(run).is_dir():
        raise NotADirectoryError(f"There is no folder {run}.")
    complete = complete_checkpoints(run)
    if not complete:
        raise ValueError(
            f"{run} has no complete checkpoint: expected a run's folder, with checkpoints such as checkpoint-500."
        )
    if len(complete) < last:
        raise ValueError(
            f"{run} has {len(complete)} complete checkpoints, fewer than {last}: take the last {len(complete)}, or "
            "keep more of them in training (save_total_limit)."
        )
    return complete[-last:]


def complete_checkpoints(run: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run that were written to the end, in the order of their steps.

    Trainer writes trainer_state.json last. If it is missing or cut, the process was killed before.
    """
    return [folder for folder in saved_checkpoints(run) if _is_complete(folder)]


def saved_checkpoints(run: str | os.PathLike) -> list[Path]:
    """All folders `checkpoint-N` of a run, complete or not, in the order of their steps."""
    found = [path for path in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_checkpoint_name(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def is_checkpoint_name(name: str) -> bool:
    """Whether this is Trainer's form of a checkpoint's name."""
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name) is not None


def saved_step(folder: Path) -> int | None:
    """The number of updates of a saved model, from the checkpoint's name or the folder's state; None if unknown."""
    if is_checkpoint_name(folder.name):
        return int(folder.name.rpartition("-")[2])
    return _integer(read_object(folder / STATE_NAME).get("global_step"))


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


# --- somebody's files -----------------------------------------------------------------------------


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing, half-written, damaged or endless."""
    try:
        value = json.loads(regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def curve(log: Iterable[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Updates and values of a quantity in the entries of a log, where it is a finite number."""
    points = [(entry["step"], entry[name]) for entry in log if is_number(entry.get(name))]
    return [step for step, _ in points], [value for _, value in points]


def regular_file(path: Path) -> Path:
    """The path of a regular file, which has an end, unlike /dev/zero and pipes.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return path


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number that can be drawn: finite, and not an integer of 400 digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None

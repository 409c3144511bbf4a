"""Exact resume: a run that is killed at any moment continues from its last complete checkpoint as if never stopped."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Sampler
from transformers import Seq2SeqTrainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from admin_hf.run import complete_checkpoints, saved_checkpoints

from .errors import InputError


def remove_incomplete_checkpoints(run: Path) -> None:
    """Remove what a killed run was writing or deleting."""
    for path in set(saved_checkpoints(run)) - set(complete_checkpoints(run)):
        remove_checkpoint(path)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; what a kill leaves of it is incomplete."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate_checkpoints(run: Path, limit: int | None, best: str) -> None:
    """Keep the last `limit` checkpoints, and the one named `best`.

    It sorts them by their numbers. Trainer's own function uses the folders' times, which change when a run is copied
    or a deletion is killed.
    """
    if limit is None:
        return
    for path in saved_checkpoints(run)[:-limit]:
        if path.name != best:
            remove_checkpoint(path)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn the errors of any library about a full disk into one sentence.

    Raises:
        InputError: what cannot be written, and why.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason, cause = str(error), error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch.save, which does not say why
            raise
        reason, cause = "no space is left, or files may not grow so large", error
    else:
        return
    raise InputError(
        f"{what} cannot be written: {reason}. Older checkpoints are intact: free space and repeat the command."
    ) from cause


# Differences to Seq2SeqTrainer:
# - the order of the data follows from seed and epoch alone, and evaluation leaves the random stream as it is
# - a checkpoint is complete when it has trainer_state.json: not before all processes have written their files, and no
#   longer when it is overwritten or deleted
# - a checkpoint that cannot be written is removed, with one clear sentence
class ResumableTrainer(Seq2SeqTrainer):
    """A [`~transformers.Seq2SeqTrainer`] whose resumed runs end bit for bit as uninterrupted ones."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._unscheduled: str | None = None  # the checkpoint of a stop that this session went on from
        self.add_callback(WholeCheckpoints)  # after all others, which request checkpoints

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # every data loader draws a seed
            return super().evaluate(*args, **kwargs)

    def _run_epoch(self, *, epoch: int, train_dataloader: DataLoader, **kwargs: Any) -> None:
        # Trainer's own set_epoch does not reach through all wrappers of a loader that skips batches
        sampler: Any = train_dataloader.batch_sampler
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return SeededLengthGroupedSampler(sampler.batch_size, sampler.lengths[:], seed)
        return sampler

    def _load_callback_state(self) -> None:
        # Into the callbacks that are there: Trainer would put new ones in their place, and only on demand
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                # A checkpoint from before the callback was there has no state of it, which Trainer could not save then
                state = self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
                vars(callback).update(state["attributes"])
        self._unscheduled = None if self._is_scheduled() else f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _is_scheduled(self) -> bool:
        """Whether a checkpoint of now is one that an uninterrupted run saves too."""
        if self.args.save_strategy == SaveStrategy.EPOCH:
            return float(self.state.epoch or 0).is_integer()
        return self.args.save_strategy != SaveStrategy.STEPS or self.state.global_step % self.state.save_steps == 0

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        checkpoint = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            with writing(f"The checkpoint {checkpoint}"), self._without_rotation():
                super()._save_checkpoint(model, trial)
        except InputError:
            if self.args.should_save:
                remove_checkpoint(checkpoint)
            raise
        if self.args.should_save:
            best = Path(self.state.best_model_checkpoint or "").name
            if self._unscheduled not in (None, best):
                remove_checkpoint(run / self._unscheduled)  # averaging would take it for one of its own
            rotate_checkpoints(run, self.args.save_total_limit, best)
        self._unscheduled = None

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the first process writes trainer_state.json next

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_rotation():  # without its last checkpoint, a finished run is none
            return super()._finalize_training(*args, **kwargs)

    @contextmanager
    def _without_rotation(self) -> Iterator[None]:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Draws the order of an epoch from seed and epoch, instead of the random stream that dropout moves."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class WholeCheckpoints(TrainerCallback):
    """Completes a checkpoint with the rest of its update: the loss logged so far and the evaluation of its epoch."""

    def __init__(self) -> None:
        self._waiting = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainer saves before the end of the epoch, but resumes after it
        self._waiting = control.should_save and float(state.epoch or 0).is_integer()
        control.should_save &= not self._waiting
        control.should_log |= control.should_save  # or the loss since the last log is lost

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save |= self._waiting
        control.should_log |= control.should_save
        self._waiting = False

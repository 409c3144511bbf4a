"""Stopping by a signal: with a checkpoint, and on all processes after the same update."""

import atexit
import logging
import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)


def outlive_signals(worker: int, then: Callable[[int], None] | None = None) -> None:
    """Keep a worker of a DataLoader alive when a signal goes to the whole group of processes, as torchrun sends it.

    Training needs the worker until the current update is finished, and then ends it. Use it as `worker_init_fn`.

    Args:
        then: another function to call with the worker's number.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


@atexit.register
def _end_workers() -> None:
    """Python ends those that are left by SIGTERM, and would wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint when a process receives a signal to stop (Ctrl-C or SIGTERM).

    The current update (and evaluation) is finished, then a checkpoint is saved. A second signal stops at once.

    Attributes:
        received: the signal that this or another process received, if any.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._own = 0  # the signal that this process received
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def _receive(self, number: int, frame: Any) -> None:
        if self._own:
            raise KeyboardInterrupt
        self._own = number
        name = signal.Signals(number).name
        logger.warning(f"{name} received: saving a checkpoint after the current update or evaluation.")

    def _agree(self, args: TrainingArguments) -> None:
        """Let all processes know what one has received: it comes at different moments, but saving needs all."""
        number = self._own
        if args.world_size > 1:  # else a GPU would be asked, and waited for, in every update
            agreed = torch.tensor(number, device=args.device)
            distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
            number = int(agreed)
        self.received = signal.Signals(number) if number else None

    def _stop(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._agree(args)
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    # Also in the middle of an evaluation, which comes before the save of the same update
    on_step_end = on_prediction_step = on_evaluate = _stop

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainer says so when training stops, in the middle of an epoch too
        if self.received is not None and state.epoch != int(state.epoch or 0):
            control.should_save = control.should_evaluate = control.should_log = False

    def on_train_end(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        self._agree(args)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

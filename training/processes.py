"""The logging of a process, and the end of a process group."""

import logging
import time

import datasets
import transformers
from accelerate import PartialState
from torch import distributed


def set_up_logging(process_index: int) -> None:
    """Log to standard error, in full on the first process and only warnings on the others."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("training").setLevel(logging.INFO if process_index == 0 else logging.WARNING)
    datasets.logging.set_verbosity(datasets.logging.WARNING)
    transformers.logging.set_verbosity(transformers.logging.WARNING)


def end_process_group() -> None:
    """Leave the process group once its threads hold no tensors; does nothing if there is only one process.

    Call it when all processes are done. A thread of Gloo needs Python's lock to release the tensors of the last
    collective, and aborts a process that ends before (https://github.com/pytorch/pytorch/issues/190489).
    """
    if distributed.is_initialized():
        # Without the lock. To collect the group as garbage waits for its threads too, but with the lock: for ever
        time.sleep(1)
        PartialState().destroy_process_group()

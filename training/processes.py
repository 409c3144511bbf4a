"""The end of a process among several."""

import gc

from accelerate import PartialState


def end_process_group() -> None:
    """Leave the process group and wait for its threads; does nothing where there is one process.

    To be called when all processes are done and nothing holds the trainer. A thread of Gloo that releases a tensor
    while Python ends aborts the process (https://github.com/pytorch/pytorch/issues/190489).
    """
    PartialState().destroy_process_group()
    gc.collect()  # a trainer is in reference cycles, and its model holds the group

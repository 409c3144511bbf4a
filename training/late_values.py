"""Reads numbers of a GPU without waiting for it: each is copied at once, and read later, when it has arrived."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor


About = TypeVar("About")


class LateValues(Generic[About]):
    """A queue of numbers, each with its label.

    To read a number of a GPU, a program must wait until the GPU has done all its earlier work. So the GPU makes a copy
    when it gets there, and the program reads it later. On a CPU every number is available at once.

    Example:

    ```python
    >>> losses = LateValues()
    >>> losses.push("first update", torch.tensor([4.0]))
    >>> losses.push("second update", torch.tensor([3.5]))
    >>> list(losses.arrived(held_back=1))
    [('first update', [4.0])]
    >>> list(losses.arrived())
    [('second update', [3.5])]

    ```
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[About, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, about: About, values: Tensor) -> None:
        """Start to copy `values`, `(n,)` of any dtype on any device, with their values at this point of its work."""
        # Without waiting into pinned memory; other devices than CUDA's have no event to say when it has arrived
        copy = values.to("cpu", copy=True, non_blocking=values.is_cuda)
        event = None
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(values.device))
        self._pending.append((about, copy, event))

    def arrived(self, held_back: int = 0) -> Iterator[tuple[About, list[float]]]:
        """Take all values except the last `held_back`, in order, and wait for those that have not arrived yet.

        Their number never depends on the speed of the device. So processes that push the same number take the same.
        """
        while len(self._pending) > held_back:
            about, copy, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield about, copy.tolist()

    def clear(self) -> None:
        """Forget all values."""
        self._pending.clear()

"""Numbers of a GPU without waiting for it: each is copied at once, and read when it has long arrived."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor


About = TypeVar("About")


class LateValues(Generic[About]):
    """Numbers that come out in the order in which they went in, each with what it is about.

    To read a number of a GPU is to wait until the GPU has done all that it was told before. So a copy is made when the
    GPU gets there, and waited for later. On a CPU every number is there at once.

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
        """Start to copy `values`, `(n,)` of any dtype on any device, as they are at this point of its work."""
        # Without waiting into pinned memory; other devices than CUDA's have no event to say when it has arrived
        copy = values.to("cpu", copy=True, non_blocking=values.is_cuda)
        event = None
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(values.device))
        self._pending.append((about, copy, event))

    def arrived(self, held_back: int = 0) -> Iterator[tuple[About, list[float]]]:
        """Take all values but the last `held_back`, in order, waiting for those that are still under way.

        How many there are never depends on how fast the device is, so processes that push alike take alike.
        """
        while len(self._pending) > held_back:
            about, copy, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield about, copy.tolist()

    def clear(self) -> None:
        """Forget all values."""
        self._pending.clear()

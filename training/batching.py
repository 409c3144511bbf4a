"""Batches of a number of tokens: sentences of similar length together, so that little of a batch is padding.

And how they are padded.
"""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import DataCollatorForSeq2Seq


class TokenBatchSampler(Sampler[list[int]]):
    """Yields batches of pairs, each at most `max_tokens` large: number of pairs × longest side, as fairseq counts.

    Pairs are sorted by length, those of one length in random order, and cut into batches, which then come in random
    order. Both are drawn anew for every epoch from `seed` and the epoch's number alone, so all processes agree, and a
    resumed run finds its place. Where batches are cut depends on the lengths alone, so all epochs have as many.

    Args:
        lengths: tokens of the longer side of each pair as it will be padded, at least 1: see [`round_up`].
        max_tokens: the largest batch; no length may exceed it.
        seed: what the random order follows from.
        multiple_of: the number of batches is made a multiple of it, by halving the largest, so that every update has
            all its batches: the number of processes times the accumulated batches.

    Raises:
        ValueError: there are no pairs, or one is longer than `max_tokens`.

    Example:

    ```python
    >>> sampler = TokenBatchSampler([3, 5, 3, 2, 5], max_tokens=10, seed=1)
    >>> len(sampler), sorted(sorted(batch) for batch in sampler)
    (2, [[0, 2, 3], [1, 4]])

    ```
    """

    def __init__(self, lengths: np.ndarray | list[int], max_tokens: int, seed: int, multiple_of: int = 1) -> None:
        self.lengths = np.asarray(lengths)
        if not len(self.lengths):
            raise ValueError("There are no pairs to make batches of.")
        if (longest := int(self.lengths.max())) > max_tokens:
            raise ValueError(f"A pair has {longest} tokens, which max_tokens={max_tokens} cannot hold.")
        self.seed = seed
        self.epoch = 0
        self.starts = _split_largest(_batch_starts(np.sort(self.lengths), max_tokens), len(self.lengths), multiple_of)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        order = order[np.argsort(self.lengths[order], kind="stable")]
        batches = np.split(order, self.starts[1:])
        for i in rng.permutation(len(batches)):
            yield batches[i].tolist()


def _batch_starts(lengths: np.ndarray, max_tokens: int) -> list[int]:
    """Where batches begin if ascending `lengths` are cut as late as `max_tokens` allows."""
    starts, start = [], 0
    while start < len(lengths):
        starts.append(start)
        rows = range(1, min(max_tokens // int(lengths[start]), len(lengths) - start) + 1)
        # The last of n rows is the longest, so tokens grow with n
        start += bisect_right(rows, max_tokens, key=lambda n: n * int(lengths[start + n - 1]))
    return starts


def _split_largest(starts: list[int], end: int, multiple_of: int) -> list[int]:
    """Halve the batches with most pairs until their number is a multiple of `multiple_of`."""
    for _ in range(-len(starts) % multiple_of):
        sizes = np.diff([*starts, end])
        largest = int(sizes.argmax())
        if sizes[largest] < 2:
            break
        starts.insert(largest + 1, starts[largest] + int(sizes[largest]) // 2)
    return starts


# --- padding --------------------------------------------------------------------------------------


def round_up(lengths: Any, multiple: int) -> Any:
    """The next multiples of `multiple`, for an integer or an array of them."""
    return -(-lengths // multiple) * multiple


class TranslationCollator(DataCollatorForSeq2Seq):
    """Pads sources with the padding token and labels with −100; source text alone has no labels, not `labels=None`."""

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        return {name: value for name, value in super().__call__(features, return_tensors).items() if value is not None}

"""Batches with a limited number of tokens: sentences of similar length together, so that there is little padding.

They are padded to the longest sentence of a batch, or to one of few shapes, which a GPU can record and replay.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.marian.modeling_marian import shift_tokens_right


MULTIPLE = 4  # of the lengths of buckets


class TokenBatchSampler(Sampler[list[int]]):
    """Yields batches of pairs, each at most `max_tokens` large: number of pairs × longest side, as fairseq counts.

    Pairs are sorted by length, those of one length in random order, and cut into batches, which then come in random
    order. Both are drawn again for every epoch, from `seed` and the epoch's number only. So all processes agree, and a
    resumed run finds its place. The cuts depend only on the lengths, so all epochs have the same number of batches.

    Args:
        lengths: tokens of the longer side of each pair as it will be padded, at least 1: see [`round_up`] and
            [`Buckets.round_up`].
        max_tokens: the largest batch; no length may exceed it.
        seed: seed of the random order.
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


def longest_side(max_tokens: int, multiple: int, rows: int) -> int:
    """The longest side, padded to a multiple, that a batch with this number of rows may have within `max_tokens`."""
    return max_tokens // rows // multiple * multiple


class Buckets:
    """The few shapes that batches may have: both sides padded to a bucket's length, with as many rows as it has.

    Up to 8 times `multiple` every multiple is a bucket; from there each is about an eighth longer than the one before.
    So there is little padding, and there are few buckets: with multiples of 4, 20 up to 128 tokens and 38 up to 1,024.

    Args:
        longest: tokens of the longest side of all pairs.
        multiple: all lengths are multiples of this.
        max_tokens: rows × length of a bucket is at most this.
        rows: the rows of every bucket, instead of `max_tokens`.

    Attributes:
        lengths: the buckets' lengths, ascending, int64; the last is the first multiple that fits `longest`.

    Raises:
        ValueError: not exactly one of `max_tokens` and `rows` is given, `max_tokens` is below the last length, or a
            number is below 1.

    Example:

    ```python
    >>> buckets = Buckets(longest=50, max_tokens=400)
    >>> buckets.lengths.tolist()
    [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52]
    >>> [(buckets.rows(length), length) for length in buckets.round_up(np.array([3, 33, 50])).tolist()]
    [(100, 4), (11, 36), (7, 52)]

    ```
    """

    def __init__(
        self, longest: int, multiple: int = MULTIPLE, max_tokens: int | None = None, rows: int | None = None
    ) -> None:
        if (max_tokens is None) == (rows is None):
            raise ValueError("Buckets need either max_tokens or rows.")
        if min(longest, multiple, 1 if rows is None else rows) < 1:
            raise ValueError(f"{longest=}, {multiple=} and {rows=} must be at least 1.")
        lengths, last = [multiple], round_up(longest, multiple)
        if max_tokens is not None and last > max_tokens:
            raise ValueError(f"A pair has {last} tokens as padded, which max_tokens={max_tokens} cannot hold.")
        while lengths[-1] < last:
            step = max(1, round(lengths[-1] / 8 / multiple)) * multiple
            lengths.append(min(lengths[-1] + step, last))
        self.lengths = np.array(lengths)
        self._max_tokens, self._rows = max_tokens, rows

    def round_up(self, lengths: Any) -> Any:
        """The length of the shortest bucket that fits each of `lengths`, an integer or an array of any shape.

        Raises:
            ValueError: one is longer than the last bucket.
        """
        if (longest := np.max(lengths, initial=0)) > self.lengths[-1]:
            raise ValueError(f"A pair has {longest} tokens, but the last bucket holds {self.lengths[-1]}.")
        return self.lengths[np.searchsorted(self.lengths, lengths)]

    def rows(self, length: int) -> int:
        """The rows of the bucket of this length."""
        return self._rows if self._max_tokens is None else self._max_tokens // int(length)

    def longest(self, rows: int) -> int:
        """The length of the longest bucket with at least this number of rows."""
        return max(length for length in self.lengths.tolist() if self.rows(length) >= rows)


class TranslationCollator(DataCollatorForSeq2Seq):
    """Pads sources with the padding token and labels with −100; source text alone has no labels, not `labels=None`.

    It pads on the right, whatever the tokenizer says: positions count from the left.

    Args:
        tokenizer: pads the sentences.
        model: gives the decoder's start token. The collator keeps only numbers, so that it can be sent to workers.
        pad_to_multiple_of: lengths become multiples of this.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, pad_to_multiple_of: int | None = None
    ) -> None:
        super().__init__(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
        self.tokenizer.padding_side = "right"
        self.decoder_ids = model.config.pad_token_id, model.config.decoder_start_token_id

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        """Pad `features`, each with `input_ids` and maybe `labels`; other columns are dropped."""
        features = [{name: row[name] for name in ("input_ids", "labels") if name in row} for row in features]
        batch = super().__call__(features, return_tensors)
        batch = {name: value for name, value in batch.items() if value is not None}
        if "labels" in batch:
            batch["decoder_input_ids"] = shift_tokens_right(batch["labels"], *self.decoder_ids)
        return batch


class BucketCollator:
    """Pads training pairs to the shape of the bucket that their longest side falls into, on the right.

    Missing rows are filled up. Their source is one end-of-sentence token, because attention over nothing but padding
    would divide by zero. They have no targets, so losses and gradients are those of the pairs only.

    Args:
        tokenizer: gives the padding and the end-of-sentence token.
        model: gives the decoder's start token. The collator keeps only numbers, so that it is cheap to send to
            workers.
        buckets: the shapes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, buckets: Buckets) -> None:
        self.buckets = buckets
        self.pad_token_id, self.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.decoder_ids = model.config.pad_token_id, model.config.decoder_start_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad `features`, each with the ids `input_ids` and `labels`; other columns are dropped.

        Returns:
            `input_ids`, `attention_mask`, `labels` and `decoder_input_ids`, int64, all `(rows, length)` of the bucket.

        Raises:
            ValueError: there are more pairs than rows, or one is longer than the last bucket.
        """
        sources, targets = ([feature[name] for feature in features] for name in ("input_ids", "labels"))
        length = self.buckets.round_up(max(map(len, chain(sources, targets))))
        missing = self.buckets.rows(length) - len(features)
        if missing < 0:
            raise ValueError(
                f"{len(features)} pairs of up to {length} tokens are too many for a bucket of "
                f"{self.buckets.rows(length)} rows."
            )
        input_ids, attention_mask = _padded([*sources, *[[self.eos_token_id]] * missing], length, self.pad_token_id)
        labels, _ = _padded([*targets, *[[]] * missing], length, -100)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "decoder_input_ids": shift_tokens_right(labels, *self.decoder_ids),
        }


def _padded(rows: list[Sequence[int]], length: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` padded on the right, and 1 where there is no padding: both int64, `(len(rows), length)`."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    is_token = np.arange(length) < lengths[:, None]
    ids = np.full(is_token.shape, padding)
    ids[is_token] = np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum())
    return torch.from_numpy(ids), torch.from_numpy(is_token.astype(np.int64))

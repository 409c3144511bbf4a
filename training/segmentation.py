"""BPE-dropout: other subwords of the training text in every epoch, drawn from seed, epoch and line only."""

import json
import random
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import models
from transformers import PreTrainedTokenizerBase

from .errors import InputError


# What a pair is drawn from: ids, and how many of them each word has, of both sides
SIDES = {"input_ids": "source_words", "labels": "target_words"}
_SAMPLE = 1000  # pairs by which growth is estimated


def check_bpe(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an InputError unless the tokenizer is a BPE of the package tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(getattr(backend, "model", None), models.BPE):
        kind = type(tokenizer if backend is None else backend.model).__name__
        raise InputError(
            f"--bpe_dropout needs a BPE tokenizer of the package tokenizers, and this is a {kind}: leave it out, or "
            "train a new tokenizer (without --tokenizer_name)."
        )


class BpeDropout:
    """Segments tokenised pairs again: a BPE that skips every merge, at every step, with a probability.

    This is Algorithm 1 of Provilkov et al. (2020). The package tokenizers has it, but its generator cannot be seeded,
    so no run could be resumed exactly. Here it works on ids: word by word, tokens are split into the symbols that they
    were merged from, and merged again.

    Args:
        tokenizer: a BPE, see [`check_bpe`]. It is read, not changed.
        dropout: the probability, from 0 (which gives the tokenizer's own ids) to 1 (single symbols).
        seed: seed of all draws, together with the epoch and the pair's `index`.
        limits: the longest source and target, in tokens.

    Raises:
        InputError: the tokenizer is not a BPE.

    Example:

    ```python
    >>> from training.tokenization import train_tokenizer
    >>> tokenizer = train_tokenizer([["a bab"] * 9], 9)
    >>> BpeDropout(tokenizer, 1.0).segment(tokenizer("bab")["input_ids"][:-1], random.Random(0).random, 1.0)
    [5, 4, 3, 4]

    ```
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, dropout: float, seed: int = 0, limits: tuple[int, int] = (1024, 1024)
    ) -> None:
        check_bpe(tokenizer)
        self.dropout, self.seed, self.limits = dropout, seed, limits
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        ids, prefix = model["vocab"], model["continuing_subword_prefix"] or ""
        self._merges: dict[tuple[int, int], tuple[int, int]] = {}  # rank and result, by what is merged
        parts: dict[int, tuple[int, int]] = {}
        for rank, (left, right) in enumerate(model["merges"]):
            pair, merged = (ids[left], ids[right]), ids[left + right.removeprefix(prefix)]
            self._merges[pair] = rank, merged
            parts.setdefault(merged, pair)
        self._symbols = {token: _take_apart(token, parts) for token in parts}

    def segment(self, word: Sequence[int], draw: Callable[[], float], dropout: float) -> list[int]:
        """The ids of a word, drawn again; `draw` gives numbers from 0 to 1."""
        ids = [symbol for token in word for symbol in self._symbols.get(token, (token,))]
        while True:
            best, place = None, 0
            for i, pair in enumerate(pairwise(ids)):
                merge = self._merges.get(pair)
                # Where a better one is kept, it makes no difference whether this one is
                if merge is not None and (best is None or merge < best) and draw() >= dropout:
                    best, place = merge, i
            if best is None:
                return ids
            ids[place : place + 2] = [best[1]]

    def pair(self, row: dict[str, Any], epoch: int, longest: int | None = None) -> dict[str, list[int]]:
        """A training pair in the words of an epoch: `input_ids` and `labels`.

        One that is longer than its limit is drawn again with half the dropout, and in the end left as it is stored.

        Args:
            row: of the training data, with the columns that `--bpe_dropout` adds.
            epoch: from 0.
            longest: of either side, if less than the limits.
        """
        draw = random.Random(f"{self.seed} {epoch} {row['index']}").random
        drawn = {}
        for (side, words), limit in zip(SIDES.items(), self.limits, strict=True):
            limit = limit if longest is None else min(limit, longest)
            drawn[side] = row[side]
            for dropout in (self.dropout, self.dropout / 2, self.dropout / 4):
                tokens = iter(row[side])
                ids = [i for n in row[words] for i in self.segment([*islice(tokens, n)], draw, dropout)]
                if len(ids) <= limit:
                    drawn[side] = ids
                    break
        return drawn

    def lengths(self, dataset: Dataset) -> np.ndarray:
        """The expected greatest length of each pair's longer side: the mean plus a standard deviation.

        Mean and variance are proportional to the stored length, which is known before any epoch. So all epochs have
        the same batches. The factors are estimated from a sample of pairs.

        Returns:
            int64, `(pairs,)`; never less than `length`, nor more than the limits.
        """
        stored = dataset.with_format("numpy")["length"][:]
        rows = np.unique(np.linspace(0, len(stored) - 1, _SAMPLE, dtype=np.int64))
        drawn = np.array([max(map(len, self.pair(dataset[int(row)], 0).values())) for row in rows])
        growth = drawn.sum() / stored[rows].sum()
        deviation = np.std((drawn - growth * stored[rows]) / np.sqrt(stored[rows]))
        lengths = np.ceil(growth * stored + deviation * np.sqrt(stored)).astype(np.int64)
        return np.clip(lengths, stored, max(self.limits))


def _take_apart(token: int, parts: dict[int, tuple[int, int]]) -> list[int]:
    return [symbol for part in parts[token] for symbol in _take_apart(part, parts)] if token in parts else [token]


class DropoutCollator:
    """Draws the segmentation of training pairs, and pads them.

    Args:
        segmentation: draws the segmentation.
        collate: pads the batch.
        longest: the longest side in a batch with this number of pairs; default: no limit.
    """

    def __init__(
        self,
        segmentation: BpeDropout,
        collate: Callable[[list[dict[str, Any]]], Any],
        longest: Callable[[int], int] | None = None,
    ) -> None:
        self.segmentation, self.collate, self.longest = segmentation, collate, longest
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may live longer than an epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose segmentation the next batches have, here and in workers."""
        self._epoch.fill_(epoch)

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Draw and pad `features`, each with `index`, `input_ids`, `labels` and their words."""
        longest = self.longest(len(features)) if self.longest is not None else None
        return self.collate([self.segmentation.pair(row, int(self._epoch), longest) for row in features])

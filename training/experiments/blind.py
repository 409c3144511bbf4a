"""The blind guess: what a model that sees neither the source nor the words before its target can know."""

from collections.abc import Sequence
from itertools import chain

import numpy as np


PSEUDO_COUNTS = 100  # of how often a token occurs anywhere, beside the counts of its position


class BlindGuess:
    """How often tokens stand at each position of a sentence in training data.

    That is smoothed by how often they occur at all (and that by one occurrence of every token). A model that learns
    neither from the source nor from the words before can do no better, and a stack in which nothing arrives from below
    does no better.

    Args:
        sentences: the target tokens' ids of training data.
        vocab_size: how many tokens there are.

    Example:

    ```python
    >>> guess = BlindGuess([[2, 0]] * 1000, vocab_size=4)
    >>> round(guess.loss([[2, 0]]), 3)
    0.047

    ```
    """

    def __init__(self, sentences: Sequence[Sequence[int]], vocab_size: int) -> None:
        # The last row is for positions that no sentence has
        self.counts = np.zeros((max(map(len, sentences)) + 1, vocab_size))
        np.add.at(self.counts, self._places(sentences), 1)
        anywhere = self.counts.sum(0)
        self.prior = PSEUDO_COUNTS * (anywhere + 1) / (anywhere.sum() + vocab_size)
        self.totals = self.counts.sum(1) + PSEUDO_COUNTS

    def loss(
        self, sentences: Sequence[Sequence[int]], label_smoothing: float = 0.0, were_counted: bool = False
    ) -> float:
        """The loss per token of the best guess at the tokens of `sentences`.

        Args:
            label_smoothing: the share of every target that is spread over the vocabulary, in guess and loss.
            were_counted: the sentences are training data: each token is guessed from all others.
        """
        places, tokens = self._places(sentences)
        own = int(were_counted)
        share = np.maximum(self.counts[places, tokens] - own, 0) + self.prior[tokens]
        spread = label_smoothing / len(self.prior)
        nll = -np.log((1 - label_smoothing) * share / (self.totals[places] - own) + spread)
        if not label_smoothing:
            return float(nll.mean())
        everywhere = (1 - label_smoothing) * (self.counts + self.prior) / self.totals[:, None] + spread
        others = -np.log(everywhere).mean(1)
        return float(((1 - label_smoothing) * nll + label_smoothing * others[places]).mean())

    def _places(self, sentences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The position and the id of every token."""
        tokens = np.fromiter(chain.from_iterable(sentences), np.int64)
        places = np.fromiter(chain.from_iterable(map(range, map(len, sentences))), np.int64)
        return np.minimum(places, len(self.counts) - 1), tokens

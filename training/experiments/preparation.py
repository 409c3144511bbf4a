"""What the runs on a data set share: the tokenizer, and the loss below which a model has learnt something."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from admin_hf.checkpoints import write_whole

from .. import data as parallel
from ..arguments import DataTrainingArguments, ModelArguments
from ..tokenization import load_tokenizer, save_tokenizer, text_batches, train_tokenizer
from .records import BLIND_NAME
from .scales import REPO
from .stock_models import tokens


BLIND_SENTENCES = 100_000  # of the training data; Multi30k has 29,000
TEXT_MARGIN = 0.1  # nats below the blind guess that a run on text must reach
PSEUDO_COUNTS = 100  # of the position's distribution, given to that of all positions


def prepare(arguments: dict[str, Any]) -> None:
    """Train the tokenizer of `--tokenizer_name` and measure the blind loss, where that has not been done.

    Args:
        arguments: of any run with this tokenizer.

    Raises:
        InputError: the data cannot be read, or do not give such a vocabulary.
    """
    folder = REPO / arguments["tokenizer_name"]
    if (folder / BLIND_NAME).exists():
        return
    model, data = data_arguments(arguments)
    train, validation = (parallel.load_pairs(split, data, model) for split in ("train", "validation"))
    print(f"Training a tokenizer of {model.vocab_size:,} entries: {arguments['tokenizer_name']}", flush=True)
    save_tokenizer(train_tokenizer(text_batches(train), model.vocab_size, model.lowercase), folder)
    tokenizer = load_tokenizer(str(folder), model)
    sentences = train.select(range(min(BLIND_SENTENCES, len(train))))
    ids = [tokenizer(list(pairs["target"]))["input_ids"] for pairs in (sentences, validation)]
    margin = 0.0
    if data.source_lang == data.target_lang:  # text, in which all places are alike, and learning is slow to show
        ids = [[[token] for token in tokens(pairs, tokenizer)] for pairs in (train, validation)]
        margin = TEXT_MARGIN
    record = {
        "loss": blind_loss(*ids, vocab_size=len(tokenizer)),
        "training_sentences": len(sentences),
        "margin": margin,
    }
    write_whole(folder / BLIND_NAME, json.dumps(record) + "\n")


def data_arguments(arguments: dict[str, Any]) -> tuple[ModelArguments, DataTrainingArguments]:
    """The arguments of a run that say what its data are, with whole paths."""
    model, data = (
        group(**{field.name: arguments[field.name] for field in fields(group) if field.name in arguments})
        for group in (ModelArguments, DataTrainingArguments)
    )
    for name in ("train_file", "validation_file", "test_file"):
        if path := getattr(data, name):
            setattr(data, name, str(REPO / path))
    return model, data


def blind_loss(train: Sequence[Sequence[int]], development: Sequence[Sequence[int]], vocab_size: int) -> float:
    """The loss per token of the best guess at a token of `development` that knows its position alone.

    The guess is how often tokens stand at this position in `train`, smoothed by how often they occur at all (and that
    by one occurrence of every token). A model that learns neither from the source nor from the words before can do no
    better, and a stack in which nothing arrives from below does no better.

    Example:

    ```python
    >>> round(blind_loss([[2, 0]] * 1000, [[2, 0]], vocab_size=4), 3)
    0.047

    ```
    """
    at: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for sentence in train:
        for position, token in enumerate(sentence):
            at[position][token] += 1
    anywhere = sum(at.values(), Counter())
    entries = anywhere.total() + vocab_size

    def probability(position: int, token: int) -> float:
        here = at.get(position, Counter())
        smoothing = PSEUDO_COUNTS * (anywhere[token] + 1) / entries
        return (here[token] + smoothing) / (here.total() + PSEUDO_COUNTS)

    losses = [-math.log(probability(i, token)) for sentence in development for i, token in enumerate(sentence)]
    return sum(losses) / len(losses)

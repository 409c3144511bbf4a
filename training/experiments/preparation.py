"""What the runs on a data set share: the tokenizer, and the losses below which a model has learnt something."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from itertools import count, islice
from math import isclose
from statistics import fmean
from typing import Any

from admin_hf.checkpoints import write_whole

from .. import data as parallel
from ..arguments import DataTrainingArguments, ModelArguments
from ..batching import TokenBatchSampler
from ..errors import InputError
from ..tokenization import load_tokenizer, save_tokenizer, text_batches, train_tokenizer
from ..tokenized_data import tokenize_for_training
from .blind import BlindGuess
from .records import BLIND_NAME, Record
from .scales import REPO
from .stock_models import tokens


BLIND_SENTENCES = 100_000  # of the training data; Multi30k has 29,000
TEXT_MARGIN = 0.1  # nats below the blind guess that a run on text must reach


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
        "loss": BlindGuess(ids[0], len(tokenizer)).loss(ids[1]),
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


# --- the blind guess in training ------------------------------------------------------------------


def with_blind_training_loss(record: Record) -> Record:
    """The record of a run that failed, with what the blind guess has where its last training loss was measured.

    That is on the targets of the updates since the training loss before, in their batches of tokens: batches of long
    and of short sentences differ by 0.1 and more. Where batches are drawn at random it is on all training targets.

    Returns:
        The record as it is if the run did not fail, if it has that loss, or if data and tokenizer are not at hand.
    """
    if not record.failed or record.begun or record.blind_train_loss is not None or not record.train_loss:
        return record
    arguments = record.arguments
    path = REPO / arguments["tokenizer_name"] / BLIND_NAME
    # A tokenizer of other data would have another blind loss
    if not path.exists() or not isclose(json.loads(path.read_text(encoding="utf-8"))["loss"], record.blind_loss):
        return record
    shared = {
        field.name: arguments[field.name]
        for group in (ModelArguments, DataTrainingArguments)
        for field in fields(group)
        if field.name in arguments and not field.name.startswith("config_")
    }
    try:
        guess, targets, lengths = _training_targets(json.dumps(shared), arguments.get("max_tokens"))
    except InputError:
        return record
    batches: Sequence[Sequence[Sequence[int]]] = [targets]
    if "max_tokens" in arguments:
        steps = [0, *(step for step, _ in record.train_loss)]
        batches = [[targets[i] for i in batch] for batch in islice(_batches(arguments, lengths), *steps[-2:])]
    smoothing = arguments.get("label_smoothing_factor", 0.0)
    return replace(record, blind_train_loss=fmean(guess.loss(batch, smoothing, True) for batch in batches))


@lru_cache(maxsize=1)
def _training_targets(arguments: str, longest: int | None) -> tuple[BlindGuess, list[list[int]], list[int]]:
    """The blind guess, the targets in the order of the training data, and the lengths that batches are made by."""
    model, data = data_arguments(json.loads(arguments))
    pairs = parallel.load_pairs("train", data, model)
    tokenizer = load_tokenizer(str(REPO / str(model.tokenizer_name)), model)
    if data.source_lang == data.target_lang:
        targets = [[token] for token in tokens(pairs, tokenizer)]
        return BlindGuess(targets, len(tokenizer)), targets, []
    tokenized = tokenize_for_training(pairs, tokenizer, data, longest)
    targets = list(tokenized["labels"])
    return BlindGuess(targets[:BLIND_SENTENCES], len(tokenizer)), targets, list(tokenized["length"])


def _batches(arguments: dict[str, Any], lengths: list[int]) -> Iterator[list[int]]:
    """The pairs of each update, from the first on, as run_translation.py takes them on one device."""
    pieces = arguments.get("gradient_accumulation_steps", 1)
    sampler = TokenBatchSampler(lengths, arguments["max_tokens"], arguments["seed"], multiple_of=pieces)
    for epoch in count():
        sampler.set_epoch(epoch)
        batches = iter(sampler)
        while update := [*islice(batches, pieces)]:
            yield [pair for batch in update for pair in batch]

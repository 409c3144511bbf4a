"""Preparing data: tokenisation, and loading of batches, beside the training that they are for."""

import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from datasets import load_from_disk
from transformers import AutoTokenizer

from training.data import load_data
from training.tokenized_data import tokenize

from . import corpus
from .record import Settings, conditions, cost
from .systems import Shape, our_arguments, our_trainer, quiet, training_options
from .turns import Turns, take_turns


TITLE = "Tokenisation and loading"
ABOUT = (
    "The time to tokenise Multi30k (once) and to load its batches (in every epoch), as a share of an epoch of "
    "training in bfloat16. Times are of an update and its batch:"
)
TRAINING, TOKENISATION = "training", "tokenisation"
WORKERS = (0, 2)


def measure(
    settings: Settings, shape: Shape = corpus.SHAPE, pairs: int | None = None, workers: Iterable[int] = WORKERS
) -> dict[str, Any]:
    """Time the three; `pairs` is how much of the data is used, by default all."""
    loading = {f"loading, {count} workers": count for count in workers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus.prepare(settings, shape, folder, pairs)
        options: dict[str, Any] = {"shape": shape, "folder": folder}
        systems = {
            TRAINING: partial(corpus.ours, batches={"max_tokens": shape.max_tokens}, **options),
            TOKENISATION: partial(tokenise, data=settings.data, pairs=pairs, **options),
        }
        systems |= {name: partial(load_batches, workers=count, **options) for name, count in loading.items()}
        measured = take_turns(systems, settings.rounds, settings.threads, "data")
    return conditions(settings) | {
        "shape": asdict(shape),
        "measured": measured,
        "figures": [cost(name, measured, name, TRAINING, "updates") for name in (TOKENISATION, *loading)],
    }


def more(results: dict[str, Any]) -> str:
    """Pairs a second."""
    rows = ["| | pairs/s |", "| --- | ---: |"]
    for name, measured in results["measured"].items():
        if "pairs" in measured:
            rates = [pairs / seconds for pairs, seconds in zip(measured["pairs"], measured["seconds"], strict=True)]
            rows.append(f"| {name} | {median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f}) |")
    return "\n".join(rows)


def tokenise(turns: Turns, shape: Shape, folder: Path, data: Path, pairs: int | None) -> None:
    """Tokenise all pairs in every turn; its `updates` are those of an epoch, in which they are used."""
    quiet()
    options = training_options(folder, corpus.DTYPE, train_file=data / "train", cache_dir=folder / "cache")
    options |= {"overwrite_cache": True, "max_tokens": shape.max_tokens}
    arguments = our_arguments(shape, options, **({"max_train_samples": pairs} if pairs else {}))
    raw, tokenizer = load_data(arguments), AutoTokenizer.from_pretrained(folder / "tokenizer")
    trainer = our_trainer(arguments, tokenizer, tokenize(raw, tokenizer, arguments)["train"])
    updates = len(trainer.batch_sampler)
    turns.next()
    while True:
        tokenised = tokenize(raw, tokenizer, arguments)["train"]
        turns.next(updates=updates, pairs=len(tokenised))


def load_batches(turns: Turns, shape: Shape, folder: Path, workers: int) -> None:
    """Load the batches of an epoch in every turn."""
    options = training_options(folder, corpus.DTYPE, dataloader_num_workers=workers, max_tokens=shape.max_tokens)
    tokenizer, data = AutoTokenizer.from_pretrained(folder / "tokenizer"), load_from_disk(folder / "train")
    trainer = our_trainer(our_arguments(shape, options), tokenizer, data)
    loader = trainer.get_train_dataloader()
    turns.next()
    while True:
        updates = sum(1 for _ in loader)
        turns.next(updates=updates, pairs=len(data))

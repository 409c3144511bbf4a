"""Training on Multi30k: token batches against batches of a fixed number of pairs that need as much memory."""

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from transformers import AutoTokenizer

from training.data import load_data
from training.model import build_model
from training.tokenization import prepare_tokenizer
from training.tokenized_data import tokenize

from .record import Settings, conditions, need, own_bytes, speed
from .systems import SHAPES, Shape, our_arguments, our_trainer, quiet, stock_trainer, train, training_options
from .turns import Measured, System, Turns, take_turns


TITLE = "A corpus"
ABOUT = (
    "Target tokens per second (without padding) in training on Multi30k in bfloat16. This project with `--max_tokens` "
    "is compared with stock Marian in Seq2SeqTrainer, as Hugging Face's script uses them. The latter has a fixed "
    "`per_device_train_batch_size` in random order: the largest power of 2 whose peak memory is at most this "
    "project's. The first ratio is of the whole, batches and implementation. The second compares both kinds of "
    "batches in this project: it is the share of the batches. Sentences differ from turn to turn, so these ratios "
    "vary more than others. Token batches are this many times as fast:"
)
SHAPE = replace(SHAPES["tiny"], updates=20)
DTYPE = "bfloat16"
BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
TARGET = 1.5
OURS, OURS_FIXED, STOCK = "Admin, token batches", "Admin, fixed batches", "stock, fixed batches"


def measure(
    settings: Settings, shape: Shape = SHAPE, batch_sizes: Iterable[int] = BATCH_SIZES, pairs: int | None = None
) -> dict[str, Any]:
    """Compare the three systems; `pairs` is how much of the data is used, by default all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(settings, shape, folder, pairs)
        options: dict[str, Any] = {"shape": shape, "folder": folder}
        token_batches = partial(ours, batches={"max_tokens": shape.max_tokens}, **options)
        fixed = {size: {"per_device_train_batch_size": size} for size in batch_sizes}

        def alone(system: System, title: str) -> Measured:
            return take_turns({"alone": system}, 1, settings.threads, title)["alone"]

        limit = own_bytes(alone(token_batches, f"corpus, {shape.max_tokens:,} tokens"))
        searched: dict[int, int] = {}
        for size, batches in fixed.items():
            searched[size] = own_bytes(alone(partial(stock, batches=batches, **options), f"corpus, {size} pairs"))
            if searched[size] > limit:
                break
        size = largest(searched, limit)
        systems = {
            OURS: token_batches,
            OURS_FIXED: partial(ours, batches=fixed[size], **options),
            STOCK: partial(stock, batches=fixed[size], **options),
        }
        measured = take_turns(systems, settings.rounds, settings.threads, "corpus")
    per_target = {"per": "targets"}
    return conditions(settings) | {
        "shape": asdict(shape),
        "dtype": DTYPE,
        "token_batches_bytes": limit,
        "fixed_batches_bytes": searched,
        "batch_size": size,
        "measured": measured,
        "figures": [
            speed("the whole, a token", measured, OURS, STOCK, **per_target, at_least=TARGET),
            speed("batches alone, a token", measured, OURS, OURS_FIXED, **per_target),
        ],
    }


def largest(searched: dict[int, int], limit: int) -> int:
    """The largest batch size that needs at most `limit` bytes; the smallest if none does."""
    return max((size for size, used in searched.items() if used <= limit), default=min(searched))


def more(results: dict[str, Any]) -> str:
    """How the batch size was found, and how many tokens a second there were."""
    rows = ["| | batches | target tokens/s, mean | peak memory |", "| --- | --- | ---: | ---: |"]
    for name, measured in results["measured"].items():
        rate = sum(measured["targets"]) / sum(measured["seconds"])
        tokens, pairs = f"{results['shape']['max_tokens']:,} tokens", f"{results['batch_size']} pairs"
        batches = tokens if name == OURS else pairs
        rows.append(f"| {name} | {batches} | {rate:,.0f} | {own_bytes(measured) / 1e6:,.0f} MB |")
    searched = ", ".join(f"{size}: {used / 1e6:,.0f} MB" for size, used in results["fixed_batches_bytes"].items())
    found = f"Peak memory of stock Marian by batch size: {searched}; of {OURS}: "
    return "\n".join([*rows, "", f"{found}{results['token_batches_bytes'] / 1e6:,.0f} MB."])


# --- the systems ----------------------------------------------------------------------------------


def prepare(settings: Settings, shape: Shape, folder: Path, pairs: int | None) -> None:
    """Write a tokenizer, the tokenised pairs and the vanilla weights for all systems to a folder.

    Raises:
        Missing: there is no Multi30k.
    """
    need([settings.data / f"train.{language}" for language in ("en", "de")], "Multi30k (--data)")
    quiet()
    options = training_options(folder, DTYPE, train_file=settings.data / "train", cache_dir=folder / "cache")
    few = {"max_train_samples": pairs} if pairs else {}
    arguments = our_arguments(shape, options, max_tokens=shape.max_tokens, **few)
    raw = load_data(arguments)
    tokenizer = prepare_tokenizer(arguments, raw)
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenize(raw, tokenizer, arguments)["train"].save_to_disk(folder / "train")
    model = build_model(arguments, tokenizer)
    model.save_pretrained(folder / "stock", reparameterize=True)


def ours(turns: Turns, shape: Shape, folder: Path, batches: dict[str, int]) -> None:
    """Train by run_translation.py's trainer."""
    arguments = our_arguments(shape, training_options(folder, DTYPE, **batches))
    tokenizer, data = AutoTokenizer.from_pretrained(folder / "tokenizer"), load_from_disk(folder / "train")
    train(turns, our_trainer(arguments, tokenizer, data), shape.updates)


def stock(turns: Turns, shape: Shape, folder: Path, batches: dict[str, int]) -> None:
    """Train stock Marian by a stock trainer."""
    options = training_options(folder, DTYPE, **batches)
    tokenizer, data = AutoTokenizer.from_pretrained(folder / "tokenizer"), load_from_disk(folder / "train")
    train(turns, stock_trainer(folder / "stock", options, tokenizer, data), shape.updates)

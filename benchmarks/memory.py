"""Peak memory of a training step: this project's trainer against stock Marian in a stock trainer."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from .record import Settings, conditions, memory
from .systems import DTYPES, SHAPES, Shape, export_stock, ours, stock
from .turns import take_turns


TITLE = "Peak memory"
ABOUT = (
    "The largest resident memory of the processes of a training step, as above but with a vocabulary of 32,000 and "
    "4,096 tokens in a batch: weights, gradients, optimiser and activations, minus what a process has after all "
    "imports. The ratios say which share of stock's memory this project needs:"
)
MEMORY_SHAPES = {
    name: replace(SHAPES[name], vocab_size=32_000, max_tokens=4096, updates=2) for name in ("tiny", "base")
}
TARGET = 0.6


def measure(
    settings: Settings, shapes: Mapping[str, Shape] = MEMORY_SHAPES, dtypes: Sequence[str] = DTYPES
) -> dict[str, Any]:
    settings = replace(settings, rounds=1)
    figures, measured = [], {}
    for name, shape in shapes.items():
        measured[name] = {}
        with tempfile.TemporaryDirectory() as folder:
            export_stock(shape, Path(folder))
            for dtype in dtypes:
                for kind, train in (("Admin", ours), ("stock", stock)):
                    # Alone, so that all the machine's memory is its own
                    system = {f"{kind}, {dtype}": partial(train, shape=shape, dtype=dtype, folder=Path(folder))}
                    measured[name] |= take_turns(system, 1, settings.threads, f"memory, {name}, {kind}, {dtype}")
        for dtype in dtypes:
            figures.append(memory(name, measured[name], f"Admin, {dtype}", f"stock, {dtype}", at_most=TARGET))
    shown = {name: asdict(shape) for name, shape in shapes.items()}
    return conditions(settings) | {"shapes": shown, "measured": measured, "figures": figures}

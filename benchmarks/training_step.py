"""A training step: this project's trainer against stock Marian in a stock trainer."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from .record import Settings, conditions, speed
from .systems import DTYPES, SHAPES, Shape, export_stock, ours, stock
from .turns import Measured, take_turns


TITLE = "Training step"
ABOUT = (
    "A whole update, with all that the trainers do around it. `AdminForConditionalGeneration`, trained by "
    "run_translation.py, is compared with `MarianMTModel` in `Seq2SeqTrainer`. Both have the same weights, batches "
    "and optimiser. First, both must compute the same loss without dropout. Dropout is 0.1 and gradients are not "
    "clipped. Labels are not smoothed, because Trainer would also smooth over padding. The ratios say how many times "
    "as fast this project is:"
)

# Times as fast as stock: float32 to float32, bfloat16 to float32, bfloat16 to bfloat16
TARGETS = {"tiny": (1.5, 2.5, 1.5), "base": (1.1, 2.0, 1.2), "deep": (1.1, 2.0, 1.2)}
PAIRS = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))

# How far losses may be from stock's in float32, relative to them: autocast rounds to 8 bits, in other places in each
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-3}


def measure(settings: Settings, shapes: Mapping[str, Shape] = SHAPES) -> dict[str, Any]:
    figures, measured = [], {}
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            export_stock(shape, Path(folder))
            measured[name] = compare(settings, shape, Path(folder), f"training_step, {name}")
        for (a, b), target in zip(PAIRS, TARGETS[name], strict=True):
            figures.append(speed(name, measured[name], f"Admin, {a}", f"stock, {b}", "updates", at_least=target))
    shown = {name: asdict(shape) for name, shape in shapes.items()}
    return conditions(settings) | {"shapes": shown, "measured": measured, "figures": figures}


def compare(settings: Settings, shape: Shape, folder: Path, title: str) -> dict[str, Measured]:
    """Let both trainers, in both precisions, take turns; `folder` has the vanilla weights.

    Raises:
        ValueError: their losses differ.
    """
    systems = {
        f"{name}, {dtype}": partial(train, shape=shape, dtype=dtype, folder=folder)
        for dtype in DTYPES
        for name, train in (("Admin", ours), ("stock", stock))
    }
    return take_turns(systems, settings.rounds, settings.threads, title, check=check_losses)


def check_losses(ready: Mapping[str, dict[str, Any]]) -> None:
    """Raise a ValueError if a system's loss is not that of stock Marian in float32."""
    expected = ready["stock, float32"]["loss"]
    for name, facts in ready.items():
        tolerance = TOLERANCES[name.rpartition(" ")[2]]
        if not abs(facts["loss"] / expected - 1) <= tolerance:
            raise ValueError(
                f"The loss without dropout of {name!r} is {facts['loss']:.6f}, that of 'stock, float32' "
                f"{expected:.6f}; expected the same to a part of {tolerance:g}. They do not compute the same."
            )

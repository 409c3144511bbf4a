"""The cost of ω in a training step, and of profiling before the first."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from admin_hf import profile_residuals

from . import systems
from .record import Settings, conditions, cost
from .systems import DTYPES, SHAPES, Shape
from .turns import Turns, take_turns


TITLE = "Cost of ω and of profiling"
ABOUT = (
    "A training step of `admin` in units of one of `post_ln`, which is the same code without ω; and the profiling of "
    "a batch in units of a training step on it, which happens once (at most 5 rounds):"
)
OMEGA, PROFILING = 1.02, 2.0  # targets
PAIR = ("admin", "post_ln")


def measure(
    settings: Settings, shapes: Mapping[str, Shape] = SHAPES, dtypes: Sequence[str] = DTYPES
) -> dict[str, Any]:
    figures, measured = [], {}
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            train = partial(systems.ours, shape=shape, folder=Path(folder))
            measured[name] = {}
            for dtype in dtypes:
                # These two alone, so that each follows the other and neither a third
                pair = {f"{residual}, {dtype}": partial(train, dtype=dtype, residual=residual) for residual in PAIR}
                turns = take_turns(pair, settings.rounds, settings.threads, f"omega, {name}, {dtype}")
                figures.append(cost(f"{name}: ω", turns, *pair, "updates", at_most=OMEGA))
                measured[name][dtype] = turns
            once: dict[str, Any] = {f"admin, {dtype}": partial(train, dtype=dtype) for dtype in dtypes}
            once["profiling"] = partial(profile, shape=shape, folder=Path(folder))
            turns = take_turns(once, min(settings.rounds, 5), settings.threads, f"omega, {name}, profiling")
            for dtype in dtypes:
                step = f"admin, {dtype}"
                figures.append(cost(f"{name}: profiling", turns, "profiling", step, "updates", at_most=PROFILING))
            measured[name]["profiling"] = turns
    shown = {name: asdict(shape) for name, shape in shapes.items()}
    return conditions(settings) | {"shapes": shown, "measured": measured, "figures": figures}


def profile(turns: Turns, shape: Shape, folder: Path) -> None:
    """Profile, in each turn, every batch that a turn of training has."""
    options = systems.training_options(folder, "float32")
    trainer = systems.our_trainer(systems.our_arguments(shape, options), systems.word_tokenizer(shape.vocab_size), [])
    batches = systems.random_batches(shape, trainer.data_collator)
    profile_residuals(trainer.model, batches[0])  # warm-up
    turns.next()
    while True:
        for batch in batches:
            profile_residuals(trainer.model, batch)
        turns.next(updates=len(batches))

"""The cost of ω in a training step, and of profiling before the first."""

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from admin_hf import profile_residuals
from admin_hf.connections import AdminConnection, PostLNConnection, profiled_connections

from . import systems
from .record import Settings, conditions, cost
from .systems import DTYPES, SHAPES, Shape
from .turns import Measured, Turns, take_turns


TITLE = "Cost of ω and of profiling"
ABOUT = (
    "A training step of `admin` in units of one of `post_ln`, the same code without ω. One process trains one model, "
    "whose connections leave out ω in every other turn. Two processes would differ by a few percent anyway, because "
    "their memory is placed differently. Profiling, which happens once, is given in units of a training step on the "
    "same batch (at most 5 rounds):"
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
                both = {"both": partial(alternate, shape=shape, dtype=dtype, folder=Path(folder))}
                turns = take_turns(both, 2 * settings.rounds, settings.threads, f"omega, {name}, {dtype}")["both"]
                pair = {f"{residual}, {dtype}": every_other(turns, i) for i, residual in enumerate(PAIR)}
                figures.append(cost(f"{name}: ω", pair, *pair, "updates", at_most=OMEGA))
                measured[name][dtype] = pair
            once: dict[str, Any] = {f"admin, {dtype}": partial(train, dtype=dtype) for dtype in dtypes}
            once["profiling"] = partial(profile, shape=shape, folder=Path(folder))
            turns = take_turns(once, min(settings.rounds, 5), settings.threads, f"omega, {name}, profiling")
            for dtype in dtypes:
                step = f"admin, {dtype}"
                figures.append(cost(f"{name}: profiling", turns, "profiling", step, "updates", at_most=PROFILING))
            measured[name]["profiling"] = turns
    shown = {name: asdict(shape) for name, shape in shapes.items()}
    return conditions(settings) | {"shapes": shown, "measured": measured, "figures": figures}


def alternate(turns: Turns, shape: Shape, dtype: str, folder: Path) -> None:
    """Train `admin` in a turn and, with the same weights in the same memory, `post_ln` in the next one."""
    trainer = systems.our_batch_trainer(shape, dtype, folder)
    systems.train_on_random_batches(Alternating(turns, trainer.model), trainer, shape)


class Alternating(Turns):
    """Turns of which every other one has no ω: it gets no gradient then, and the optimiser leaves it alone."""

    def __init__(self, turns: Turns, model: nn.Module) -> None:
        self.turns = turns
        self.connections = [connection for _, connection in profiled_connections(model)]
        self.classes = itertools.cycle((AdminConnection, PostLNConnection))

    def next(self, **facts: Any) -> None:
        self.turns.next(**facts)
        turn_class = next(self.classes)
        for connection in self.connections:
            connection.__class__ = turn_class


def every_other(both: Measured, first: int) -> Measured:
    """The turns of one of the two."""
    return {name: both[name][first::2] for name in ("seconds", "updates")}


def profile(turns: Turns, shape: Shape, folder: Path) -> None:
    """Profile, in each turn, every batch that a turn of training has."""
    trainer = systems.our_batch_trainer(shape, "float32", folder)
    batches = systems.random_batches(shape, trainer.data_collator)
    profile_residuals(trainer.model, batches[0])  # warm-up
    turns.next()
    while True:
        for batch in batches:
            profile_residuals(trainer.model, batch)
        turns.next(updates=len(batches))

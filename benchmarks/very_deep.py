"""What very deep models cost: profiling, an update and its memory."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from .omega import profile
from .record import Settings, conditions, cost, memory
from .systems import Shape, ours
from .turns import take_turns


TITLE = "Very deep"
ABOUT = (
    "Admin of 500 + 500 layers, 2,500 sub-layers, in units of 100 + 100 (width 64, 512 tokens in a batch, float32). "
    "Costs that are proportional to depth have a ratio of 5:"
)
NARROW = Shape(64, 128, 4, layers=100, vocab_size=4000, max_tokens=512, updates=1)


def measure(settings: Settings, shape: Shape = NARROW, layers: Sequence[int] = (500, 100)) -> dict[str, Any]:
    """Measure two depths; the first in units of the second."""
    names = [f"{n} + {n} layers" for n in layers]
    shapes = [replace(shape, layers=n) for n in layers]
    figures, measured = [], {}
    with tempfile.TemporaryDirectory() as folder:
        systems = {"an update": partial(ours, dtype="float32", folder=Path(folder))}
        systems["profiling"] = partial(profile, folder=Path(folder))
        for what, system in systems.items():
            turns = {name: partial(system, shape=deep) for name, deep in zip(names, shapes, strict=True)}
            measured[what] = take_turns(turns, settings.rounds, settings.threads, f"very deep, {what}")
            figures.append(cost(what, measured[what], *names, "updates"))
            figures.append(memory(f"{what}: memory", measured[what], *names))
    return conditions(settings) | {"shape": asdict(shape), "measured": measured, "figures": figures}

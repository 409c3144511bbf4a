"""Measurements of what the library makes; not part of it. `python -m benchmarks` runs them."""

import training.aligned  # noqa: F401  isort: skip

from importlib import import_module
from typing import Any


# In the order of the page. Each module has a TITLE, what it is ABOUT, and `measure(settings)`, which gives what is
# recorded, or an iterator that gives it as it grows; it may have `more(results)`, text below its table, and
# `draw(results, path)`.
BENCHMARKS = (
    "training_step",
    "levers",
    "corpus",
    "memory",
    "omega",
    "decoding",
    "data",
    "growth",
    "very_deep",
    "startup",
    "waiting",
    "gpu",
)


def load(name: str) -> Any:
    """The module of a benchmark."""
    return import_module(f"{__name__}.{name}")

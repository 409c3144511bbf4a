"""What a benchmark records: the conditions, what was measured, and figures, which are ratios of two systems."""

import contextlib
import importlib.metadata
import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from admin_hf.checkpoints import write_whole
from admin_hf.trainer_card import processor_name

from .turns import Measured


PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "ctranslate2", "sacrebleu")


@dataclass(frozen=True)
class Settings:
    """What all benchmarks share.

    Attributes:
        threads: of every system.
        rounds: turns of every system.
        data: folder of Multi30k: train.en, train.de, val.en, val.de.
        checkpoint: a trained model with its tokenizer.
        output: the folder that NAME.json is written to.
        seconds: that the measurement on a GPU may take.
        parts: what is measured on a GPU: the parts whose names contain one of these; all by default.
    """

    threads: int = field(default_factory=torch.get_num_threads)
    rounds: int = 5
    data: Path = Path("runs/data/multi30k")
    checkpoint: Path = Path("runs/multi30k-4-4-tiny")
    output: Path = Path("docs/performance")
    seconds: float = 225
    parts: Sequence[str] = ()


class Missing(Exception):
    """A benchmark cannot run here; the message says what it needs, and `code` is the command's exit code then."""

    code = 1


def need(paths: Iterable[Path], what: str) -> None:
    """Raise [`Missing`] if a file is not there."""
    for path in paths:
        if not path.exists():
            raise Missing(f"{what} is needed, and there is no {path}.")


def conditions(settings: Settings) -> dict[str, Any]:
    """Threads, rounds, processor and versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    numbers = {"threads": settings.threads, "rounds": settings.rounds}
    return numbers | {"processor": processor_name(), "versions": versions}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, whole or not at all."""
    write_whole(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


# --- figures --------------------------------------------------------------------------------------


Figure = dict[str, Any]


def figure(what: str, a: str, b: str, ratios: Sequence[float], **target: float) -> Figure:
    """A ratio of two systems, with an entry for each round, and the target it should reach.

    Args:
        what: what the ratio is of, such as "tiny: times as fast".
        a: the first system, with its median.
        b: the second.
        ratios: of a to b.
        target: `at_least` or `at_most`, if there is one.
    """
    return {"what": what, "a": a, "b": b, "ratios": list(ratios), **target}


def speed(what: str, measured: dict[str, Measured], a: str, b: str, per: str | None = None, **target: float) -> Figure:
    """How many times as fast as b a is; `per` names the fact that says how much was done in a turn."""
    inverse = cost(what, measured, a, b, per, **target)
    return inverse | {"ratios": [1 / ratio for ratio in inverse["ratios"]]}


def cost(what: str, measured: dict[str, Measured], a: str, b: str, per: str | None = None, **target: float) -> Figure:
    """How much of b's time a takes; `per` as in [`speed`]."""
    first, second = (_seconds(measured[name], per) for name in (a, b))
    ratios = [x / y for x, y in zip(first, second, strict=True)]
    return figure(what, _with_time(a, first), _with_time(b, second), ratios, **target)


def memory(what: str, measured: dict[str, Measured], a: str, b: str, **target: float) -> Figure:
    """How much of b's peak memory a has, both without what they have before a model is made."""
    used = {name: own_bytes(measured[name]) for name in (a, b)}
    labels = [f"{name}: {used[name] / 1e6:,.0f} MB" for name in (a, b)]
    return figure(what, *labels, [used[a] / used[b]], **target)


def own_bytes(measured: Measured) -> int:
    """Peak memory without what the process had when nothing but the imports was done."""
    return measured["peak_bytes"] - measured["import_bytes"]


def _seconds(measured: Measured, per: str | None) -> list[float]:
    counts = measured[per] if per else [1] * len(measured["seconds"])
    return [seconds / count for seconds, count in zip(measured["seconds"], counts, strict=True)]


def _with_time(name: str, seconds: list[float]) -> str:
    median = statistics.median(seconds)
    units = {"s": 1.0, "ms": 1e3, "µs": 1e6}
    unit, factor = next(((unit, factor) for unit, factor in units.items() if median * factor >= 1), ("µs", 1e6))
    return f"{name}: {median * factor:.3g} {unit}"

"""Growth of a training step's time and memory with the model's depth and vocabulary."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from admin_hf.analysis.drawing import add_lines, new_figure, plain_axes, save_figure

from .record import Settings, conditions, memory, own_bytes, speed
from .systems import Shape, export_stock, ours, stock
from .turns import Measured, take_turns


TITLE = "Growth"
ABOUT = (
    "Training steps of narrow models (width 64, 1,024 tokens in a batch, float32): of N + N layers with a vocabulary "
    "of 1,000, and of 2 + 2 layers with larger vocabularies. The ratios say how many times as fast as stock this "
    "project is, and which share of stock's memory it needs:"
)
NARROW = Shape(64, 128, 4, layers=2, vocab_size=1000, max_tokens=1024, updates=2)
AXES = {"layers": (6, 12, 24, 50, 100), "vocabulary": (1_000, 4_000, 16_000, 64_000)}
FIELDS = {"layers": "layers", "vocabulary": "vocab_size"}  # of a Shape
SYSTEMS = ("Admin", "stock")


def measure(settings: Settings, shape: Shape = NARROW, axes: Mapping[str, Sequence[int]] = AXES) -> dict[str, Any]:
    """Measure the shape with other sizes; `axes` says which, at least two each."""
    series: dict[str, dict[str, dict[str, Measured]]] = {}
    for axis, sizes in axes.items():
        shapes = {str(size): replace(shape, **{FIELDS[axis]: size}) for size in sizes}
        series[axis] = {size: _pair(settings, shapes[size], f"growth, {axis} {size}") for size in shapes}
    figures = []
    for axis, points in series.items():
        for size, measured in points.items():
            figures.append(speed(f"{axis} {int(size):,}: times as fast", measured, *SYSTEMS, "updates"))
            figures.append(memory(f"{axis} {int(size):,}: memory", measured, *SYSTEMS))
    exponents = {axis: {name: _exponents(points, name) for name in SYSTEMS} for axis, points in series.items()}
    return conditions(settings) | {
        "shape": asdict(shape),
        "measured": series,
        "exponents": exponents,
        "figures": figures,
    }


def _pair(settings: Settings, shape: Shape, title: str) -> dict[str, Measured]:
    with tempfile.TemporaryDirectory() as folder:
        export_stock(shape, Path(folder))
        options: Mapping[str, Any] = {"shape": shape, "dtype": "float32", "folder": Path(folder)}
        systems = {"Admin": partial(ours, **options), "stock": partial(stock, **options)}
        return take_turns(systems, settings.rounds, settings.threads, title)


def _values(points: Mapping[str, dict[str, Measured]], name: str) -> dict[str, list[float]]:
    """Seconds of an update, and bytes, by size."""
    measured = [point[name] for point in points.values()]
    return {
        "seconds": [median(entry["seconds"]) / entry["updates"][0] for entry in measured],
        "bytes": [own_bytes(entry) for entry in measured],
    }


def _exponents(points: Mapping[str, dict[str, Measured]], name: str) -> dict[str, float]:
    """The powers of the size that seconds and bytes grow with: least squares of the logarithms."""
    sizes = [math.log(int(size)) for size in points]
    values = _values(points, name)
    logs = {quantity: [math.log(value) for value in row] for quantity, row in values.items()}
    return {quantity: linear_regression(sizes, row).slope for quantity, row in logs.items()}


def more(results: dict[str, Any]) -> str:
    """The exponents of the growth, and the drawing."""
    rows = ["| grows with the power of | Admin: seconds | stock: seconds | Admin: bytes | stock: bytes |"]
    rows += ["| --- | ---: | ---: | ---: | ---: |"]
    for axis, exponents in results["exponents"].items():
        cells = [f"{exponents[name][quantity]:.2f}" for quantity in ("seconds", "bytes") for name in SYSTEMS]
        rows.append(f"| {axis} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", "![Growth](performance/growth.png)"])


def draw(results: dict[str, Any], path: Path) -> None:
    """Seconds and bytes against both sizes, with logarithmic axes."""
    figure = new_figure(9, 6)
    panels = figure.subplots(2, len(results["measured"]), sharex="col", sharey="row", squeeze=False)
    labels = {"seconds": ("seconds of an update", 1), "bytes": ("peak memory, MB", 1e6)}
    for column, (axis, points) in zip(panels.T, results["measured"].items(), strict=True):
        for axes, (quantity, (label, unit)) in zip(column, labels.items(), strict=True):
            rows = {name: [value / unit for value in _values(points, name)[quantity]] for name in SYSTEMS}
            add_lines(axes, {name: ([int(size) for size in points], row) for name, row in rows.items()})
            plain_axes(axes, xscale="log", yscale="log", ylabel=label if axes in panels[:, 0] else "")
        column[-1].set_xlabel(axis)
    panels[0, 0].legend(frameon=False)
    save_figure(figure, path)

"""Figures of the analyses, and the line figure that all pages of the project share.

Nothing is measured here. Colours are told apart by colour-blind readers, and lines in grey print by their styles.
"""

import io
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import write_whole
from .dependency import LayerDependency
from .gradients import GradientNorms
from .omega import OmegaHistory, StackOmega
from .output_change import PERTURBATIONS, OutputChange
from .updates import MATRICES, UpdateNorms


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


# Wong's palette (Nature Methods 8, 2011), and line styles for those who print in grey
STYLES: list[tuple[str, Any]] = [
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#E69F00", (0, (6, 2))),
    ("#56B4E9", (0, (3, 1, 1, 1))),
]

# Perceptually uniform, the same to colour-blind readers, and monotonic in grey
COLOUR_MAP = "cividis"

DPI = 120

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


# --- what all figures share -----------------------------------------------------------------------


def new_figure(width: float = 7, height: float = 3.8, caption: str = "") -> "Figure":
    """An empty figure with a caption below its axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: install it, or admin-hf[analysis].") from error
    lines = [part for line in caption.splitlines() for part in textwrap.wrap(line, int(width * 16.5))]
    figure = Figure(figsize=(width, height + 0.14 * len(lines)), layout="constrained")
    if lines:
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color="#333333")
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a figure in the format of the path's suffix, completely or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format=Path(path).suffix.lstrip(".") or "png")
    write_whole(path, buffer.getvalue())


def add_lines(axes: "Axes", series: Series, styles: Iterable[tuple[str, Any]] = STYLES) -> None:
    """Draw a line with a label for each series that has points."""
    for (label, (x, y)), (colour, style) in zip(series.items(), cycle(styles), strict=False):
        if len(x):
            axes.plot(x, y, color=colour, linestyle=style, label=label)


def by_sublayer(values: Mapping[str, Sequence[float]]) -> Series:
    """Values of all sub-layers of a stack as lines over them, which are counted from 1."""
    return {label: (range(1, len(column) + 1), column) for label, column in values.items()}


def add_omega(axes: "Axes", omega: StackOmega, first: str, last: str) -> None:
    """Draw ω by sub-layer: its `first` and `last` means, labelled so, those between in grey, and the last's range."""
    x = omega.places()
    (colour, style), (earlier, dashed) = STYLES[:2]
    for mean in omega.mean[1:-1]:
        axes.plot(x, mean, color=axes.xaxis.label.get_color(), alpha=0.25, linewidth=0.8)
    axes.fill_between(x, omega.min[-1], omega.max[-1], color=colour, alpha=0.15, linewidth=0)
    if len(omega.mean) > 1:
        axes.plot(x, omega.mean[0], color=earlier, linestyle=dashed, label=first)
    axes.plot(x, omega.mean[-1], color=colour, linestyle=style, marker=".", label=last)


def plain_axes(axes: "Axes", **labels: Any) -> None:
    """Titles and labels, a light grid, and no frame where there is no axis."""
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def add_heat_map(axes: "Axes", beta: Sequence[Sequence[float]], largest: float) -> "AxesImage":
    """Draw β_{i,j} from 0 to `largest`, a row for each sub-layer: j = 0 … i of them are there."""
    size = len(beta)
    square = [[*row, *[float("nan")] * (size + 1 - len(row))] for row in beta]
    extent = (-0.5, size + 0.5, size + 0.5, 0.5)
    axes.set(xlabel="branch j (0: embedding)", ylabel="output of sub-layer i")
    return axes.imshow(square, cmap=COLOUR_MAP, vmin=0, vmax=largest, extent=extent, interpolation="nearest")


def draw_lines(
    path: str | os.PathLike | None, title: str, x_label: str, y_label: str, series: Series, caption: str = ""
) -> "Figure":
    """Draw lines over one pair of axes: `series` has the x and y of each label.

    Returns:
        The figure, which is also saved to `path` if there is one.
    """
    figure = new_figure(caption=caption)
    axes = figure.add_subplot()
    add_lines(axes, series)
    plain_axes(axes, title=title, xlabel=x_label, ylabel=y_label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return _finished(figure, path)


def caption_of(result: Any) -> str:
    """The caption: what the paper expects, and what was found."""
    return f"Expected: {result.EXPECTATION}\nFound: {result.verdict()}"


def _finished(figure: "Figure", path: str | os.PathLike | None) -> "Figure":
    if path is not None:
        save_figure(figure, path)
    return figure


# --- a figure for each analysis; each is returned, and saved to `path` if there is one ------------------


def draw_dependency(result: LayerDependency, path: str | os.PathLike | None = None) -> "Figure":
    """Heat maps of β_{i,j}, encoder and decoder side by side, with one scale of colours."""
    figure = new_figure(10, 4.4, caption_of(result))
    stacks = {"Encoder": result.encoder, "Decoder": result.decoder}
    # The embedding dominates the first outputs, and would give all branches one colour
    largest = max(value for stack in stacks.values() for row in stack.beta for value in row[1:])
    panels = figure.subplots(1, 2)
    for axes, (title, stack) in zip(panels, stacks.items(), strict=True):
        image = add_heat_map(axes, stack.beta, largest or 1)
        axes.set(title=f"{title} ({stack.system})", aspect="auto")
    figure.colorbar(image, ax=panels, label="β$_{i,j}$", extend="max", shrink=0.9)
    return _finished(figure, path)


def draw_gradients(
    results: GradientNorms | Mapping[str, GradientNorms], path: str | os.PathLike | None = None
) -> "Figure":
    """Relative gradient norms by sub-layer, of both stacks; of one model or, by label, of several."""
    if isinstance(results, GradientNorms):
        caption, results = caption_of(results), {"": results}
    else:
        found = [f"{label}: {result.verdict()}" for label, result in results.items()]
        caption = "\n".join([f"Expected: {GradientNorms.EXPECTATION}", *found])
    figure = new_figure(10, 3.8, caption)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("encoder", "decoder"), strict=True):
        stacks = {label: getattr(result, name) for label, result in results.items()}
        norms = {f"{label} ({stack.system})".strip(): stack.relative_norms for label, stack in stacks.items()}
        add_lines(axes, by_sublayer(norms))
        plain_axes(axes, title=name.capitalize(), xlabel="sub-layer i", yscale="log")
    if len(results) > 1:
        panels[0].legend(frameon=False)
    panels[0].set_ylabel("‖Δx$_i$‖ / max$_j$ ‖Δx$_j$‖")
    return _finished(figure, path)


def draw_omega(result: OmegaHistory, path: str | os.PathLike | None = None) -> "Figure":
    """Mean ω by sub-layer, a line for each checkpoint, and the range of its entries in the last one."""
    figure = new_figure(10, 3.8, caption_of(result))
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # Without the light end of the map, which lines on white paper need
    dark = ListedColormap([colormaps[COLOUR_MAP](k / 100) for k in range(80)])
    scale = Normalize(result.updates[0], result.updates[-1])
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, stack) in zip(panels, (("Encoder", result.encoder), ("Decoder", result.decoder)), strict=True):
        x = stack.places()
        axes.fill_between(x, stack.min[-1], stack.max[-1], color="0.88", label="range of entries at the end")
        for update, mean in zip(result.updates, stack.mean, strict=True):
            axes.plot(x, mean, color=dark(scale(update)), linewidth=1.2)
        plain_axes(axes, title=title if stack.names else f"{title}: no ω", xlabel="sub-layer i")
        if stack.names:
            axes.legend(frameon=False)
    panels[0].set_ylabel("ω$_i$, mean of its entries")
    figure.colorbar(ScalarMappable(scale, dark), ax=panels, label="updates")
    return _finished(figure, path)


def draw_output_change(result: OutputChange, path: str | os.PathLike | None = None) -> "Figure":
    """Output change by depth, a panel for each perturbation: means with their deviations, and the better fits; and
    what Theorem 2 says the change under random steps comes from."""
    figure = new_figure(14, 4.4, caption_of(result))
    depths = range(result.sublayers[0], result.sublayers[-1] + 1)
    *panels, of_theorem = figure.subplots(1, 3)
    for axes, (perturbation, name) in zip(panels, PERTURBATIONS.items(), strict=True):
        curves = [curve for curve in result.curves if curve.perturbation == perturbation and any(curve.mean)]
        for curve, (colour, style), marker in zip(curves, cycle(STYLES), cycle("osD^vP"), strict=False):
            x, fit = curve.better_fit()
            fitted = [fit.slope * (n if x == "N" else log(n)) + fit.intercept for n in depths]
            axes.plot(depths, [y if y > 0 else float("nan") for y in fitted], color=colour, linestyle=style)
            points = axes.errorbar(result.sublayers, curve.mean, curve.std, fmt=marker, color=colour, ms=4, capsize=3)
            points.set_label(curve.growth())
        plain_axes(axes, title=name.capitalize(), xlabel="sub-layers N of the encoder", yscale="log")
        if curves:  # a fit that comes near 0 must not squeeze the rest
            means = [mean for curve in curves for mean in curve.mean if mean > 0]
            axes.set_ylim(min(means) / 3, max(means) * 3)
            axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("|F(x$_0$, W) − F(x$_0$, W*)|$^2$")
    _draw_theorem(of_theorem, result)
    return _finished(figure, path)


def _draw_theorem(axes: "Axes", result: OutputChange) -> None:
    """The change of all systems and depths over Σ β²_ii, and the line that Theorem 2 says it is."""
    curves = [curve for curve in result.curves if curve.perturbation == "random" and any(curve.mean)]
    for curve, (colour, _), marker in zip(curves, cycle(STYLES), cycle("osD^vP"), strict=False):
        axes.plot(curve.own, curve.mean, linestyle="", marker=marker, color=colour, ms=4, label=curve.label)
    if (theorem := result.theorem("random")) is not None:
        ends = [extreme(own for curve in curves for own in curve.own if own > 0) for extreme in (min, max)]
        label = f"{theorem.constant:.2g} Σβ²$_{{ii}}$, R² {theorem.r_squared:.2f}"
        axes.plot(ends, [theorem.constant * own for own in ends], color="0.4", linewidth=1, label=label)
        axes.legend(frameon=False, fontsize=8)
    title = f"Theorem 2: {PERTURBATIONS['random']}"
    plain_axes(axes, title=title, xlabel="Σ$_i$ β²$_{ii}$ of the encoder", xscale="log", yscale="log")


def draw_updates(result: UpdateNorms, path: str | os.PathLike | None = None) -> "Figure":
    """Relative norms of gradients and of updates over the run, a column for each matrix and a line for each layer."""
    figure = new_figure(10, 5, caption_of(result))
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(next(iter(result.updates[0].values())))
    # Lighter in higher layers, as in the paper; one shade is left out, the lightest
    shades = [colormaps[COLOUR_MAP](layer / count) for layer in range(count)]
    steps = BoundaryNorm([layer + 0.5 for layer in range(count + 1)], count)
    panels = figure.subplots(2, len(MATRICES), sharex=True, sharey=True)
    for row, (kind, norms) in zip(panels, (("gradient", result.gradients), ("update", result.updates)), strict=True):
        for axes, (projection, matrix) in zip(row, MATRICES.items(), strict=True):
            for layer in range(count):
                values = [update[projection][layer] for update in norms]
                axes.plot(range(1, len(values) + 1), values, color=shades[layer], marker=".")
            plain_axes(axes, title=f"${matrix}$" if kind == "gradient" else "", yscale="log")
            axes.set_xlabel("pair of checkpoints" if kind == "update" else "")
        row[0].set_ylabel(f"relative {kind} norm")
    colours = ScalarMappable(steps, ListedColormap(shades))
    figure.colorbar(colours, ax=panels, label="layer", ticks=list(range(1, count + 1, -(-count // 9))))
    figure.suptitle(f"Encoder self-attention between {result.checkpoints[0]} and {result.checkpoints[-1]}")
    return _finished(figure, path)

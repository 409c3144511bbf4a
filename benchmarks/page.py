"""Makes docs/performance.md from the JSON of the benchmarks in docs/performance/: python -m benchmarks.page"""

import json
import statistics
from pathlib import Path
from typing import Any

from admin_hf.checkpoints import write_whole

from . import BENCHMARKS, load


DOCS = Path(__file__).parents[1] / "docs"


def markdown(folder: Path = DOCS) -> str:
    """The text of performance.md: its introduction, and a section for each benchmark that was run."""
    lines = [(folder / "performance_intro.md").read_text(encoding="utf-8").rstrip(), ""]
    for name in BENCHMARKS:
        path = folder / "performance" / f"{name}.json"
        if path.exists():
            lines += section(name, json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(lines)


def section(name: str, results: dict[str, Any]) -> list[str]:
    """A benchmark's figures, and what else its module has to say."""
    benchmark = load(name)
    lines = [f"## {benchmark.TITLE}", "", benchmark.ABOUT, "", *table(results["figures"]), ""]
    if hasattr(benchmark, "more"):
        lines += [benchmark.more(results), ""]
    return [*lines, _conditions(results), ""]


def table(figures: list[dict[str, Any]]) -> list[str]:
    rows = ["| | A | B | A : B | target | met |", "| --- | --- | --- | ---: | ---: | --- |"]
    for figure in figures:
        median = statistics.median(figure["ratios"])
        cells = [figure["what"], figure["a"], figure["b"], _ratio(figure["ratios"]), *_target(figure, median)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _ratio(ratios: list[float]) -> str:
    median = statistics.median(ratios)
    digits = 4 if 1 <= median < 1.1 else 3  # a cost of 1.7% is 1.017
    spread = f" ({min(ratios):.3g}–{max(ratios):.3g})" if len(ratios) > 1 else ""
    return f"**{median:.{digits}g}**{spread}"


def _target(figure: dict[str, Any], median: float) -> tuple[str, str]:
    if "at_least" in figure:
        return f"≥ {figure['at_least']:g}", "yes" if median >= figure["at_least"] else "no"
    if "at_most" in figure:
        return f"≤ {figure['at_most']:g}", "yes" if median <= figure["at_most"] else "no"
    return "", ""


def _conditions(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    processors = ", ".join(results[name] for name in ("gpu", "processor") if name in results)
    return f"{processors}, threads: {results['threads']}, rounds: {results['rounds']}; {versions}."


def main(folder: Path = DOCS) -> None:
    """Write performance.md, and the drawings of the benchmarks that have one."""
    for name in BENCHMARKS:
        path = folder / "performance" / f"{name}.json"
        if path.exists() and hasattr(benchmark := load(name), "draw"):
            benchmark.draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
    write_whole(folder / "performance.md", markdown(folder))


if __name__ == "__main__":
    main()

"""docs/experiments.md with its figures and numbers, made of what the runs recorded."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from admin_hf.analysis.drawing import COLOUR_MAP, add_lines, new_figure, plain_axes, save_figure, write_file
from admin_hf.monitoring import perplexity

from ..errors import InputError
from .claims import Cell, Claim, Table
from .plan import EXPERIMENTS, planned
from .records import Record, collect, from_json, to_json
from .scales import REPO, SCALES, Run, Scale, settings


DOCS = REPO / "docs"


def update(seeds: Sequence[int] = ()) -> None:
    """Keep what the runs recorded in docs/experiments/, then make the page and the figures that have changed.

    Args:
        seeds: to look for beside those that are planned or recorded.
    """
    sections, overview = [], []
    for name, experiment in EXPERIMENTS.items():
        path = DOCS / "experiments" / f"{name}.json"
        before = from_json(path.read_text(encoding="utf-8")) if path.exists() else {}
        records: dict[str, Record] = {}
        sections += ["", f"## {experiment.title}", "", experiment.paper]
        for scale in SCALES.values():
            own = planned(name, scale)
            others = {*seeds, *(record.arguments["seed"] for record in before.values())} - {*map(seed_of, own)}
            more = planned(name, scale, sorted(others)) if others else []
            here = _records([*own, *more], before)
            runs = own + [run for run in more if run.name in here]
            if here or scale.name == "cpu":
                changed = here != {run: before.get(run) for run in here}
                lines, summary = section(name, scale, runs, here, redraw=changed)
                sections += ["", *lines]
                link = f"[{experiment.title}](#{_anchor(experiment.title)})"
                overview.append(f"| {link} | {scale.name} | {len(here)} of {len(runs)} | {summary} |")
            records |= here
        if records != before:
            write_file(path, to_json(records).encode())
    intro = (DOCS / "experiments_intro.md").read_text(encoding="utf-8").rstrip()
    header = ["| experiment | scale | runs done | the paper's claims |", "| --- | --- | ---: | --- |"]
    write_file(DOCS / "experiments.md", "\n".join([intro, "", *header, *overview, *sections, ""]).encode())


def section(
    name: str, scale: Scale, runs: Sequence[Run], records: dict[str, Record], redraw: bool
) -> tuple[list[str], str]:
    """The text on an experiment at a scale, and its outcome in a few words; draws its figure."""
    experiment, table = EXPERIMENTS[name], make_table(runs, records)
    verdicts = [claim.verdict(table) for claim in experiment.claims]
    known = [holds for holds, _ in verdicts if holds is not None]
    summary = f"{sum(known)} of {len(known)} reproduced" if known else "cannot be judged yet"
    summary += f", {len(verdicts) - len(known)} open" if 0 < len(known) < len(verdicts) else ""
    done = f"{len(records)} of {len(runs)} runs are done"
    lines = [f"`python -m training.experiments {name} --scale {scale.name}`: {done}. {settings(runs)}"]
    lines += ["", *_verdicts(experiment.claims, verdicts), "", *markdown(table)]
    if records:
        figure = DOCS / "figures" / f"experiments-{name}{'' if scale.name == 'cpu' else f'-{scale.name}'}.png"
        lines += ["", f"![{experiment.title}](figures/{figure.name})"]
        if redraw or not figure.exists():
            draw = draw_map if experiment.is_grid else draw_curves
            caption = f"Paper: {experiment.paper}\nHere, at scale {scale.name}: {done}; claims: {summary}."
            draw(table, figure, experiment.title, caption)
    return lines, summary


def seed_of(run: Run) -> int:
    return run.arguments["seed"]


def _records(runs: Iterable[Run], before: dict[str, Record]) -> dict[str, Record]:
    """What is recorded of runs that are done: in their folders, or else before, with the same arguments."""
    records = {}
    for run in runs:
        try:
            record = collect(run)
        except InputError as error:
            print(f"Left out: {error}", file=sys.stderr)
            record = None
        record = record or before.get(run.name)
        if record is not None and record.arguments == run.arguments:
            records[run.name] = record
    return records


def make_table(runs: Iterable[Run], records: dict[str, Record]) -> Table:
    """Put the records of all seeds into the cells of the table, and count what is planned."""
    table: dict[Cell, tuple[list[Record], int]] = {}
    for run in runs:
        there, count = table.get((run.row, run.column), ([], 0))
        there += [records[run.name]] if run.name in records else []
        table[run.row, run.column] = there, count + 1
    return table


def axes(table: Table) -> tuple[list[str], list[str]]:
    """The rows and columns of a table, in their order."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*table, strict=True))
    return rows, columns


# --- text -----------------------------------------------------------------------------------------


def _verdicts(claims: Sequence[Claim], verdicts: Sequence[tuple[bool | None, str]]) -> list[str]:
    words = {True: "**reproduced**", False: "**not reproduced at this scale**", None: "open"}
    return [f"- {claim.text}: {words[holds]} ({why})." for claim, (holds, why) in zip(claims, verdicts, strict=True)]


def markdown(table: Table) -> list[str]:
    """The table: development perplexity, and BLEU where there is one, mean and standard deviation over seeds."""
    rows, columns = axes(table)
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for row in rows:
        texts = [describe(*table[row, column]) if (row, column) in table else "" for column in columns]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return lines


def describe(records: Sequence[Record], wanted: int) -> str:
    """What a cell says: the runs that trained, and how many failed."""
    if not records:
        return "…"
    trained = [record for record in records if not record.failed]
    parts = []
    if trained:
        parts.append(_spread([perplexity(record.final_loss) for record in trained]))
        if bleu := [record.bleu for record in trained if record.bleu is not None]:
            parts.append(f"{_spread(bleu)} BLEU")
    if failed := [record for record in records if record.failed]:
        diverged = sorted(record.diverged_at for record in failed if record.diverged_at is not None)
        ends = [f"diverged at update {', '.join(map(str, diverged))}"] if diverged else []
        if stuck := [perplexity(record.final_loss) for record in failed if record.loss is not None]:
            ends.append(f"ended at {_spread(stuck)}")
        many = f" {len(failed)} of {len(records)}" if len(records) > 1 else ""
        parts.append(f"**failed**{many}: {', '.join(ends)}")
    if len(records) < wanted:
        parts.append(f"({len(records)} of {wanted} runs)")
    return "; ".join(parts)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _anchor(title: str) -> str:
    """GitHub's anchor of a heading."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")


# --- figures --------------------------------------------------------------------------------------


def draw_curves(table: Table, path: Path, title: str, caption: str) -> None:
    """Development perplexity by update, a panel for each column and a line for each row: the mean over seeds."""
    columns = [column for column in axes(table)[1] if any(table[cell][0] for cell in table if cell[1] == column)]
    figure = new_figure(width=max(6, 3.4 * len(columns)) + 2, height=4, caption=caption)  # 2 for the legend
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        records = {row: table[row, column][0] for row, other in table if other == column}
        add_lines(panel, {row: mean_curve(there) for row, there in records.items()})
        if all_records := [record for there in records.values() for record in there]:
            blind = perplexity(all_records[0].blind_loss)
            panel.axhline(blind, color="#666666", linewidth=0.8, linestyle=":", label="blind guess")
        plain_axes(panel, title=column, xlabel="updates", yscale="log")
    panels[0].set_ylabel("development perplexity")
    lines = {line.get_label(): line for panel in panels for line in panel.get_legend_handles_labels()[0]}
    if lines:
        figure.legend(handles=list(lines.values()), loc="outside right upper", frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


def mean_curve(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Updates that all runs evaluated at, and the perplexity of their mean loss there."""
    curves = [dict(map(tuple, record.eval_loss)) for record in records]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
    return steps, [perplexity(mean(curve[step] for curve in curves)) for step in steps]


def draw_map(table: Table, path: Path, title: str, caption: str) -> None:
    """The table in colours: development loss, and where runs failed."""
    rows, columns = axes(table)
    figure = new_figure(width=7, height=0.4 * len(rows) + 2, caption=caption)
    panel = figure.add_subplot()
    values = [[_map_value(table.get((row, column), ([], 0))[0]) for column in columns] for row in rows]
    image = panel.imshow(values, cmap=COLOUR_MAP, aspect="auto")
    panel.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows, title=title)
    panel.set_xlabel("learning rate")
    figure.colorbar(image, label="development loss")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if records := table.get((row, column), ([], 0))[0]:
                value = values[y][x]
                text = "failed" if any(record.failed for record in records) else f"{value:.2f}"
                dark = value < image.norm.vmin + 0.5 * (image.norm.vmax - image.norm.vmin)
                panel.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    save_figure(figure, path)


def _map_value(records: Sequence[Record]) -> float:
    """The mean loss; a run that failed has learnt no more than a blind one."""
    if not records:
        return float("nan")
    return mean(record.blind_loss if record.failed else record.final_loss for record in records)

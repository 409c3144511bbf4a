"""docs/experiments.md with its figures and numbers, made of what the runs recorded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from admin_hf.analysis.drawing import COLOUR_MAP, add_lines, new_figure, plain_axes, save_figure
from admin_hf.checkpoints import write_whole
from admin_hf.monitoring import perplexity

from .claims import Cell, Claim, Table
from .plan import EXPERIMENTS, planned
from .records import Record, kept, known, to_json
from .scales import REPO, SCALES, PlannedRun, Scale, settings
from .translations import SAMPLES, Comparison
from .translations import update as update_comparisons


DOCS = REPO / "docs"
PANELS = 5  # of a figure, beside each other


def update(seeds: Sequence[int] = ()) -> None:
    """Keep what the runs recorded in docs/experiments/, then make the page and the figures that have changed.

    Args:
        seeds: to look for beside those that are planned or recorded.
    """
    sections, overview = [], []
    for name, experiment in EXPERIMENTS.items():
        path = DOCS / "experiments" / f"{name}.json"
        before = kept(name)
        records: dict[str, Record] = {}
        sections += ["", f"## {experiment.title}", "", experiment.paper]
        for scale in (SCALES[name] for name in experiment.scales):
            own = planned(name, scale)
            others = {*seeds, *(record.arguments["seed"] for record in before.values())} - {*map(seed_of, own)}
            more = planned(name, scale, sorted(others)) if others else []
            here = known([*own, *more], before)
            runs = own + [run for run in more if run.name in here]
            if here or scale.name == experiment.scales[0]:
                changed = here != {run: before.get(run) for run in here}
                lines, summary = section(name, scale, runs, here, redraw=changed)
                sections += ["", *lines]
                link = f"[{experiment.title}](#{_anchor(experiment.title)})"
                done = sum(not record.begun for record in here.values())
                overview.append(f"| {link} | {scale.name} | {done} of {len(runs)} | {summary} |")
            records |= here
        if records != before:
            write_whole(path, to_json(records))
    intro = (DOCS / "experiments_intro.md").read_text(encoding="utf-8").rstrip()
    header = ["| experiment | scale | runs done | the paper's claims |", "| --- | --- | ---: | --- |"]
    write_whole(DOCS / "experiments.md", "\n".join([intro, "", *header, *overview, *sections, ""]))


def section(
    name: str, scale: Scale, runs: Sequence[PlannedRun], records: dict[str, Record], redraw: bool
) -> tuple[list[str], str]:
    """The text on an experiment at a scale, and its outcome in a few words; draws its figure."""
    experiment = EXPERIMENTS[name]
    command = f"`python -m training.experiments {name} --scale {scale.name}`"
    ended = {run: record for run, record in records.items() if not record.begun}
    table = make_table(runs, ended)
    verdicts = [claim.verdict(table) for claim in experiment.claims]
    claims = _verdicts(experiment.claims, verdicts)
    if not runs:
        return [f"{command}: the runs are known when dropout is chosen.", "", *claims], "cannot be judged yet"
    known = [holds for holds, _ in verdicts if holds is not None]
    summary = f"{sum(known)} of {len(known)} reproduced" if known else "cannot be judged yet"
    summary += f", {len(verdicts) - len(known)} open" if 0 < len(known) < len(verdicts) else ""
    done = f"{len(ended)} of {len(runs)} runs are done"
    lines = [f"{command}: {done}. {settings(runs)}"]
    if experiment.outcome:
        claims = [f"- {sentence}" for sentence in experiment.outcome(scale, records)]
        summary = f"{len(claims)} chosen" if claims else "not chosen yet"
    lines += ["", *claims] if claims else []
    lines += ["", *(loss_list if experiment.lists_losses else markdown)(table)]
    if experiment.reference:
        path = DOCS / "experiments" / f"{name}-comparisons.json"
        found = update_comparisons(path, path.parent / "translations", runs, ended, experiment.reference)
        lines += _comparisons(runs, ended, found, experiment.reference)
    lines += _under_way(runs, records)
    if ended:
        first = scale.name == experiment.scales[0]
        figure = DOCS / "figures" / f"experiments-{name}{'' if first else f'-{scale.name}'}.png"
        lines += ["", f"![{experiment.title}](figures/{figure.name})"]
        if redraw or not figure.exists():
            draw = draw_map if experiment.is_grid else draw_losses if experiment.lists_losses else draw_curves
            text = experiment.paper if experiment.paper.startswith("Not of") else f"Paper: {experiment.paper}"
            caption = f"{text}\nHere, at scale {scale.name}: {done}; claims: {summary}."
            draw(table, figure, experiment.title, caption)
    return lines, summary


def seed_of(run: PlannedRun) -> int:
    return run.arguments["seed"]


def make_table(runs: Iterable[PlannedRun], records: dict[str, Record]) -> Table:
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


def _comparisons(
    runs: Sequence[PlannedRun], records: Mapping[str, Record], comparisons: Mapping[str, Comparison], reference: str
) -> list[str]:
    """How BLEU was computed, and the test of each seed's difference to the reference's."""
    scores = [record.scores for record in records.values() if "test_bleu_signature" in record.scores]
    if not scores:
        return []
    signatures = dict.fromkeys(str(there["test_bleu_signature"]) for there in scores)
    lines = ["", f"BLEU: {', '.join(f'`{signature}`' for signature in signatures)}, of the test set."]
    cells: dict[Cell, list[str]] = {}
    for run in runs:
        if comparison := comparisons.get(run.name):
            text = f"{comparison.difference:+.2f} (p {comparison.p_value:.3f})"
            cells.setdefault((run.row, run.column), []).append(text)
    if cells:
        lines[-1] += (
            f" Difference to {reference} of the same seed, with p by a paired bootstrap of {SAMPLES:,} resamples:"
        )
        lines += ["", *(f"- {column}, {row}: {', '.join(texts)}" for (row, column), texts in cells.items())]
    return lines


def _under_way(runs: Sequence[PlannedRun], records: Mapping[str, Record]) -> list[str]:
    lines = []
    for run in runs:
        if (record := records.get(run.name)) and record.begun and record.eval_loss:
            update, loss = record.eval_loss[-1]
            lines.append(f"- {run.row}, {run.column}, seed {seed_of(run)}: loss {loss:.3f} after update {update:,.0f}")
    return ["", "Under way:", "", *lines] if lines else []


def markdown(table: Table) -> list[str]:
    """The table: development perplexity, and BLEU where there is one, mean and standard deviation over seeds."""
    rows, columns = axes(table)
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for row in rows:
        texts = [describe(*table[row, column]) if (row, column) in table else "" for column in columns]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return lines


def loss_list(table: Table) -> list[str]:
    """The table of losses at the end, a line for each cell: mean and standard deviation over seeds, ω of the first."""
    lines = [
        "| model, initialisation | system | training loss | validation loss | ω at the start | runs that failed |"
    ]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    rows, columns = axes(table)
    for column in columns:
        for row in rows:
            records, wanted = table.get((row, column), ([], 0))
            if not wanted:
                continue
            cells = ["…"] * 4
            if records:
                losses = [[r.train_loss[-1][1] for r in records], [record.final_loss for record in records]]
                omega = " to ".join(f"{value:.2f}" for value in records[0].omega)
                failed = sum(record.failed for record in records)
                cells = [*map(_spread, losses), omega, f"{f'**{failed}**' if failed else 0} of {len(records)}"]
                cells[-1] += f" ({wanted} are planned)" if len(records) < wanted else ""
            lines.append(f"| {column} | {row} | {' | '.join(cells)} |")
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
        development = [float(record.scores["eval_bleu"]) for record in trained if "test_bleu" in record.scores]
        if development:
            parts[-1] += f" (development: {_spread(development)})"
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
    digits = 2 if mean(values) < 10 else 1
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _anchor(title: str) -> str:
    """GitHub's anchor of a heading."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")


# --- figures --------------------------------------------------------------------------------------


def draw_losses(table: Table, path: Path, title: str, caption: str) -> None:
    """As [`draw_curves`], of the validation loss."""
    draw_curves(table, path, title, caption, value=float, label="validation loss", yscale="linear")


def draw_curves(
    table: Table,
    path: Path,
    title: str,
    caption: str,
    value: Callable[[float], float] = perplexity,
    label: str = "development perplexity",
    yscale: str = "log",
) -> None:
    """Development perplexity by update, a panel for each column and a line for each row: the mean over seeds."""
    columns = [column for column in axes(table)[1] if any(table[cell][0] for cell in table if cell[1] == column)]
    wide, high = min(len(columns), PANELS), -(-len(columns) // PANELS)
    figure = new_figure(width=max(6, 3.4 * wide) + 2, height=4 * high, caption=caption)  # 2 for the legend
    panels = figure.subplots(high, wide, sharey=True, squeeze=False).ravel()
    for panel in panels[len(columns) :]:
        panel.remove()
    panels = panels[: len(columns)]
    for panel, column in zip(panels, columns, strict=True):
        records = {row: table[row, column][0] for row, other in table if other == column}
        add_lines(panel, {row: mean_curve(there, value) for row, there in records.items()})
        if all_records := [record for there in records.values() for record in there]:
            blind = value(all_records[0].blind_loss)
            panel.axhline(blind, color="#666666", linewidth=0.8, linestyle=":", label="blind guess")
        plain_axes(panel, title=column, xlabel="updates", yscale=yscale)
    for panel in panels[::PANELS]:
        panel.set_ylabel(label)
    lines = {line.get_label(): line for panel in panels for line in panel.get_legend_handles_labels()[0]}
    if lines:
        figure.legend(handles=list(lines.values()), loc="outside right upper", frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


def mean_curve(
    records: Sequence[Record], value: Callable[[float], float] = perplexity
) -> tuple[list[float], list[float]]:
    """Updates that all runs evaluated at, and the perplexity (or another value) of their mean loss there."""
    curves = [dict(map(tuple, record.eval_loss)) for record in records]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
    return steps, [value(mean(curve[step] for curve in curves)) for step in steps]


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

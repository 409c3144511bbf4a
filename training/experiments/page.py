"""docs/experiments.md with its figures and numbers, made of what the runs recorded."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from admin_hf.analysis.drawing import COLOUR_MAP, add_lines, new_figure, plain_axes, save_figure
from admin_hf.checkpoints import write_whole
from admin_hf.monitoring import perplexity

from .claims import ONE_SEED, WITHIN_NOISE, Cell, Claim, Holds, Table
from .plan import EXPERIMENTS, planned
from .preparation import with_blind_training_loss
from .records import COLLAPSED, DIVERGED, OUTCOMES, STALLED, Record, kept, known, to_json
from .scales import REPO, SCALES, PlannedRun, Scale, settings
from .tables import axes, loss_list, make_table, markdown
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
    ended: dict[str, tuple[PlannedRun, Record]] = {}
    for name, experiment in EXPERIMENTS.items():
        path = DOCS / "experiments" / f"{name}.json"
        before = kept(name)
        records: dict[str, Record] = {}
        sections += ["", f"## {experiment.title}", "", experiment.paper]
        for scale in (SCALES[name] for name in experiment.scales):
            runs, here = _recorded(name, scale, {*seeds, *map(seed_of, before.values())})
            if here or scale.name == experiment.scales[0]:
                changed = here != {run: before.get(run) for run in here}
                lines, summary = section(name, scale, runs, here, redraw=changed)
                sections += ["", *lines]
                link = f"[{experiment.title}](#{_anchor(experiment.title)})"
                done = {run.name: (run, here[run.name]) for run in runs if _has_ended(here.get(run.name))}
                overview.append(f"| {link} | {scale.name} | {len(done)} of {len(runs)} | {summary} |")
                ended |= done
            records |= here
        if records != before:
            write_whole(path, to_json(records))
    intro = (DOCS / "experiments_intro.md").read_text(encoding="utf-8").rstrip()
    header = ["| experiment | scale | runs done | the paper's claims |", "| --- | --- | ---: | --- |"]
    lines = [intro, "", how_runs_ended(ended.values()), "", *header, *overview, *sections, ""]
    write_whole(DOCS / "experiments.md", "\n".join(lines))


def _recorded(name: str, scale: Scale, seeds: set[int]) -> tuple[list[PlannedRun], dict[str, Record]]:
    """The runs of an experiment at a scale, those of further seeds where there are any, and what is recorded.

    Runs that it shares with others may be recorded there.
    """
    own = planned(name, scale)
    others = seeds - {*map(seed_of, own)}
    more = planned(name, scale, sorted(others)) if others else []
    records = known([*own, *more], kept(*EXPERIMENTS[name].shares_with, name))
    here = {run: with_blind_training_loss(record) for run, record in records.items()}
    return own + [run for run in more if run.name in here], here


def _has_ended(record: Record | None) -> bool:
    return record is not None and not record.begun


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
    summary = summarise([holds for holds, _ in verdicts])
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


def seed_of(run: PlannedRun | Record) -> int:
    return run.arguments["seed"]


# --- text -----------------------------------------------------------------------------------------


def how_runs_ended(ended: Iterable[tuple[PlannedRun, Record]]) -> str:
    """How many runs there are of each outcome, each run counted once, and how often dropout makes the difference."""
    runs, records = ([*column] for column in zip(*ended, strict=True)) if (ended := [*ended]) else ([], [])
    outcomes = Counter(record.outcome for record in records)
    watched = sum(run.program == "run_translation" for run in runs)
    text = f"**{outcomes[DIVERGED]} of {watched}** runs of run_translation.py tripped its detector of divergence."
    if ends := ", ".join(f"{outcomes[word]} {word}" for word in OUTCOMES if outcomes[word]):
        text += f" Of all {len(records)} runs that have ended, each counted once: {ends}."
    apart = [(record, record.training_distance) for record in records]
    worse = Counter(record.outcome for record, there in apart if there is not None and record.distance > there + 1)
    if worse:
        words = " and ".join(f"{worse[word]} {word}" for word in (STALLED, COLLAPSED) if worse[word])
        text += f" With dropout off, {worse.total()} of them ({words}) end more than 1 nat further above the blind"
        text += " guess than in training."
    return text


def summarise(outcomes: Sequence[Holds]) -> str:
    """How many claims are reproduced, and what can be said of the others."""
    decided = [holds for holds in outcomes if holds is not None]
    if not decided:
        return "cannot be judged yet"
    words = [f"{decided.count(True)} of {len(decided)} reproduced"]
    words += [f"{decided.count(word)} {word}" for word in (ONE_SEED, WITHIN_NOISE) if word in decided]
    words += [f"{len(outcomes) - len(decided)} open"] if len(decided) < len(outcomes) else []
    return ", ".join(words)


def _verdicts(claims: Sequence[Claim], verdicts: Sequence[tuple[Holds, str]]) -> list[str]:
    words: dict[Holds, str] = {True: "**reproduced**", False: "**not reproduced at this scale**", None: "open"}
    lines = []
    for claim, (holds, why) in zip(claims, verdicts, strict=True):
        lines.append(f"- {claim.text}: {words.get(holds, f'**{holds}**')} ({why}).")
    return lines


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
    """The table in colours: development loss, and how runs ended that failed."""
    rows, columns = axes(table)
    figure = new_figure(width=7, height=0.4 * len(rows) + 2, caption=caption)
    panel = figure.add_subplot()
    values = [[_map_value(table.get((row, column), ([], 0))[0]) for column in columns] for row in rows]
    image = panel.imshow(values, cmap=COLOUR_MAP, aspect="auto")
    panel.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows, title=title)
    figure.colorbar(image, label="development loss")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if records := table.get((row, column), ([], 0))[0]:
                value = values[y][x]
                failed = {record.outcome.split()[0]: None for record in records if record.failed}
                text = " ".join(failed) or f"{value:.2f}"
                dark = value < image.norm.vmin + 0.5 * (image.norm.vmax - image.norm.vmin)
                panel.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    save_figure(figure, path)


def _map_value(records: Sequence[Record]) -> float:
    """The mean loss; a run that failed has learnt no more than a blind one."""
    if not records:
        return float("nan")
    return mean(record.blind_loss if record.failed else record.final_loss for record in records)

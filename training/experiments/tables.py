"""The tables of an experiment: what became of the runs of each cell."""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

from admin_hf.monitoring import perplexity

from .claims import Cell, Table
from .records import COLLAPSED, DIVERGED, OUTCOMES, STALLED, TRAINED, Record
from .scales import PlannedRun


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
    lines = ["| model, initialisation | system | training loss | validation loss | ω at the start | how runs ended |"]
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
                ends = [f"{len(there)} {_bold(word)} ({_distances(there)})" for word, there in _by_outcome(records)]
                ends += [f"({wanted} are planned)"] if len(records) < wanted else []
                cells = [*map(_spread, losses), omega, " ".join(ends)]
            lines.append(f"| {column} | {row} | {' | '.join(cells)} |")
    return lines


def dropout_list(table: Table) -> list[str]:
    """Losses at the end by the stacks with dropout on, of the cells with runs that failed."""
    lines = ["| runs that failed | dropout off | in the encoder | in the decoder | in both | blind guess |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for (row, column), (records, _) in table.items():
        if there := [record for record in records if record.failed and record.dropout_losses]:
            by_stack = zip(*(record.dropout_losses.values() for record in there), strict=True)
            cells = [_spread(losses) for losses in by_stack]
            lines.append(f"| {row}, {column} | {' | '.join(cells)} | {there[0].blind_loss:.2f} |")
    return lines if len(lines) > 2 else []


def describe(records: Sequence[Record], wanted: int) -> str:
    """What a cell says: for each outcome the runs that ended so, and how far from the blind guess, in nats."""
    if not records:
        return "…"
    parts = []
    for outcome, there in _by_outcome(records):
        many = f" {len(there)} of {len(records)}" if len(records) > 1 else ""
        parts.append(_trained(there) if outcome == TRAINED else f"{_bold(outcome)}{many}: {_distances(there)}")
    if len(records) < wanted:
        parts.append(f"({len(records)} of {wanted} runs)")
    return "; ".join(parts)


def _by_outcome(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """The records of each outcome that there is."""
    groups = [(outcome, [record for record in records if record.outcome == outcome]) for outcome in OUTCOMES]
    return [(outcome, there) for outcome, there in groups if there]


def _bold(outcome: str) -> str:
    return outcome if outcome == TRAINED else f"**{outcome}**"


def _trained(records: Sequence[Record]) -> str:
    """Perplexity, distance and BLEU of runs that trained."""
    text = f"{_spread([perplexity(record.final_loss) for record in records])} ({_distances(records)})"
    if bleu := [record.bleu for record in records if record.bleu is not None]:
        text += f"; {_spread(bleu)} BLEU"
    development = [float(record.scores["eval_bleu"]) for record in records if "test_bleu" in record.scores]
    return text + f" (development: {_spread(development)})" if development else text


def _distances(records: Sequence[Record]) -> str:
    """How far runs of one outcome end from the loss that they must be below, in the mean; when, if they diverged."""
    outcome = records[0].outcome
    if outcome == DIVERGED:
        return f"at update {', '.join(str(record.diverged_at) for record in sorted(records, key=_update))}"
    text = f"{mean(record.distance for record in records):+.2f}"
    if outcome in (STALLED, COLLAPSED):
        training = mean(record.training_distance or 0.0 for record in records)
        return f"{training:+.2f} in training, {text} with dropout off"
    return text


def _update(record: Record) -> int:
    return record.diverged_at or 0


def _spread(values: Sequence[float]) -> str:
    digits = 2 if mean(values) < 10 else 1
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

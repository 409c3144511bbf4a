"""What the paper claims of the runs of an experiment, and whether what was recorded shows it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf, isfinite, isnan, nan, sqrt
from operator import eq, lt
from statistics import mean, stdev

from .records import OUTCOMES, TRAINED, Record


# Row and column in a table. In a claim both may be patterns such as "Admin*".
Cell = tuple[str, str]
# The records of a table's cells, those of the seeds that are done, and how many are planned.
Table = Mapping[Cell, tuple[Sequence[Record], int]]

# What the records show of a claim: that it holds or not, why they cannot tell, or None while runs are missing
Holds = bool | str | None
WITHIN_NOISE, ONE_SEED = "within noise", "seen with one seed"


@dataclass(frozen=True)
class Claim:
    """A sentence that records can bear out.

    Attributes:
        text: the sentence.
        cells: which cells of the table it is about.
        check: takes the records of the cells that each pattern selects; returns whether the claim holds and numbers.
    """

    text: str
    cells: tuple[Cell, ...]
    check: Callable[..., tuple[Holds, str]]

    def verdict(self, table: Table) -> tuple[Holds, str]:
        """Whether the claim holds, and the numbers. With one seed of each cell it is seen at most, not reproduced."""
        selected = [[table[cell] for cell in table if all(map(fnmatchcase, cell, pattern))] for pattern in self.cells]
        cells = [cell for group in selected for cell in group]
        done, wanted = sum(len(records) for records, _ in cells), sum(planned for _, planned in cells)
        if done < wanted or not all(selected):
            return None, f"not run yet: {done} of {wanted} runs are done"
        holds, numbers = self.check(*([records for records, _ in group] for group in selected))
        if max(len(records) for records, _ in cells) == 1 and isinstance(holds, bool):
            return ONE_SEED if holds else False, f"{numbers}; one seed"
        return holds, numbers


Groups = Sequence[Sequence[Record]]  # the records of each cell


def fail(text: str, cells: Cell) -> Claim:
    """All runs fail."""
    return _failing(text, cells, eq)


def train(text: str, cells: Cell) -> Claim:
    """No run fails."""
    return _failing(text, cells, lambda failed, _: failed == 0)


def fail_somewhere(text: str, cells: Cell) -> Claim:
    """At least one run fails."""
    return _failing(text, cells, lambda failed, _: failed > 0)


def _failing(text: str, cells: Cell, holds: Callable[[int, int], bool]) -> Claim:
    """A claim on how many runs fail, of how many.

    A cell's losses must be further than two standard errors from the threshold, or the claim is within noise.
    """

    def check(groups: Groups) -> tuple[Holds, str]:
        records = [record for group in groups for record in group]
        outcomes = Counter(record.outcome for record in records)
        losses = [record.loss for record in records if record.loss is not None]
        ends = [f"{outcomes[word]} {word}" for word in OUTCOMES if outcomes[word]]
        numbers = f"{len(records)} run{'s' * (len(records) > 1)}: {', '.join(ends)}"
        if losses:
            blind = records[0].blind_loss - records[0].margin
            numbers += f"; losses {min(losses):.2f} to {max(losses):.2f}, threshold {blind:.2f}"
        if any(map(_is_near_the_threshold, groups)):
            return WITHIN_NOISE, numbers
        return holds(len(records) - outcomes[TRAINED], len(records)), numbers

    return Claim(text, (cells,), check)


def _is_near_the_threshold(records: Sequence[Record]) -> bool:
    """Whether the seeds of a cell end, in the mean, less than two standard errors from the loss that failing means."""
    distances = [record.distance for record in records]
    if len(records) < 2 or not all(map(isfinite, distances)):
        return False
    return abs(mean(distances)) <= 2 * stdev(distances) / sqrt(len(distances))


def lower(text: str, one: Cell, other: Cell, early: bool = False) -> Claim:
    """The mean development loss of `one` is lower than that of `other`, by more than two standard errors.

    With `early`, at the first evaluation after warm-up, else at the end. Where runs failed (with `early`: before it)
    there is no mean: the claim then holds if all of `other` failed and none of `one`.
    """
    if early:
        return Claim(text, (one, other), _means(_early_loss, lambda record: not isfinite(_early_loss(record)), "loss"))
    return Claim(text, (one, other), _means(lambda record: record.final_loss, lambda record: record.failed, "loss"))


def score_higher(text: str, one: Cell, other: Cell) -> Claim:
    """The mean BLEU of `one` is higher than that of `other`, by more than two standard errors.

    It is that of the test set or, where the runs do not translate it, of the development set.

    Where runs failed, as for [`lower`].
    """
    return Claim(text, (one, other), _means(lambda record: record.bleu, lambda record: record.failed, "BLEU", sign=1))


def _means(
    value: Callable[[Record], float], has_failed: Callable[[Record], bool], name: str, sign: int = -1
) -> Callable[[Groups, Groups], tuple[Holds, str]]:
    """Checks whether the mean of a value is lower (`sign` −1) or higher (1) by more than two standard errors."""

    def check(ones: Groups, others: Groups) -> tuple[Holds, str]:
        one, other = ([record for group in groups for record in group] for groups in (ones, others))
        if any(map(has_failed, (*one, *other))):
            failed = [sum(map(has_failed, records)) for records in (one, other)]
            numbers = f"{failed[0]} of {len(one)} runs failed against {failed[1]} of {len(other)}"
            return failed[0] == 0 and failed[1] == len(other), numbers
        a, b = (list(map(value, records)) for records in (one, other))
        difference, error = mean(a) - mean(b), standard_error(a, b)
        numbers = f"{name} {mean(a):.3f} against {mean(b):.3f}, difference {difference:+.3f}"
        if isnan(error):
            return WITHIN_NOISE, f"{numbers}, which one seed cannot tell from chance"
        numbers += f" ± {error:.3f} (standard error, {len(one)} and {len(other)} seeds)"
        if abs(difference) <= 2 * error:
            return WITHIN_NOISE, numbers
        return sign * difference > 0, numbers

    return check


def lower_in_most(text: str, ones: Cell, others: Cell) -> Claim:
    """In more than half of the cells the development loss at the end is lower than in the matching ones.

    The loss of a run that failed is lower than none.
    """

    def loss(record: Record) -> float:
        return inf if record.failed else record.final_loss

    def check(ones: Groups, others: Groups) -> tuple[bool, str]:
        a, b = ([mean(map(loss, records)) for records in groups] for groups in (ones, others))
        count = sum(map(lt, a, b))
        return count > len(a) / 2, f"in {count} of {len(a)}"

    return Claim(text, (ones, others), check)


def standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the difference of two means; nan for fewer than two values of either."""
    if min(len(a), len(b)) < 2:
        return nan
    return sqrt(stdev(a) ** 2 / len(a) + stdev(b) ** 2 / len(b))


def _early_loss(record: Record) -> float:
    warmup = record.arguments["warmup_steps"]
    return next((loss for step, loss in record.eval_loss if step > warmup), inf)

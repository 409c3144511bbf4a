"""Translations of the test set, kept beside the records, and sacreBLEU's paired bootstrap between two systems."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest

from admin_hf.checkpoints import write_whole
from admin_hf.parallel_text import read_lines
from admin_hf.run.folder import PREDICTIONS_NAME

from .. import data as parallel
from ..errors import InputError
from ..metrics import TranslationMetric
from .preparation import data_arguments
from .records import Record
from .scales import PlannedRun


SAMPLES = 1000


@dataclass(frozen=True)
class Comparison:
    """BLEU of two runs on the same test sentences.

    Attributes:
        difference: of a run to the one that it is compared with.
        p_value: by the paired bootstrap, that chance makes a difference as large.
        signature: of the scores and the test.
    """

    difference: float
    p_value: float
    signature: str


def compare(
    translations: Sequence[str], others: Sequence[str], references: Sequence[str], metric: Metric
) -> Comparison:
    """Compare translations with others of the same sentences.

    Raises:
        ValueError: there are not as many of each.
    """
    if not len(translations) == len(others) == len(references):
        raise ValueError(f"{len(translations)}, {len(others)} and {len(references)} sentences cannot be compared.")
    systems = [("reference", list(others)), ("run", list(translations))]
    signatures, scores = PairedTest(systems, {"BLEU": metric}, [list(references)], "bs", SAMPLES)()
    other, one = scores["BLEU"]
    return Comparison(round(one.score - other.score, 3), round(one.p_value, 4), str(signatures["BLEU"]))


def keep(run: PlannedRun, folder: Path) -> bool:
    """Copy what a run has translated; returns whether it was not there before."""
    path, copy = run.folder / PREDICTIONS_NAME, kept_path(run, folder)
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8")
    if copy.exists() and copy.read_text(encoding="utf-8") == text:
        return False
    write_whole(copy, text)
    return True


def kept_path(run: PlannedRun, folder: Path) -> Path:
    return folder / f"{run.name.replace('/', '-')}.txt"


def update(
    path: Path, folder: Path, runs: Iterable[PlannedRun], records: Mapping[str, Record], reference: str
) -> dict[str, Comparison]:
    """Keep the translations of runs that trained, and compare those of each with the reference's of the same seed.

    Args:
        path: the JSON file of what has been compared.
        folder: of the translations.
        records: of the runs that have ended.
        reference: the row of the runs that the others are compared with.

    Returns:
        The comparisons by the names of the runs. Where the references of the test set are not at hand, those that
        were made before.
    """
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = {name: Comparison(**values) for name, values in there.items()}
    trained = {name for name, record in records.items() if "test_bleu" in record.scores and not record.failed}
    scored = {run.name: run for run in runs if run.name in trained}
    is_new = {name: keep(run, folder) for name, run in scored.items()}
    comparisons = {}
    for name, run in scored.items():
        pair = next((other for other in scored.values() if other.row == reference and _match(other, run)), None)
        if pair is None or pair is run:
            continue
        if name in before and not is_new[name] and not is_new[pair.name]:
            comparisons[name] = before[name]
        elif references := _references(run):
            texts = [list(read_lines(kept_path(one, folder))) for one in (run, pair)]
            metric = TranslationMetric(run.arguments["lowercase"], run.arguments["target_lang"]).scorers["bleu"]
            comparisons[name] = compare(*texts, references, metric)
    if comparisons != before:
        values = {name: asdict(comparison) for name, comparison in sorted(comparisons.items())}
        write_whole(path, json.dumps(values, indent=1) + "\n")
    return comparisons


def _match(one: PlannedRun, other: PlannedRun) -> bool:
    return (one.column, one.arguments["seed"]) == (other.column, other.arguments["seed"])


def _references(run: PlannedRun) -> list[str] | None:
    model, data = data_arguments(run.arguments)
    try:
        return list(parallel.load_pairs("test", data, model)["target"])
    except InputError:
        return None

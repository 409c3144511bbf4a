"""Parallel text through `datasets`: every form becomes the columns `source` and `target`, memory-mapped and cached."""

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import datasets
import pyarrow.compute as pc
from datasets import Dataset

from admin_hf.parallel_text import TABLE_FORMATS, find_files, is_table

from . import runs
from .arguments import SPLIT_FLAGS, Arguments, DataTrainingArguments, ModelArguments
from .data_sets import checksum, load_by_name, local_tables
from .errors import InputError
from .files import TextFile, check_text, contents, load_files, place


logger = logging.getLogger(__name__)

# "train", "validation" and "test", those of them that are used; of text, one data set for each target language
Splits = dict[str, Dataset]
Texts = dict[str, dict[str, Dataset]]


def resolve_files(file: str, data: DataTrainingArguments, split: str) -> list[TextFile]:
    """Find and check what a `--{split}_file` means: one table, a source and a target file, or source text alone.

    Raises:
        InputError: nothing is there, a file is empty or no text, or the two sides differ in their number of lines.
    """
    paths = find_files(file, [data.source_lang, data.target_lang], source_only=split == "test")
    if not is_table(paths[0]) and not paths[0].exists():
        raise InputError(
            f"--{split}_file {file}: there is no {file}.{data.source_lang}. Give a file ending in "
            f"{', '.join(TABLE_FORMATS)}, or the prefix of parallel text in files ending in .{data.source_lang} and "
            f".{data.target_lang}."
        )
    files = [check_text(path) for path in paths]
    if len({side.lines for side in files}) > 1:
        source, target = files
        raise InputError(
            f"The two sides differ: {source.path} has {source.lines:,} lines and {target.path} has {target.lines:,}; "
            "line n of one must translate line n of the other."
        )
    return files


def split_files(split: str, data: DataTrainingArguments, model: ModelArguments) -> list[TextFile]:
    """The checked files of a split; none of a data set by name but for tables in a local folder.

    Raises:
        InputError: a file is missing or no text, or there is no such data set.
    """
    if data.dataset_name is None or (split == "test" and data.test_file is not None):
        return resolve_files(getattr(data, f"{split}_file"), data, split)
    return [check_text(path) for path in local_tables(split, data, model.cache_dir)]


def load_pairs(
    split: str, data: DataTrainingArguments, model: ModelArguments, files: list[TextFile] | None = None
) -> Dataset:
    """Load a split (`"train"`, `"validation"` or `"test"`): columns `source` and, but for source text, `target`.

    A missing text (null, or an empty cell of a table) counts as blank, with a warning. What the text is, is in
    `info.download_checksums`: size and SHA-256 of each file, or of the text of a data set by name.

    Args:
        files: what `split_files` has returned, where it was called before.

    Raises:
        InputError: a file, split, column or language key is missing or unreadable, or a pair to score has no target.
    """
    languages = [data.source_lang, data.target_lang]
    if files is None:
        files = split_files(split, data, model)
    if files:
        paths = [file.path for file in files]
        dataset = load_files(files, languages, split == "test", model.cache_dir, afresh=data.overwrite_cache)
        content = contents(files)
    else:
        dataset = load_by_name(split, data, model.cache_dir)
        content = {str(data.dataset_name): checksum(dataset)}

    def place_of(row: int) -> str:
        return place(paths, languages, row) if files else f"{data.dataset_name}, row {row + 1:,} of its {split} split"

    dataset = _without_nulls(_limit(dataset, split, data), split, data, place_of)
    dataset.info.download_checksums = content
    return dataset


def _without_nulls(
    dataset: Dataset, split: str, data: DataTrainingArguments, place_of: Callable[[int], str]
) -> Dataset:
    if not len(dataset):
        raise InputError(f"{data.dataset_name} has no rows in its {split} split.")
    if "target" in dataset.column_names and split != "train":
        source, target = (dataset.data.column(name) for name in ("source", "target"))
        # Null is no blank: of a blank line nothing is missing
        missing = pc.and_(target.is_null(), pc.not_equal(pc.fill_null(source, ""), ""))
        if split == "test" and target.null_count == len(target):
            dataset = dataset.remove_columns("target")
        elif pc.any(missing).as_py():
            raise InputError(
                f"{pc.sum(missing).as_py():,} of {len(dataset):,} {split} pairs have no {data.target_lang!r}, the "
                f"first is {place_of(pc.index(missing, True).as_py())}. Add what is missing, or leave out all "
                "targets of a test file."
            )
    for name, language in zip(dataset.column_names, (data.source_lang, data.target_lang), strict=False):
        column = dataset.data.column(name)
        if column.null_count:
            logger.warning(
                f"{column.null_count:,} of {len(dataset):,} {split} pairs have no {language!r}, the first is "
                f"{place_of(pc.index(column.is_null(), True).as_py())}. They count as blank."
            )
            fill = partial(_fill_nulls, column=name)
            dataset = dataset.map(fill, batched=True, features=dataset.features, desc="Filling in missing texts")
    if "target" not in dataset.column_names:
        logger.info(f"The test set has no {data.target_lang!r}: it is translated, and nothing is scored.")
    elif split != "train":
        pairs = zip(dataset["source"], dataset["target"], strict=True)
        if blank := [row for row, (source, target) in enumerate(pairs) if source.strip() and not target.strip()]:
            logger.warning(
                f"{len(blank):,} of {len(dataset):,} {split} pairs have a blank target, the first is "
                f"{place_of(blank[0])}: whatever is translated there counts as wrong."
            )
    return dataset


def _fill_nulls(batch: dict[str, list], column: str) -> dict[str, list]:
    return {column: [text or "" for text in batch[column]]}


def check_cache(model: ModelArguments) -> None:
    """Refuse a folder of the cache that cannot be written to.

    Raises:
        InputError: naming the folder.
    """
    folder = Path(model.cache_dir or datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        default = "" if model.cache_dir else ", the default of Datasets (HF_DATASETS_CACHE),"
        raise InputError(
            f"The cache folder {folder}{default} cannot be written to ({error.strerror}): name another by --cache_dir."
        ) from error


def _limit(dataset: Dataset, split: str, data: DataTrainingArguments) -> Dataset:
    option = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}[split]
    limit = getattr(data, option)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def load_data(arguments: Arguments) -> Texts:
    """Load the splits that are used, after checking the files of all of them, and that the run has begun with them.

    Raises:
        InputError: something cannot be read, is not what the run has begun with, or is to be scored in some of the
            target languages alone.
    """
    model, data, training = arguments
    check_cache(model)
    splits, targets = [split for split, flag in SPLIT_FLAGS.items() if getattr(training, flag)], data.by_target()
    files = {split: {name: split_files(split, one, model) for name, one in targets.items()} for split in splits}
    known = {split: contents([*chain.from_iterable(found.values())]) for split, found in files.items()}
    runs.check_data(arguments, {split: content for split, content in known.items() if content})
    raw = {
        split: {name: load_pairs(split, one, model, files[split][name]) for name, one in targets.items()}
        for split in splits
    }
    runs.check_data(arguments, contents_of(raw))  # with that of data sets by name, which is known now
    for split, texts in raw.items():
        missing = [name for name, dataset in texts.items() if "target" not in dataset.column_names]
        if 0 < len(missing) < len(texts):
            raise InputError(f"The {split} data have no {missing[0]!r}: add it, or leave out all target languages.")
    return raw


def contents_of(raw: Texts) -> dict[str, runs.Contents]:
    """Size and checksum of what each split was loaded from, by path or name."""
    contents_by_split: dict[str, runs.Contents] = {}
    for split, texts in raw.items():
        found = contents_by_split[split] = {}
        for language, dataset in texts.items():
            for name, content in dataset.info.download_checksums.items():
                # Of a data set by name, each target language is another text
                found[name if found.get(name, content) == content else f"{name} {language}"] = content
    return contents_by_split

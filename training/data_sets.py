"""Data sets by name: from the Hub, or a local folder, whose text must be the same as that of files."""

import csv
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetBuilder, DownloadMode, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.csv.csv import Csv

from admin_hf.checkpoints import one_line

from .arguments import DataTrainingArguments
from .errors import InputError


logger = logging.getLogger(__name__)

# What says which files a builder of Datasets reads, not how
_WHICH = ("name", "version", "data_dir", "data_files", "description")


def local_tables(split: str, data: DataTrainingArguments, cache_dir: str | None) -> list[Path]:
    """The tables of a local folder, where its card does not say how to read them; they are read as any other file.

    Raises:
        InputError: there is no such data set.
    """
    if Path(data.dataset_name).is_file():
        raise InputError(f"--dataset_name {data.dataset_name} is a file: give it as --{split}_file.")
    if not Path(data.dataset_name).is_dir():
        return []
    with _loading(split, data):
        config = load_dataset_builder(data.dataset_name, data.dataset_config_name, cache_dir=cache_dir).config
    paths = [Path(file) for file in (config.data_files or {}).get(split, [])]
    separator = getattr(config, "sep", None)
    forms = {",": {".csv"}, "\t": {".tsv"}, None: {".json", ".jsonl"}}.get(separator, set())
    which = {name: getattr(config, name) for name in _WHICH} | ({"sep": separator} if separator else {})
    if {path.suffix.lower() for path in paths} <= forms and config == type(config)(**which):
        return paths
    return []


def load_by_name(split: str, data: DataTrainingArguments, cache_dir: str | None) -> Dataset:
    """Load a split of a data set as `source` and `target`, but for a test split without target.

    Raises:
        InputError: there is no such data set, configuration, split or language, or it is no text.
    """
    name, config = data.dataset_name, data.dataset_config_name
    with _loading(split, data):
        builder, options = _find(data, cache_dir)
        if Path(name).is_dir():
            # The cache goes by options and time stamps; this option changes nothing but where that is
            files = itertools.chain.from_iterable((builder.config.data_files or {}).values())
            options |= {"description": hashlib.sha256(b"".join(map(_digest, files))).hexdigest()}
        mode = DownloadMode.REUSE_CACHE_IF_EXISTS if data.overwrite_cache else None
        dataset = load_dataset(name, config, split=split, cache_dir=cache_dir, download_mode=mode, **options)
    dataset = _as_pairs(dataset, split, data)
    if "converters" in options:
        _warn_of_line_breaks(dataset, split, data)
    return dataset


def checksum(dataset: Dataset) -> dict[str, Any]:
    """Size and SHA-256 of the text of a data set, which do not depend on where and how it is stored."""
    num_bytes, digest = 0, hashlib.sha256()
    for batch in dataset.iter(10_000):
        content = json.dumps(batch).encode()
        num_bytes += len(content)
        digest.update(content)
    return {"num_bytes": num_bytes, "checksum": digest.hexdigest()}


def _find(data: DataTrainingArguments, cache_dir: str | None) -> tuple[DatasetBuilder, dict[str, Any]]:
    """What builds the data set, and the options with which it leaves text alone."""
    # Otherwise words such as null are no text, and 007 is a number
    columns = dict.fromkeys((data.source_lang, data.target_lang), str)
    comma = {"na_filter": False, "skip_blank_lines": False, "converters": columns}
    tab = comma | {"quoting": csv.QUOTE_NONE}
    errors: list[ValueError] = []
    for options in ({}, comma, tab):
        try:
            builder = load_dataset_builder(data.dataset_name, data.dataset_config_name, cache_dir=cache_dir, **options)
        except ValueError as error:  # without a network there is the cache alone, which goes by options
            errors.append(error)
            continue
        if isinstance(builder, Csv):
            options = tab if builder.config.sep == "\t" else comma
        return builder, options
    raise errors[0]


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def _loading(split: str, data: DataTrainingArguments) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, OSError, DatasetsError) as error:
        why = one_line(error.__cause__ or error)
        raise InputError(f"The {split} split of data set {data.dataset_name} cannot be loaded: {why}") from error


def _as_pairs(dataset: Dataset, split: str, data: DataTrainingArguments) -> Dataset:
    languages = [data.source_lang, data.target_lang]
    if "translation" in dataset.column_names:
        dataset = dataset.select_columns("translation").flatten()
        dataset = dataset.rename_columns({name: name.removeprefix("translation.") for name in dataset.column_names})
    if split == "test" and data.source_lang in dataset.column_names and data.target_lang not in dataset.column_names:
        languages = [data.source_lang]
    for language in languages:
        if language not in dataset.column_names:
            found = ", ".join(map(repr, dataset.column_names))
            raise InputError(f"{data.dataset_name} has no language key {language!r}; it has {found}.")
    dataset = dataset.select_columns(languages).rename_columns(
        dict(zip(languages, ("source", "target"), strict=False))
    )
    for name, feature in dataset.features.items():
        if feature != Value("string"):
            with _loading(split, data):
                dataset = dataset.cast_column(name, Value("string"))
    return dataset


def _warn_of_line_breaks(dataset: Dataset, split: str, data: DataTrainingArguments) -> None:
    for column in dataset.column_names:
        broken = pc.match_substring_regex(dataset.data.column(column), "[\r\n]")
        if count := pc.sum(broken).as_py():
            logger.warning(
                f"{count:,} {column} cells of the {split} split of {data.dataset_name} have line breaks, the first in "
                f"row {pc.index(broken, True).as_py() + 1:,}: a stray quote makes rows part of a text."
            )

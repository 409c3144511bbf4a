"""Parallel text through `datasets`: every form becomes the columns `source` and `target`, memory-mapped and cached."""

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from operator import eq, gt
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from admin_hf.parallel_text import TABLE_FORMATS, find_files, is_blank, is_table

from .arguments import DataTrainingArguments, ModelArguments
from .data_sets import checksum, load_by_name, local_tables
from .encoding import MARKED, NAMED, REPLACED, Encoded, Encoder
from .errors import InputError
from .files import TextFile, check_text, contents, load_files, place


logger = logging.getLogger(__name__)


# --- loading ---------------------------------------------------------------------------------------


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


# --- tokenisation ---------------------------------------------------------------------------------

_IDS = Sequence(Value("int32"))  # half the disk of int64: 36 million pairs matter
_EMPTY, _LONG = 1, 2  # why a training pair is skipped
# Of each side, beside its ids: see `Encoded`
_ABOUT = {
    f"{side}_{name}": Value(kind)
    for side in ("source", "target")
    for name, kind in (("tokens", "int32"), ("unknown", "int32"), ("notes", "int8"))
}

# Shares of unknown tokens. A Chinese text has some 3 in 100 where the vocabulary lacks rare characters. A text in
# another script has 30 to 50 and more (each word is a space and an unknown token), one in the wrong case about 15
_MANY_UNKNOWN, _TOO_MANY_UNKNOWN = 0.01, 0.25


def tokenize_for_training(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataTrainingArguments, longest: int | None = None
) -> Dataset:
    """Tokenise training pairs into `input_ids`, `labels` and `length`; skip and count empty and too long ones.

    `length` is that of the longer side, and at most `longest`: what a batch can hold.

    Raises:
        InputError: no pair is left, or the tokenizer does not know the text.
    """
    limits = tuple(min(limit, longest or limit) for limit in (data.max_source_length, data.max_target_length))
    features = {"input_ids": _IDS, "labels": _IDS, "length": Value("int32"), "skip": Value("int8")}
    encode = partial(_encode_pairs, encoders=_encoders(tokenizer, data), limits=limits)
    dataset = _map(dataset, encode, Features(features | _ABOUT), data, "Tokenising the training pairs")
    skip = dataset.with_format("numpy")["skip"][:]
    kept = np.flatnonzero(skip == 0)
    empty, long = int((skip == _EMPTY).sum()), int((skip == _LONG).sum())
    summary = (
        f"{len(kept):,} of {len(skip):,} training pairs are used; skipped: {empty:,} empty on one side, {long:,} "
        f"longer than {limits[0]:,} source or {limits[1]:,} target tokens."
    )
    if not len(kept):
        given = {"--max_source_length": data.max_source_length, "--max_target_length": data.max_target_length}
        flags = dict.fromkeys(flag if limit <= (longest or limit) else "--max_tokens" for flag, limit in given.items())
        raise InputError(f"No training pair is left: {summary} Raise {' or '.join(flags)}?")
    (logger.warning if empty + long else logger.info)(summary)
    for side, share in _report(dataset, "training").items():
        if share > _TOO_MANY_UNKNOWN:
            raise InputError(
                f"The tokenizer does not know {share:.0%} of the tokens of the training {side}s, so they cannot be "
                "learnt: give a tokenizer of this language, script and case, or train a new one (without "
                "--tokenizer_name and --model_name_or_path)."
            )
    dataset = dataset.remove_columns(["skip", *_ABOUT])
    return dataset.select(kept) if empty + long else dataset


def _encode_pairs(batch: dict[str, list], encoders: dict[str, Encoder], limits: tuple[int, int]) -> dict[str, list]:
    columns, encoded = _encode(batch, encoders)
    input_ids, labels = encoded["source"].ids, encoded["target"].ids
    shortest = [len(encoder.front) + len(encoder.back) for encoder in encoders.values()]

    def skip(i: int) -> int:
        texts, lengths = (batch["source"][i], batch["target"][i]), (len(input_ids[i]), len(labels[i]))
        if any(map(is_blank, texts)) or any(map(eq, lengths, shortest)):  # some tokenizers drop what they do not know
            return _EMPTY
        return _LONG if any(map(gt, lengths, limits)) else 0

    length = [max(len(source), len(target)) for source, target in zip(input_ids, labels, strict=True)]
    skipped = [skip(i) for i in range(len(length))]
    return columns | {"input_ids": input_ids, "labels": labels, "length": length, "skip": skipped}


def tokenize_for_evaluation(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataTrainingArguments, split: str
) -> Dataset:
    """Tokenise sentences to translate, longest first so that batches hold little padding.

    Every line is kept: too long ones are cut, and counted. `index` is a line's place in the input; `source` and
    `target` stay beside the ids, because scores compare with the text itself and not with what tokens keep of it.
    """
    features = dataset.features | {"input_ids": _IDS, "cut": Value("bool"), "index": Value("int64")}
    if "target" in dataset.column_names:
        features["labels"] = _IDS
    about = {name: kind for name, kind in _ABOUT.items() if name.rpartition("_")[0] in dataset.column_names}
    limits = (data.max_source_length, data.val_max_target_length)
    encode = partial(_encode_for_evaluation, encoders=_encoders(tokenizer, data), limits=limits)
    features = Features(features | about)
    dataset = _map(dataset, encode, features, data, f"Tokenising the {split} sentences", with_indices=True)
    columns = dataset.with_format("numpy")
    if cut := int(columns["cut"][:].sum()):
        logger.warning(
            f"{cut:,} of {len(dataset):,} {split} pairs (the first is number {columns['cut'][:].argmax() + 1:,}) are "
            f"longer than --max_source_length {limits[0]} or --val_max_target_length {limits[1]} and were cut."
        )
    _report(dataset, split)
    lengths = np.array([len(ids) for ids in dataset["input_ids"]])
    return dataset.select(np.argsort(-lengths, kind="stable")).remove_columns(["cut", *about])


def _encode_for_evaluation(
    batch: dict[str, list], indices: list[int], encoders: dict[str, Encoder], limits: tuple[int, int]
) -> dict[str, list]:
    def cut_off(ids: list[list[int]], limit: int) -> tuple[list[list[int]], list[bool]]:
        cut = [len(sentence) > limit for sentence in ids]
        return [s[: limit - 1] + s[-1:] if long else s for s, long in zip(ids, cut, strict=True)], cut

    columns, encoded = _encode(batch, encoders)
    columns |= {side: [text or "" for text in batch[side]] for side in encoded} | {"index": indices}
    columns["input_ids"], columns["cut"] = cut_off(encoded["source"].ids, limits[0])
    if "target" in encoded:
        columns["labels"], target_cut = cut_off(encoded["target"].ids, limits[1])
        columns["cut"] = [source or target for source, target in zip(columns["cut"], target_cut, strict=True)]
    return columns


def _encoders(tokenizer: PreTrainedTokenizerBase, data: DataTrainingArguments) -> dict[str, Encoder]:
    return {
        "source": Encoder(tokenizer, prefix=data.source_prefix or ""),
        "target": Encoder(tokenizer, target=True),
    }


def _encode(batch: dict[str, list], encoders: dict[str, Encoder]) -> tuple[dict[str, list], dict[str, Encoded]]:
    """The sides of a batch as ids, after the columns of `_ABOUT` that belong to them."""
    encoded = {
        side: encode([text or "" for text in batch[side]]) for side, encode in encoders.items() if side in batch
    }
    columns = {}
    for side, lines in encoded.items():
        columns |= {f"{side}_{name}": getattr(lines, name) for name in ("tokens", "unknown", "notes")}
    return columns, encoded


_SAID = {
    NAMED: "hold the name of a control token, such as <s>, which is read as text. If you meant a control token "
    "before every source, give it as --source_prefix",
    REPLACED: "hold the name of a control token that this tokenizer cannot read as text, and which becomes unknown",
    MARKED: "hold a character by which this tokenizer marks words, such as ▁ (U+2581), and which it cannot keep",
}


def _report(dataset: Dataset, split: str) -> dict[str, float]:
    """Warn of lines that the tokenizer does not take as they are; returns the share of unknown tokens of each side."""
    shares = {}
    columns = dataset.with_format("numpy")
    for side in (side for side in ("source", "target") if f"{side}_notes" in dataset.column_names):
        tokens, unknown, notes = (columns[f"{side}_{name}"][:] for name in ("tokens", "unknown", "notes"))
        shares[side] = unknown.sum() / max(1, tokens.sum())
        if shares[side] > _MANY_UNKNOWN:
            what = f"hold tokens that are unknown, {shares[side]:.1%} of all tokens"
            _warn(unknown > 0, f"{split} {side}s", f"{what}: see whether the tokenizer fits language, script and case")
        for flag, what in _SAID.items():
            _warn(notes & flag > 0, f"{split} {side}s", what)
    return shares


def _warn(lines: np.ndarray, which: str, what: str) -> None:
    if count := int(lines.sum()):
        logger.warning(f"{count:,} of {len(lines):,} {which} (the first is number {lines.argmax() + 1:,}) {what}.")


def _map(
    dataset: Dataset, function: Callable, features: Features, data: DataTrainingArguments, desc: str, **kwargs: Any
) -> Dataset:
    return dataset.map(
        function,
        batched=True,
        features=features,
        remove_columns=dataset.column_names,
        num_proc=data.preprocessing_num_workers,
        load_from_cache_file=not data.overwrite_cache,
        desc=desc,
        **kwargs,
    )

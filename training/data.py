"""Parallel text through `datasets`: every form becomes the columns `source` and `target`, memory-mapped and cached."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Sequence, Value, load_dataset
from transformers import PreTrainedTokenizerBase

from .arguments import DataTrainingArguments, ModelArguments
from .errors import InputError
from .files import TABLE_FORMATS, count_lines, load_file


logger = logging.getLogger(__name__)


# --- loading ---------------------------------------------------------------------------------------


def resolve_files(file: str, data: DataTrainingArguments, split: str) -> list[Path]:
    """Find and check what a `--{split}_file` means: one table, a source and a target file, or source text alone.

    Raises:
        InputError: nothing is there, a file is empty or not UTF-8, or the two sides differ in their number of lines.
    """
    path = Path(file)
    sides = [Path(f"{file}.{language}") for language in (data.source_lang, data.target_lang)]
    if path.suffix not in TABLE_FORMATS:
        if split == "test" and not sides[1].exists():
            sides = [sides[0] if sides[0].exists() else path]
        if not sides[0].exists():
            raise InputError(
                f"--{split}_file {file}: there is no {sides[0]}. Give a file ending in {', '.join(TABLE_FORMATS)}, or "
                f"the prefix of parallel text in files ending in .{data.source_lang} and .{data.target_lang}."
            )
    paths = [path] if path.suffix in TABLE_FORMATS else sides
    counts = [count_lines(side) for side in paths]
    if len(set(counts)) > 1:
        raise InputError(
            f"The two sides differ: {paths[0]} has {counts[0]:,} lines and {paths[1]} has {counts[1]:,}; "
            "line n of one must translate line n of the other."
        )
    return paths


def load_pairs(split: str, data: DataTrainingArguments, model: ModelArguments) -> Dataset:
    """Load a split (`"train"`, `"validation"` or `"test"`): columns `source` and, but for source text, `target`.

    Raises:
        InputError: a file, split, column or language key is missing or unreadable.
    """
    if data.dataset_name is not None and (split != "test" or data.test_file is None):
        dataset = _load_from_hub(split, data, model)
        dataset = _as_pairs(dataset, data, source_only=split == "test")
    else:
        paths = resolve_files(getattr(data, f"{split}_file"), data, split)
        languages = [data.source_lang, data.target_lang]
        dataset = load_file(paths, languages, source_only=split == "test", cache_dir=model.cache_dir)
    return _limit(dataset, split, data)


def _load_from_hub(split: str, data: DataTrainingArguments, model: ModelArguments) -> Dataset:
    try:
        return load_dataset(data.dataset_name, data.dataset_config_name, split=split, cache_dir=model.cache_dir)
    except (ValueError, OSError) as error:
        raise InputError(f"The {split} split of data set {data.dataset_name} cannot be loaded: {error}") from error


def _as_pairs(dataset: Dataset, data: DataTrainingArguments, source_only: bool) -> Dataset:
    languages = [data.source_lang, data.target_lang]
    if "translation" in dataset.column_names:
        dataset = dataset.select_columns("translation").flatten()
        dataset = dataset.rename_columns({name: name.removeprefix("translation.") for name in dataset.column_names})
    if source_only and data.source_lang in dataset.column_names and data.target_lang not in dataset.column_names:
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
            dataset = dataset.cast_column(name, Value("string"))
    return dataset


def _limit(dataset: Dataset, split: str, data: DataTrainingArguments) -> Dataset:
    option = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}[split]
    limit = getattr(data, option)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


# --- tokenisation ---------------------------------------------------------------------------------

_IDS = Sequence(Value("int32"))  # half the disk of int64: 36 million pairs matter
_EMPTY, _LONG = 1, 2  # why a training pair is skipped


def tokenize_for_training(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataTrainingArguments, longest: int | None = None
) -> Dataset:
    """Tokenise training pairs into `input_ids`, `labels` and `length`; skip and count empty and too long ones.

    `length` is that of the longer side, and at most `longest`: what a batch can hold.

    Raises:
        InputError: no pair is left.
    """
    limits = tuple(min(limit, longest or limit) for limit in (data.max_source_length, data.max_target_length))
    features = Features({"input_ids": _IDS, "labels": _IDS, "length": Value("int32"), "skip": Value("int8")})
    encode = partial(_encode_pairs, tokenizer=tokenizer, prefix=data.source_prefix or "", limits=limits)
    dataset = _map(dataset, encode, features, data, "Tokenising the training pairs")
    skip = dataset.with_format("numpy")["skip"][:]
    kept = np.flatnonzero(skip == 0)
    empty, long = int((skip == _EMPTY).sum()), int((skip == _LONG).sum())
    summary = (
        f"{len(kept):,} of {len(skip):,} training pairs are used; skipped: {empty:,} empty on one side, {long:,} "
        f"longer than {limits[0]:,} source or {limits[1]:,} target tokens."
    )
    if not len(kept):
        raise InputError(f"No training pair is left: {summary} Raise --max_source_length or --max_target_length?")
    (logger.warning if empty + long else logger.info)(summary)
    return dataset.select(kept).remove_columns("skip") if empty + long else dataset.remove_columns("skip")


def _encode_pairs(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, prefix: str, limits: tuple[int, int]
) -> dict[str, list]:
    sources, targets = ([text or "" for text in batch[name]] for name in ("source", "target"))
    input_ids = tokenizer([prefix + text for text in sources], verbose=False)["input_ids"]
    labels = tokenizer(text_target=targets, verbose=False)["input_ids"]

    def skip(i: int) -> int:
        if not sources[i].strip() or not targets[i].strip():
            return _EMPTY
        return _LONG if len(input_ids[i]) > limits[0] or len(labels[i]) > limits[1] else 0

    length = [max(len(source), len(target)) for source, target in zip(input_ids, labels, strict=True)]
    return {"input_ids": input_ids, "labels": labels, "length": length, "skip": [skip(i) for i in range(len(length))]}


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
    limits = (data.max_source_length, data.val_max_target_length)
    encode = partial(_encode_for_evaluation, tokenizer=tokenizer, prefix=data.source_prefix or "", limits=limits)
    dataset = _map(dataset, encode, Features(features), data, f"Tokenising the {split} sentences", with_indices=True)
    columns = dataset.with_format("numpy")
    if cut := int(columns["cut"][:].sum()):
        logger.warning(f"{cut:,} of {len(dataset):,} {split} sentences are longer than {limits} tokens and were cut.")
    lengths = np.array([len(ids) for ids in dataset["input_ids"]])
    return dataset.select(np.argsort(-lengths, kind="stable")).remove_columns("cut")


def _encode_for_evaluation(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    limits: tuple[int, int],
) -> dict[str, list]:
    def cut_off(ids: list[list[int]], limit: int) -> tuple[list[list[int]], list[bool]]:
        cut = [len(sentence) > limit for sentence in ids]
        return [s[: limit - 1] + s[-1:] if long else s for s, long in zip(ids, cut, strict=True)], cut

    texts = {name: [text or "" for text in batch[name]] for name in ("source", "target") if name in batch}
    sources = tokenizer([prefix + text for text in texts["source"]], verbose=False)["input_ids"]
    input_ids, cut = cut_off(sources, limits[0])
    columns = texts | {"input_ids": input_ids, "cut": cut, "index": indices}
    if "target" in batch:
        targets = tokenizer(text_target=texts["target"], verbose=False)["input_ids"]
        columns["labels"], target_cut = cut_off(targets, limits[1])
        columns["cut"] = [source or target for source, target in zip(cut, target_cut, strict=True)]
    return columns


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

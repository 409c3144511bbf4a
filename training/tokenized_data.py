"""Splits as token ids, and what to warn of: text that the tokenizer does not take as it is, or does not give back."""

import logging
import os
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from operator import eq, gt
from typing import Any

import datasets
import numpy as np
import regex
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from admin_hf.encoding import SAID, Encoded, Encoder
from admin_hf.parallel_text import is_blank

from .arguments import Arguments, DataTrainingArguments
from .data import Splits, Texts, load_data
from .errors import InputError
from .metrics import TranslationMetric
from .segmentation import SIDES, check_bpe
from .tokenization import named_tokenizer, prepare_tokenizer


logger = logging.getLogger(__name__)

_IDS = datasets.Sequence(Value("int32"))  # half the disk of int64: 36 million pairs matter
_EMPTY, _LONG = 1, 2  # why a training pair is skipped
# Of each side, beside its ids: see `Encoded`
_ABOUT = {
    f"{side}_{name}": Value(kind)
    for side in ("source", "target")
    for name, kind in (("tokens", "int32"), ("unknown", "int32"), ("notes", "int8"))
}

# The letters of these scripts, and letters
_SPACELESS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
    r"|[\p{Tai_Tham}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Viet}\p{Yi}\p{Javanese}\p{Balinese}]"
)
_LETTER = regex.compile(r"[\p{L}\p{M}]")

# Shares of unknown tokens. A Chinese text has some 3 in 100 where the vocabulary lacks rare characters. A text in
# another script has 30 to 50 and more (each word is a space and an unknown token), one in the wrong case about 15
_MANY_UNKNOWN, _TOO_MANY_UNKNOWN = 0.01, 0.25


def prepare_data(arguments: Arguments) -> tuple[Texts, PreTrainedTokenizerBase, Splits]:
    """The splits as text, the tokenizer that is named or that the run has or trains, and the splits as token ids."""
    tokenizer = named_tokenizer(arguments)
    if tokenizer is not None and arguments.data.bpe_dropout:
        check_bpe(tokenizer)
    with arguments.training.main_process_first(desc="preparing the data"):
        raw = load_data(arguments)
        tokenizer = prepare_tokenizer(arguments, raw) if tokenizer is None else tokenizer
        return raw, tokenizer, tokenize(raw, tokenizer, arguments)


def tokenize(raw: Texts, tokenizer: PreTrainedTokenizerBase, arguments: Arguments) -> Splits:
    """Turn every split into token ids: of several target languages one after the other, with a column `language`."""
    targets, splits = arguments.data.by_target(), {}
    for split, texts in raw.items():
        parts = {
            language: tokenize_for_training(dataset, tokenizer, targets[language], arguments.training.longest)
            if split == "train"
            else tokenize_for_evaluation(dataset, tokenizer, targets[language], split)
            for language, dataset in texts.items()
        }
        splits[split] = (
            next(iter(parts.values()))
            if len(parts) == 1
            else datasets.concatenate_datasets(
                [part.add_column("language", [language] * len(part)) for language, part in parts.items()]
            )
        )
    return splits


def in_language(dataset: Dataset, language: str) -> Dataset:
    """The rows of one target language."""
    if "language" not in dataset.column_names:
        return dataset
    return dataset.select(np.flatnonzero(np.array(dataset["language"][:]) == language))


def tokenize_for_training(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataTrainingArguments, longest: int | None = None
) -> Dataset:
    """Tokenise training pairs into `input_ids`, `labels` and `length`; skip and count empty and too long ones.

    `length` is that of the longer side, and at most `longest`: what a batch can hold. For `--bpe_dropout` there are
    also the pair's place in the text, `index`, and how many tokens each word has.

    Raises:
        InputError: no pair is left, or the tokenizer does not know the text.
    """
    limits = pair_limits(data, longest)
    features = {"input_ids": _IDS, "labels": _IDS, "length": Value("int32"), "skip": Value("int8")}
    if with_words := bool(data.bpe_dropout):
        features |= {"index": Value("int64")} | dict.fromkeys(SIDES.values(), _IDS)
    encode = partial(_encode_pairs, encoders=_encoders(tokenizer, data, with_words), limits=limits)
    features, desc = Features(features | _ABOUT), "Tokenising the training pairs"
    dataset = _map(dataset, encode, features, data, desc, with_indices=with_words)
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


def pair_limits(data: DataTrainingArguments, longest: int | None = None) -> tuple[int, int]:
    """The longest source and target that are trained with; no side is above `longest`."""
    source, target = (min(limit, longest or limit) for limit in (data.max_source_length, data.max_target_length))
    return source, target


def _encode_pairs(
    batch: dict[str, list], indices: list[int] | None = None, *, encoders: dict[str, Encoder], limits: tuple[int, int]
) -> dict[str, list]:
    columns, encoded = _encode(batch, encoders)
    if indices is not None:
        columns |= {"index": indices} | {f"{side}_words": lines.words for side, lines in encoded.items()}
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
    what = f"are longer than --max_source_length {limits[0]} or --val_max_target_length {limits[1]} and were cut"
    _warn(np.flatnonzero(dataset["cut"][:]), len(dataset), f"{split} pairs", what)
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


def _encoders(
    tokenizer: PreTrainedTokenizerBase, data: DataTrainingArguments, words: bool = False
) -> dict[str, Encoder]:
    return {
        "source": Encoder(tokenizer, prefix=data.source_prefix or "", words=words),
        "target": Encoder(tokenizer, target=True, words=words),
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


def _report(dataset: Dataset, split: str) -> dict[str, float]:
    """Warn of lines that the tokenizer does not take as they are; returns the share of unknown tokens of each side."""
    shares = {}
    columns = dataset.with_format("numpy")
    for side in (side for side in ("source", "target") if f"{side}_notes" in dataset.column_names):
        tokens, unknown, notes = (columns[f"{side}_{name}"][:] for name in ("tokens", "unknown", "notes"))
        shares[side] = unknown.sum() / max(1, tokens.sum())
        if shares[side] > _MANY_UNKNOWN:
            what = f"contain tokens that are unknown, {shares[side]:.1%} of all tokens"
            what += ": see whether the tokenizer fits language, script and case"
            _warn(np.flatnonzero(unknown), len(dataset), f"{split} {side}s", what)
        for flag, what in SAID.items():
            _warn(np.flatnonzero(notes & flag), len(dataset), f"{split} {side}s", what)
    return shares


def _warn(found: Sequence[int] | np.ndarray, total: int, which: str, what: str) -> None:
    """Say of how many of all lines something is true, and of which first; `found` has their places, from 0."""
    if len(found):
        logger.warning(f"{len(found):,} of {total:,} {which} (the first is number {found[0] + 1:,}) {what}.")


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


def check_references(
    metric: TranslationMetric, tokenizer: PreTrainedTokenizerBase, data: Splits, longest: int
) -> None:
    """Warn before any training of all that keeps scores from meaning what they say, with its count and first place.

    Args:
        data: the tokenised splits; those with the columns `source`, `target`, `labels` and `index` are looked at.
        longest: `labels` of so many ids may have been cut.

    Raises:
        InputError: no validation pair has a target.
    """
    if metric.language is not None and metric.language.script is None:
        logger.warning(
            f"--target_lang {metric.language.code} is not a known language code, such as 'de' or 'zh': "
            "scores use sacreBLEU's default tokens, 13a, and there is no BLEU on Moses tokens."
        )
    for split, dataset in data.items():
        if split == "train" or "target" not in dataset.column_names:
            continue
        rows = sorted(zip(*(dataset[name][:] for name in ("index", "source", "target", "labels")), strict=True))
        scored = [row for row in rows if not is_blank(row[2])]
        if not scored and split == "validation":
            raise InputError(f"None of the {len(rows):,} validation pairs has a target, so nothing can be scored.")
        missing = [index for index, source, target, _ in rows if is_blank(target) and not is_blank(source)]
        which = f"{split} pairs"
        _warn(missing, len(rows), which, "have no target; they are translated, but not scored")
        joined = [index for index, _, target, _ in scored if _is_spaceless(target)]
        if metric.language is not None and metric.language.tokenizer == "13a" and 2 * len(joined) > len(scored):
            what = "have targets without spaces between words, which are scored as if they had them, because "
            what += f"--target_lang {metric.language.code} says so: give the code of the language, such as zh or th"
            _warn(joined, len(rows), which, what)
        if lost := _lost(metric, tokenizer, scored, longest):
            first = next(iter(lost.values()))
            start = len(os.path.commonprefix(first))
            given, found = (text[start : start + 20] for text in first)
            what = "have targets that the tokenizer does not give back, so no translation of them can be perfect: "
            what += f"of {given!r} it makes {found!r}"
            _warn(list(lost), len(rows), which, what)


def _is_spaceless(text: str) -> bool:
    return 2 * len(_SPACELESS.findall(text)) > len(_LETTER.findall(text))


def _lost(
    metric: TranslationMetric, tokenizer: PreTrainedTokenizerBase, rows: list[tuple], longest: int
) -> dict[int, list[str]]:
    """Targets that the tokenizer does not give back, and what it gives, as they are scored, by their places."""
    lost = {}
    for index, _, target, labels in rows:
        if (composed := unicodedata.normalize("NFC", target)) != target:  # it is scored in this form
            labels = tokenizer(text_target=composed)["input_ids"]
        texts = [metric.normalize(text) for text in (target, tokenizer.decode(labels, skip_special_tokens=True))]
        if len(labels) < longest and texts[0] != texts[1]:
            lost[index] = texts
    return lost

"""Sentences for the page: those of the run's own files, and their translations."""

from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedTokenizerBase

from .. import parallel_text
from ..analysis.inputs import find_tokenizer
from ..encoding import language_code
from ..modeling_admin import AdminForConditionalGeneration
from ..parallel_text import find_files, is_blank
from ..run.folder import Run, predictions_name, regular_file


# Sentences to measure with, and to translate; of at most so many tokens
SENTENCES, MAX_LENGTH = 8, 128


class Sample(NamedTuple):
    """A sentence with its translations; a reference or a translation may be missing."""

    source: str
    reference: str | None
    translation: str | None = None


def read_pairs(run: Run, split: str, count: int) -> list[Sample]:
    """Read the first sentences of a split, in the forms that run_translation.py accepts; in the first target language.

    Args:
        run: the run; its arguments name the file.
        split: `"validation"` or `"test"`.
        count: number of sentences.

    Raises:
        OSError: the run names no file, or the file does not exist.
        ValueError: the file cannot be read, or has no such languages.
    """
    name = run.arguments.get(f"{split}_file")
    source, target = (run.arguments.get(f"{side}_lang") for side in ("source", "target"))
    if not (isinstance(name, str) and isinstance(source, str) and isinstance(target, str)):
        raise FileNotFoundError(f"the run names no {split} file.")
    target = target.partition(",")[0]
    paths = find_files(name, (source, target), source_only=True)
    pairs = parallel_text.read_pairs([regular_file(path) for path in paths], (source, target), source_only=True)
    return [Sample(pair.source or "", pair.target) for pair in islice(pairs, count)]


def first_target(run: Run) -> tuple[str, str]:
    """The first of several target languages, or nothing; and what comes before the sources that are translated."""
    prefix = str(run.arguments.get("source_prefix") or "")
    first, several, _ = str(run.arguments.get("target_lang")).partition(",")
    return (first, f"{language_code(first)} {prefix}") if several else ("", prefix)


def load_tokenizer(run: Run) -> PreTrainedTokenizerBase | None:
    """The tokenizer next to the newest weights or in the run's folder, if any; no code of a checkpoint runs."""
    return find_tokenizer(*filter(None, (run.weights, run.folder)), local_files_only=True)


def predictions(run: Run, count: int) -> list[Sample]:
    """The first lines of generated_predictions.txt with their sources, once the trained model has written it."""
    if not any(name.startswith("test_") for name in run.scores):  # further training removes the scores
        return []
    try:
        name = predictions_name(first_target(run)[0])
        lines = parallel_text.read_pairs([regular_file(run.folder / name)], ())
        samples = read_pairs(run, "test", count)
        return [pair._replace(translation=line.source) for pair, line in zip(samples, lines, strict=False)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def translate(
    model: AdminForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, samples: list[Sample], prefix: str = ""
) -> list[Sample]:
    """Translate with the beams of the model's generation settings.

    Args:
        prefix: text before every source.
    """
    longest = min(MAX_LENGTH, model.config.max_position_embeddings, model.generation_config.max_length or MAX_LENGTH)
    texts = [prefix + sample.source for sample in samples]
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    batch = tokenizer(texts, padding_side="right", **options)  # positions count from the left
    with torch.inference_mode():
        tokens = cast(Any, model).generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_length=longest
        )
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [
        sample._replace(translation="" if is_blank(sample.source) else " ".join(text.split()))
        for sample, text in zip(samples, texts, strict=True)
    ]

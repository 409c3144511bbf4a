"""A joint BPE tokenizer in Marian's vocabulary layout, trained with the `tokenizers` library."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import regex
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import InputError


EOS, UNK, PAD = "</s>", "<unk>", "<pad>"

# White space, control characters, and what Unicode lets readers ignore: zero-width spaces, joiners, direction marks
_INVISIBLE = regex.compile(r"[\s\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}]*")


def train_tokenizer(texts: Iterable[list[str]], vocab_size: int, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Train a joint BPE on batches of lines of both languages.

    The layout is Marian's, which stock converters rely on: `</s>` is 0, `<unk>` is 1 and `<pad>` is last; a source or
    target ends in `</s>`. Decoding gives back plain text: spaces are part of the tokens, punctuation and digits are
    never merged with letters. Text is NFC-normalised, runs of white space become one space.

    Raises:
        InputError: the data does not give a vocabulary of `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([*clean, normalizers.Lowercase()] if lowercase else clean)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    # One entry is left for <pad>, which must come last
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=[EOS, UNK])
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size() + 1) != vocab_size:
        raise InputError(
            f"--vocab_size {vocab_size} does not fit the data, which gives a vocabulary of {found}: "
            f"choose {'at most' if found < vocab_size else 'at least'} {found}."
        )
    tokenizer.add_special_tokens([PAD])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def is_blank(text: str | None) -> bool:
    """Whether there is nothing to translate: no text, or white space and characters without width alone."""
    return text is None or _INVISIBLE.fullmatch(text) is not None


def lowercases(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether case is lost between encoding a target and decoding it, so that scores must ignore case.

    Tried on words of the tokenizer's own, in all their scripts: none of them can come of its other case otherwise.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    words = tokenizer.batch_decode([[i] for i in ids[:: len(ids) // 2000 + 1]])
    words = [word for word in words if word.strip() and word.swapcase().swapcase() == word != word.swapcase()]
    if not words:
        return False
    swapped = tokenizer(text_target=[word.swapcase() for word in words], add_special_tokens=False)["input_ids"]
    return any(text.strip() == word.strip() for text, word in zip(tokenizer.batch_decode(swapped), words, strict=True))


def text_batches(dataset: Dataset, batch_size: int = 1000) -> Iterator[list[str]]:
    """All sources and targets of a data set, some at a time, so that they need not fit in memory."""
    for batch in dataset.select_columns(["source", "target"]).iter(batch_size):
        yield [text for column in batch.values() for text in column if text]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    """Save the tokenizer; a crash leaves no tokenizer_config.json, so no half tokenizer is ever loaded."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        tokenizer.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == "tokenizer_config.json"):
            shutil.move(path, folder / path.name)

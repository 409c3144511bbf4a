"""The tokenizer of a run: loaded, or a joint BPE in Marian's layout, trained with the `tokenizers` library."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from admin_hf.checkpoints import sentencepiece_named
from admin_hf.encoding import control_tokens, language_codes, read_control_tokens_as_text, sentence_tokenizer
from admin_hf.run.folder import ARGUMENTS_NAME
from admin_hf.special_tokens import required_ids

from . import runs
from .arguments import Arguments, ModelArguments
from .data import Texts
from .errors import InputError, refusing
from .sentencepieces import is_sentencepiece, read_sentencepiece


logger = logging.getLogger(__name__)

EOS, UNK, PAD = "</s>", "<unk>", "<pad>"

# Entries that spell characters without an entry of their own, as sentencepiece has them. Only in vocabularies of which
# they are a sixteenth at most: a smaller one needs its entries for words (the demo's 2,000: 92.7 BLEU with them, 94.4
# without, one seed)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BYTES_FROM = 16 * len(BYTES)


def train_tokenizer(
    texts: Iterable[list[str]], vocab_size: int, lowercase: bool = False, tags: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a joint BPE on batches of lines of all languages.

    The layout is Marian's, which stock converters rely on: `</s>` is 0, `<unk>` is 1 and `<pad>` is last; a source or
    target ends in `</s>`. Text is NFC-normalised, runs of white space become one space. Decoding gives exactly that
    text back: spaces are part of the tokens, and nothing in a text is read as a control token. Punctuation and digits
    are never merged with letters. From 4,096 entries on, 256 of them are bytes, which spell characters that the data
    does not have; smaller vocabularies have `<unk>` for them. `tags`, such as `>>de<<`, are entries behind `<unk>`.

    Raises:
        InputError: the data does not give a vocabulary of `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([*clean, normalizers.Lowercase()] if lowercase else clean)
    # A space marks where words begin. The usual mark, U+2581, is a character that texts have
    words = {"replacement": " ", "prepend_scheme": "always"}
    no_words = [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(**words), *no_words])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**words)])
    spelling = BYTES if vocab_size >= BYTES_FROM else []
    # One entry is left for <pad>, which must come last
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(spelling) - 1, special_tokens=[EOS, UNK, *tags])
    tokenizer.train_from_iterator(texts, trainer)
    _check_size(vocab_size, tokenizer.get_vocab_size(), len(spelling))
    if spelling:  # no special tokens, which decoding would leave out
        learnt = json.loads(tokenizer.to_str())["model"]
        vocab = learnt["vocab"] | {byte: len(learnt["vocab"]) + i for i, byte in enumerate(spelling)}
        tokenizer.model = models.BPE(vocab, [*map(tuple, learnt["merges"])], unk_token=UNK, byte_fallback=True)
    tokenizer.add_special_tokens([PAD])
    return sentence_tokenizer(tokenizer, EOS, unk_token=UNK, pad_token=PAD, split_special_tokens=True)


def _check_size(vocab_size: int, learnt: int, spelling: int) -> None:
    """Raise an InputError unless what was learnt, the bytes and `<pad>` are `vocab_size` entries."""
    size = learnt + spelling + 1
    if size == vocab_size:
        return
    plain, spelt = learnt + 1, learnt + len(BYTES) + 1
    fitting = spelt if plain >= BYTES_FROM or (spelling and spelt >= BYTES_FROM) else plain
    raise InputError(
        f"--vocab_size {vocab_size} does not fit the data, which gives a vocabulary of {fitting}: "
        f"choose {'at most' if size < vocab_size else 'at least'} {fitting}."
    )


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


def named_tokenizer(arguments: Arguments) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the arguments name, if any."""
    name = arguments.model.tokenizer_name or arguments.model.model_name_or_path
    return _load_with_tags(name, arguments) if name else None


def _load_with_tags(name: str, arguments: Arguments) -> PreTrainedTokenizerBase:
    """A tokenizer that reads all that comes before sources, and has the tag of each of several target languages.

    Raises:
        InputError: as [`load_tokenizer`], or naming the first tag that it lacks.
    """
    data = arguments.data
    prefixes = "".join(one.source_prefix or "" for one in data.by_target().values())
    tokenizer = load_tokenizer(name, arguments.model, prefixes)
    known = control_tokens(tokenizer)
    for tag in data.tags.values():
        if tag not in known:
            raise InputError(
                f"The tokenizer does not have {tag}, by which --target_lang {data.target_lang} chooses a language: "
                "train a new one, without --tokenizer_name and --model_name_or_path, or add it by "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': [{tag!r}, …]}})` and save it."
            )
    return tokenizer


def prepare_tokenizer(arguments: Arguments, raw: Texts) -> PreTrainedTokenizerBase:
    """Load the run's own tokenizer, or train one on the training pairs."""
    given, training = arguments.model, arguments.training
    output_dir, name = Path(training.output_dir), None
    # The first process of a machine has trained it just now, if the others see it; else it is of the run that goes on
    trained = training.local_process_index > 0 or (output_dir / ARGUMENTS_NAME).exists()
    if (output_dir / "tokenizer_config.json").exists() and (trained or not training.do_train):
        name = str(output_dir)
    if not name and not training.do_train:
        name = runs.last_checkpoint(training)
    if name:
        return _load_with_tags(name, arguments)
    logger.info(f"Training a joint BPE tokenizer with {given.vocab_size:,} entries.")
    texts = chain.from_iterable(map(text_batches, raw["train"].values()))
    tokenizer = train_tokenizer(texts, given.vocab_size, given.lowercase, [*arguments.data.tags.values()])
    save_tokenizer(tokenizer, output_dir)
    return _load_with_tags(str(output_dir), arguments)  # as every other process and session will see it


def load_tokenizer(name: str, arguments: ModelArguments, prefix: str = "") -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, the Hub or sentencepiece, for text in which nothing acts as a control token.

    It pads on the right, since Marian counts positions from the left, and it is saved with these settings.

    Args:
        name: folder, Hub id, or a file of sentencepiece, which ends in .model or .spm.
        arguments: where to store it, and which revision.
        prefix: comes before every source. If it has control tokens, the tokenizer that is saved goes on to read them
            in text, for whoever translates with the model.

    Raises:
        InputError: there is none, or its layout cannot be trained with, or it is a run's whose sources had language
            codes, and the prefix has none.
    """
    with refusing(f"The tokenizer {name} cannot be loaded"), sentencepiece_named():
        tokenizer = (
            read_sentencepiece(name)
            if is_sentencepiece(name)
            else AutoTokenizer.from_pretrained(
                name,
                cache_dir=arguments.cache_dir,
                revision=arguments.model_revision,
                trust_remote_code=arguments.trust_remote_code,
                padding_side="right",
                truncation_side="right",
            )
        )
    with refusing(f"The tokenizer {name} cannot be used"):
        pad, eos = required_ids(tokenizer)
    if pad == tokenizer.unk_token_id:
        raise InputError(
            f"The tokenizer {name} pads with its token for unknown text, which would be treated as padding."
        )
    ids = [*tokenizer.get_vocab().values()]
    for side in ("text", "text_target"):
        ids += (sentence := tokenizer(**{side: "a"})["input_ids"])
        if sentence[-1:] != [eos]:
            raise InputError(
                f"The tokenizer {name} does not end sentences with {tokenizer.eos_token}: give it a post-processor "
                "that does, such as TemplateProcessing of the package tokenizers, and save it."
            )
    if max(ids) >= len(tokenizer):
        raise InputError(f"The tokenizer {name} has {len(tokenizer):,} entries but ids up to {max(ids):,}.")
    codes = language_codes(tokenizer) if "split_special_tokens" in tokenizer.init_kwargs else []
    if codes and not any(code in prefix for code in codes):
        raise InputError(
            f"The tokenizer {name} is of a model whose sources begin with a language code, such as {codes[0]}: give "
            f"all its languages as --target_lang, with commas between them, or one with --source_prefix '{codes[0]} '."
        )
    return read_control_tokens_as_text(tokenizer, prefix)

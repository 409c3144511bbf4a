"""Lines of text as token ids, in which nothing acts as a control token: `</s>` in a corpus is four characters."""

import re
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, NamedTuple, cast

import numpy as np
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TokenizersBackend


# Codes that choose the target language, as OPUS-MT and MADLAD have them; not every vocabulary marks them as special
_LANGUAGE_CODE = re.compile(r">>[\w.-]+<<|<2[A-Za-z][\w-]*>")
# With these, tokenizers mark where words begin or go on. Some then cannot tell them from text
_MARKS = ("▁", "</w>", "@@")

# A line has the name of a control token, which is text; one that became unknown; a mark that is lost
NAMED, REPLACED, MARKED = 1, 2, 4
SAID = {
    NAMED: "contain the name of a control token, such as <s>, which is read as text. If you meant a control token "
    "before every source, give it as --source_prefix",
    REPLACED: "contain the name of a control token that this tokenizer cannot read as text, and which becomes unknown",
    MARKED: "contain a character by which this tokenizer marks words, such as ▁ (U+2581), and which it cannot keep",
}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The entries that control a model and are not text (special tokens and language codes), with their ids."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    codes = filter(_LANGUAGE_CODE.fullmatch, tokenizer.get_vocab())
    names = sorted({*tokenizer.all_special_tokens, *special, *codes})
    return dict(zip(names, cast(list[int], tokenizer.convert_tokens_to_ids(names)), strict=True))


def language_code(language: str) -> str:
    """The code that chooses a target language, in the form of OPUS-MT: `>>de<<` for "de"."""
    return f">>{language}<<"


def language_codes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The codes, such as `>>de<<`, by which lines choose a target language, if the tokenizer reads them in text."""
    return [] if tokenizer.split_special_tokens else sorted(filter(_LANGUAGE_CODE.fullmatch, tokenizer.get_vocab()))


def first_code(line: str) -> str:
    """The language code that a line begins with, of whatever model; empty if there is none."""
    return match[0] if (match := _LANGUAGE_CODE.match(line.lstrip())) else ""


def read_control_tokens_as_text(tokenizer: PreTrainedTokenizerBase, prefix: str = "") -> PreTrainedTokenizerBase:
    """Return a tokenizer that reads names of control tokens as text, now and after it is saved and loaded again.

    A slow tokenizer may know further names (Marian's language codes); [`Encoder`] handles those.

    Args:
        tokenizer: must not be used afterwards.
        prefix: text before every source. If its control tokens would also become text, the saved tokenizer reads
            control tokens in text, because nobody could use the model otherwise; [`Encoder`] does not.
    """
    controls = control_tokens(tokenizer)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        codes = [name for name in controls if _LANGUAGE_CODE.fullmatch(name)]
        # Special, or they are found in text in spite of `split_special_tokens`
        backend.add_special_tokens([AddedToken(code, normalized=False) for code in codes])
        changed = _take_apart(tokenizer, controls)
        if changed and not hasattr(tokenizer, "_switch_to_target_mode"):
            # A class for one model would put its own parts together again when it is loaded
            options = tokenizer.init_kwargs | {"tokenizer_object": backend, "added_tokens_decoder": {}}
            tokenizer = TokenizersBackend(**options)
    options = {"add_special_tokens": False, "verbose": False}
    steered, read = (tokenizer(prefix, split_special_tokens=split, **options)["input_ids"] for split in (False, True))
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = steered == read
    return tokenizer


def _take_apart(tokenizer: PreTrainedTokenizerBase, controls: dict[str, int]) -> bool:
    """Split the names that the model itself has as pieces (Unigram), words (WordLevel) or merges (BPE), if any."""
    backend = tokenizer.backend_tokenizer
    normalize = backend.normalizer.normalize_str if backend.normalizer else str
    pieces = backend.pre_tokenizer.pre_tokenize_str if backend.pre_tokenizer else lambda line: [(line, None)]
    found = []
    for name, index in controls.items():
        line = f"{name} a{name}a"
        (ids,) = tokenizer([line], add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if len(name) > 1 and index in ids and any(name in piece for piece, _ in pieces(normalize(line))):
            found.append(f"{re.escape(name[0])}(?={re.escape(name[1:])})")
    if found:
        split = pre_tokenizers.Split(Regex("|".join(found)), "isolated")
        before = [backend.pre_tokenizer] if backend.pre_tokenizer else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, split])
    return bool(found)


class Encoded(NamedTuple):
    """Lines as token ids, and facts on each line: arrays of the shape `(lines,)`."""

    ids: list[list[int]]
    tokens: np.ndarray  # how many the line itself has
    unknown: np.ndarray  # how many of these are unknown
    notes: np.ndarray  # flags: NAMED, REPLACED, MARKED
    words: list[list[int]]  # how many ids each word has, where that is asked for


def sentence_tokenizer(tokenizer: Tokenizer, eos_token: str, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of the package tokenizers as one of Transformers that ends every sentence with `eos_token`.

    Args:
        options: further special tokens, and other arguments of the tokenizer's class.
    """
    end = tokenizer.token_to_id(eos_token)
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {eos_token}", special_tokens=[(eos_token, end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **options,
    )


@dataclass
class Encoder:
    """Turns lines into token ids. The only control tokens among them are the prefix's and those that are always added.

    Targets begin with their first word; tokens that the tokenizer puts before it are left out, because the decoder has
    its own start token.

    Args:
        tokenizer: fast or slow, with any layout that `load_tokenizer` accepts.
        prefix: text before every line. It comes from the user, so its control tokens are control tokens.
        target: encode as targets.
        words: also return where words end. Only tokenizers of the package tokenizers know it.

    Example:

    ```python
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> from admin_hf.encoding import Encoder

    >>> characters = {"</s>": 0, "<": 1, "/": 2, "s": 3, ">": 4, "a": 5}
    >>> tokenizer = Tokenizer(models.BPE(characters, merges=[]))
    >>> Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))(["a</s>"]).ids
    [[5, 1, 2, 3, 4]]

    ```
    """

    tokenizer: PreTrainedTokenizerBase
    prefix: str = ""
    target: bool = False
    words: bool = False
    front: list[int] = field(init=False)
    back: list[int] = field(init=False)

    def __post_init__(self) -> None:
        controls = control_tokens(self.tokenizer)
        self._names = re.compile("|".join(map(re.escape, controls)) or "(?!)")
        unknown = self.tokenizer.unk_token_id
        self._unknown = -1 if unknown is None else unknown
        self._control_ids = np.array(sorted({*controls.values()} - {unknown, None}), dtype=np.int64)
        self._lost = tuple(mark for mark in _MARKS if self._loses(mark))
        self.front, self.back = self._frame()
        # Of the prefix, all up to its last control token is encoded by itself, and the rest with each line
        end = max((match.end() for match in self._names.finditer(self.prefix)), default=0)
        self._rest = self.prefix[end:]
        if self.target:
            self.front = []
        elif end:
            self.front = self.front + self._encode([self.prefix[:end]], split_special_tokens=False)["input_ids"][0]
        (rest,) = self._encode([self._rest.rstrip()], split_special_tokens=True)["input_ids"]
        self._of_prefix = len(rest), rest.count(self._unknown)

    def __call__(self, texts: list[str]) -> Encoded:
        encoding = self._encode([self._rest + text for text in texts], split_special_tokens=True)
        ids = encoding["input_ids"]
        rows = np.repeat(np.arange(len(ids)), [len(line) for line in ids])
        flat = np.fromiter(chain.from_iterable(ids), np.int64, len(rows))
        notes = np.zeros(len(ids), np.int8)
        for row in np.unique(rows[np.isin(flat, self._control_ids)]):
            # Whatever the tokenizer is, a control token from a line would end it, or be masked as padding
            kept = [token if token not in self._control_ids else self._unknown for token in ids[row]]
            ids[row] = [token for token in kept if token >= 0]
            notes[row] |= REPLACED
        for row, text in enumerate(texts):
            if not notes[row] and self._names.search(text):
                notes[row] |= NAMED
            if any(mark in text for mark in self._lost):
                notes[row] |= MARKED
        counts = (np.bincount(which, minlength=len(ids)) for which in (rows, rows[flat == self._unknown]))
        tokens, unknown = (
            np.maximum(of_line - of_prefix, 0) for of_line, of_prefix in zip(counts, self._of_prefix, strict=True)
        )
        words = [*map(self._words, ids, cast(list[Encoding], encoding.encodings))] if self.words else []
        return Encoded([[*self.front, *line, *self.back] for line in ids], tokens, unknown, notes, words)

    def _words(self, line: list[int], encoding: Encoding) -> list[int]:
        """How many ids each word of a line has; what is put before and behind is a word for each id."""
        # Where a control token was taken out, each id is one
        which = encoding.word_ids if len(encoding) == len(line) else range(len(line))
        words = [len([*word]) for _, word in groupby(which)]
        return [*[1] * len(self.front), *words, *[1] * len(self.back)]

    def _encode(self, texts: list[str], split_special_tokens: bool) -> BatchEncoding:
        return self.tokenizer(
            **{"text_target" if self.target else "text": texts},
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )

    def _frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a line."""
        (inner,) = self._encode(["a"], split_special_tokens=True)["input_ids"]
        whole = self.tokenizer(**{"text_target" if self.target else "text": "a"}, verbose=False)["input_ids"]
        start = next(i for i in range(len(whole) + 1) if whole[i : i + len(inner)] == inner)
        return whole[:start], whole[start + len(inner) :]

    def _loses(self, mark: str) -> bool:
        (ids,) = self._encode([f"a{mark}a"], split_special_tokens=True)["input_ids"]
        text = cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))
        return self._unknown not in ids and mark not in text.replace(" ", "")

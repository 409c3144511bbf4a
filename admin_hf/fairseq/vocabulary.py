"""fairseq's dictionaries and BPE codes as one vocabulary in Marian's layout, and its tokenizer."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..checkpoints import one_line
from ..encoding import sentence_tokenizer


BOS, PAD, EOS, UNK = SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq's ids 0 to 3
END_OF_WORD = "</w>"


def read_dictionary(path: str | os.PathLike) -> list[str]:
    """The entries of a `dict.xx.txt` by fairseq's ids: the four special ones, and the word of each line `word count`.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not `word count`, or a word occurs twice.
    """
    entries = dict.fromkeys(SPECIAL)
    for number, line in _lines(path):
        word, _, count = line.rstrip().rpartition(" ")
        if not word or not count.isdecimal():
            raise ValueError(f"{path}, line {number}, is {line.rstrip()!r:.100}; expected a word and a count.")
        if word in entries:
            raise ValueError(f"{path}, line {number}, has {word!r:.100} a second time.")
        entries[word] = None
    return list(entries)


def read_codes(path: str | os.PathLike) -> list[tuple[str, str]]:
    """The merges in a file of subword-nmt's codes, version 0.2, in the order of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another version, no codes, or a line that is not a pair.
    """
    merges: dict[tuple[str, str], None] = {}
    for number, line in _lines(path):
        left, _, right = line.strip("\r\n ").partition(" ")
        if number == 1:
            if (left, right) != ("#version:", "0.2"):
                raise ValueError(f"{path} begins with {line.strip()!r:.100}; expected '#version: 0.2'.")
        elif not left or not right or " " in right:
            raise ValueError(f"{path}, line {number}, is {line.strip()!r:.100}; expected two pieces.")
        else:
            merges[left, right] = None
    if not merges:
        raise ValueError(f"{path} contains no codes; expected '#version: 0.2', and two pieces in each line.")
    return list(merges)


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    try:
        with Path(path).open(encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {one_line(error)}.") from error


@dataclass(frozen=True)
class Vocabulary:
    """One vocabulary for both languages, with the row of each entry in fairseq's matrices.

    The layout is Marian's, which CTranslate2's converter requires: `</s>` is 0, `<unk>` is 1 and `<pad>` is last. In
    between are the target's words, `<s>`, and entries that the target's dictionary lacks: words of the source only,
    and pieces that the BPE codes need to build others.

    Attributes:
        tokens: the tokens by id.
        source_rows, target_rows: fairseq's id of each token except `<pad>`; that of `<unk>` if the dictionary lacks
            the token.
        lacking: the ids that the target's dictionary lacks.
    """

    tokens: Sequence[str]
    source_rows: Sequence[int]
    target_rows: Sequence[int]
    lacking: Sequence[int]

    @classmethod
    def of(
        cls, source: Sequence[str], target: Sequence[str], merges: Iterable[tuple[str, str]] | None = None
    ) -> "Vocabulary":
        """Join two dictionaries, which may be the same, and the pieces of BPE codes.

        Raises:
            ValueError: two words of a dictionary are one piece of the codes, or `<pad>` is one.
        """
        if merges is not None:
            source, target = _pieces(source), _pieces(target)
        pieces = [piece for left, right in merges or () for piece in (left, right, left + right)]
        tokens = list(dict.fromkeys([EOS, UNK, *target[len(SPECIAL) :], BOS, *source[len(SPECIAL) :], *pieces]))
        if PAD in tokens:
            raise ValueError(f"{PAD} is a piece of the BPE codes, but stands for padding in fairseq's dictionaries.")
        source_rows, target_rows = ([ids.get(t, ids[UNK]) for t in tokens] for ids in map(_ids, (source, target)))
        known = set(target)
        lacking = [number for number, token in enumerate(tokens) if token not in known]
        return cls([*tokens, PAD], source_rows, target_rows, lacking)

    def tokenizer(self, merges: Sequence[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
        """The tokenizer of this vocabulary: it splits text into words, and words into pieces by the merges.

        Without merges its input is text that is already split into `sub@@ words`. A source or target ends in `</s>`,
        and no text acts as a control token.
        """
        ids = _ids(self.tokens)
        if merges is None:
            tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
        else:
            tokenizer = Tokenizer(models.BPE(ids, list(merges), unk_token=UNK, end_of_word_suffix=END_OF_WORD))
            tokenizer.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"bos_token": BOS, "unk_token": UNK, "pad_token": PAD}
        return sentence_tokenizer(tokenizer, EOS, **special, split_special_tokens=True)


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _pieces(dictionary: Sequence[str]) -> list[str]:
    """fairseq's words as pieces of BPE: `xx@@` is within a word, and becomes `xx`; `xx` ends one: `xx</w>`."""
    words = dictionary[len(SPECIAL) :]
    pieces = [w[:-2] if w.endswith("@@") and len(w) > 2 else w + END_OF_WORD for w in words]
    if len({*pieces, *SPECIAL}) < len(dictionary):
        raise ValueError(
            "Two words of a dictionary are the same piece of BPE: leave out the codes, and give text that is already "
            "split."
        )
    return [*SPECIAL, *pieces]

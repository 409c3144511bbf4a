"""Lines of text in, lines of text out: batches by length, restored order, and warnings for lines that are changed."""

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypedDict, Unpack, overload

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..encoding import SAID, Encoder, first_code, language_codes
from ..parallel_text import as_written, is_blank
from .engines import CTranslate2Engine, Engine, Ids, TransformersEngine


logger = logging.get_logger(__name__)

# Where the model's generation settings do not say: beams, and tokens of the longest translation
BEAMS, LONGEST = 5, 512
BATCH_SIZE = 32


class Translation(NamedTuple):
    """A translation and its score.

    Attributes:
        text: one line.
        score: log p(text | source) / n^length_penalty, by which the search ranks. It is the natural logarithm, summed
            over the n tokens, including the end of the sentence and without a forced prefix. With a length penalty of
            1 it is the mean log-probability of a token, with 0 the log-probability of the sentence.
    """

    text: str
    score: float


class SearchOptions(TypedDict, total=False):
    """Options of [`translate`], which explains them."""

    beams: int | None
    length_penalty: float | None
    prefix: str
    source_prefix: str
    max_length: int | None
    batch_size: int


@overload
def translate(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    lines: Iterable[str],
    *,
    nbest: None = None,
    **options: Unpack[SearchOptions],
) -> list[str]: ...
@overload
def translate(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    lines: Iterable[str],
    *,
    nbest: int,
    **options: Unpack[SearchOptions],
) -> list[list[Translation]]: ...
def translate(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    lines: Iterable[str],
    *,
    nbest: int | None = None,
    **options: Unpack[SearchOptions],
) -> list[str] | list[list[Translation]]:
    """Translate lines of text: one translation per line, and a blank one for a blank line.

    Names of special tokens in the lines are read as text, except for a language code of the model at the start of a
    line, such as `>>de<<`, which chooses the target language. Warnings give the numbers of lines that are changed, for
    example because they are too long and are cut.

    Args:
        model: an encoder-decoder of Transformers, with ω or without, an [`Ensemble`], or a `ctranslate2.Translator`.
            Its device and its mode (train or evaluation) are not changed.
        tokenizer: the model's tokenizer.
        lines: the lines to translate.
        nbest: number of translations of each line.
        **options: options of the search and of the text:

            - `beams`: number of beams; 1 is greedy search. Default: the model's generation settings, else 5.
            - `length_penalty`: the search ranks by log-probability / tokens^length_penalty. Default: the model's
              generation settings, else 1.
            - `prefix`: forced beginning of every translation. The names of special tokens in it, such as language
              codes, mean these tokens.
            - `source_prefix`: text to put before every line; special tokens as in `prefix`.
            - `max_length`: tokens of the longest translation, including the decoder's start token. Default: the
              model's generation settings, else the longest that it accepts.
            - `batch_size`: number of lines in a batch.

    Returns:
        The translations; with `nbest`, a list of that many [`Translation`]s for each line, the best first.

    Raises:
        ValueError: an option is out of its range, or the model does not translate.

    Example:

    ```python
    model = AutoModelForSeq2SeqLM.from_pretrained("runs/en-de/vanilla")
    tokenizer = AutoTokenizer.from_pretrained("runs/en-de/vanilla")
    translate(model, tokenizer, ["A dog is running.", "Two men are sitting outside."])
    ```
    """
    if isinstance(lines, str):
        raise ValueError(f"lines is one text, {lines[:40]!r}; expected a list of lines, such as [{lines[:40]!r}].")
    found = LineTranslator(engine_of(model, tokenizer), tokenizer, nbest=nbest, **options)(list(lines))
    return found if nbest is not None else [best.text for (best,) in found]


def engine_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The engine for a model of any kind that [`translate`] accepts."""
    if isinstance(model, TransformersEngine | CTranslate2Engine):
        return model
    if type(model).__module__.partition(".")[0] == "ctranslate2":  # which need not be installed
        return CTranslate2Engine(model, tokenizer)
    return TransformersEngine(model)


class LineTranslator:
    """Translates some lines at a time, and counts them for its warnings; the arguments are those of [`translate`]."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        beams: int | None = None,
        length_penalty: float | None = None,
        nbest: int | None = None,
        prefix: str = "",
        source_prefix: str = "",
        max_length: int | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        for name, value in {
            "beams": beams,
            "nbest": nbest,
            "max_length": max_length,
            "batch_size": batch_size,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if beams is not None and nbest is not None and nbest > beams:
            raise ValueError(f"nbest is {nbest}, more than the {beams} beams can find: give at least as many beams.")
        self.engine, self.tokenizer = engine, tokenizer
        self.nbest, self.batch_size = nbest, batch_size
        codes = language_codes(tokenizer)
        # What a line may begin with, and what encodes such lines; others have no code
        self.codes = [] if any(code in source_prefix for code in codes) else codes
        self.encoders = {"": Encoder(tokenizer, prefix=source_prefix)}
        self.source_prefix = source_prefix
        self.settings = copy.deepcopy(engine.generation_config)
        self.prefix = self._forced(prefix)
        self._set_search(beams, length_penalty, max_length)
        self.count = 0  # lines so far

    def __call__(
        self, lines: Sequence[str], progress: Callable[[int], object] = lambda lines: None
    ) -> list[list[Translation]]:
        """The translations of each line, the best first.

        Args:
            progress: called with the number of lines that were just translated.
        """
        sources = self._encode(lines)
        nothing = [Translation("", 0.0)] * (self.nbest or 1)
        found = {row: nothing for row in range(len(lines)) if row not in sources}
        progress(len(found))
        end = self.tokenizer.eos_token_id
        order = sorted(sources, key=lambda row: -len(sources[row]))
        cut: list[int] = []
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            batch = [sources[row] for row in rows]
            targets = self.engine.search(batch, self.prefix, self.settings)
            cut += [row for row, (best, *_) in zip(rows, targets, strict=True) if best[-1:] != [end]]
            found |= zip(rows, self._translations(batch, targets), strict=True)
            progress(len(rows))
        longest = self.settings.max_length
        why = "the most that the model makes" if longest == self.engine.positions else "see max_length"
        self._say(cut, f"have a translation that is cut at {longest:,} tokens, {why}")
        self.count += len(lines)
        return [found[row] for row in range(len(lines))]

    # --- the settings ---

    def _forced(self, prefix: str) -> Ids:
        """What every translation begins with, as ids."""
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": False}
        ids: Ids = self.tokenizer(text_target=prefix.rstrip(), **options)["input_ids"] if prefix.strip() else []
        if self.tokenizer.unk_token_id in ids:
            raise ValueError(f"The prefix {prefix!r} has a character that the tokenizer does not know.")
        # Many-to-many models force the target's language in the same way
        forced, self.settings.forced_bos_token_id = self.settings.forced_bos_token_id, None
        return ids if forced is None or ids[:1] == [forced] else [forced, *ids]

    def _set_search(self, beams: int | None, length_penalty: float | None, max_length: int | None) -> None:
        settings: GenerationConfig = self.settings
        for name in ("num_beams", "length_penalty", "max_length", "max_new_tokens"):
            if not isinstance(value := getattr(settings, name), int | float | None):
                raise ValueError(f"The generation_config.json of the model has {name} {value!r}; expected a number.")
        settings.do_sample, settings.num_return_sequences = False, self.nbest or 1
        settings.num_beams = beams or max(settings.num_beams or BEAMS, self.nbest or 1)
        if length_penalty is not None:
            settings.length_penalty = length_penalty
        self.length_penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
        if settings.num_beams == 1:  # settings for several beams, about which Transformers would warn
            settings.length_penalty = settings.early_stopping = None
        if settings.max_new_tokens is not None:
            settings.max_length, settings.max_new_tokens = settings.max_new_tokens + len(self.prefix) + 1, None
        longest = [limit for limit in (max_length or settings.max_length, self.engine.positions) if limit]
        settings.max_length = min(longest, default=LONGEST)
        if settings.max_length < len(self.prefix) + 2:
            raise ValueError(
                f"A translation may have {settings.max_length} tokens, which start and prefix already fill: raise "
                "max_length."
            )
        # It would score what the search has not found: the end of a translation that is cut
        settings.forced_eos_token_id = None

    # --- the work ---

    def _encode(self, lines: Sequence[str]) -> dict[int, Ids]:
        """The lines that hold something to translate, as ids."""
        by_code: dict[str, dict[int, str]] = {}
        for row, line in enumerate(lines):
            code = first_code(line)
            code = code if code in self.codes else ""
            text = line.lstrip().removeprefix(code).lstrip() if code else line
            if not is_blank(text):
                by_code.setdefault(code, {})[row] = text
        rows = sorted(chain.from_iterable(by_code.values()))
        if not rows:
            return {}  # stock tokenizers fail on no text at all
        if self.codes:
            what = f"do not begin with a language code, such as {self.codes[0]}: the model chooses the language"
            self._say([*by_code.get("", {})], what)
        sources: dict[int, Ids] = {}
        notes: dict[int, int] = {}
        for code, some in by_code.items():
            if code not in self.encoders:
                self.encoders[code] = Encoder(self.tokenizer, prefix=f"{code} {self.source_prefix}")
            encoded = self.encoders[code]([*some.values()])
            notes |= zip(some, encoded.notes, strict=True)
            found = zip(some, encoded.ids, encoded.tokens, strict=True)
            sources |= {row: ids for row, ids, tokens in found if tokens}
        for flag, what in SAID.items():
            self._say([row for row in rows if notes[row] & flag], what)
        self._say([row for row in rows if row not in sources], "hold nothing that the tokenizer knows, and stay blank")
        limits = (self.engine.positions, self.tokenizer.model_max_length)
        longest = min(limit for limit in limits if limit)
        long = [row for row, ids in sources.items() if len(ids) > longest]
        self._say(long, f"are longer than the {longest:,} tokens that the model takes, and are cut")
        back = self.encoders[""].back
        return sources | {row: [*sources[row][: longest - len(back)], *back] for row in long}

    def _translations(self, sources: list[Ids], targets: list[list[Ids]]) -> list[list[Translation]]:
        texts = [self._decode(found) for found in targets]
        if self.nbest is None:
            return [[Translation(best, 0.0)] for best, *_ in texts]
        scores = [
            [log_p / len(ids) ** self.length_penalty for log_p, ids in zip(of_line, ids_of_line, strict=True)]
            for of_line, ids_of_line in zip(self.engine.score(sources, self.prefix, targets), targets, strict=True)
        ]
        found = [[*map(Translation, *of_line)] for of_line in zip(texts, scores, strict=True)]
        # CTranslate2 counts a forced prefix when it ranks
        return [sorted(of_line, key=lambda translation: -translation.score) for of_line in found]

    def _decode(self, targets: list[Ids]) -> list[str]:
        rows = [[*self.prefix, *ids] for ids in targets]
        return [as_written(text) for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def _say(self, rows: Sequence[int], what: str) -> None:
        if rows:
            numbers = ", ".join(f"{self.count + row + 1}" for row in sorted(rows))
            logger.warning(f"Some lines ({numbers}) {what}.")

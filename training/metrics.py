"""BLEU, chrF and TER by sacreBLEU, as an `evaluate.Metric` that needs no network, for any target language."""

import re
import tempfile
import unicodedata
from typing import Any, NamedTuple

import datasets
import evaluate
import sacremoses
from babel.core import get_global
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric, Signature
from sacrebleu.metrics.bleu import BLEUScore
from sacrebleu.metrics.lib_ter import BeamEditDistance
from sacremoses.corpus import NonbreakingPrefixes


# The tokenizers that sacreBLEU has for some scripts (ISO 15924). In other scripts that know no spaces between words it
# finds no words, so there characters count.
CHARACTERS = "char"
TOKENIZERS = {
    **dict.fromkeys(("Hans", "Hant", "Hani"), "zh"),
    **dict.fromkeys(("Jpan", "Hrkt", "Hira", "Kana"), "ja-mecab"),
    **dict.fromkeys(("Kore", "Hang"), "ko-mecab"),
    **dict.fromkeys(("Thai", "Laoo", "Khmr", "Mymr", "Tibt"), CHARACTERS),
    **dict.fromkeys(("Lana", "Tale", "Talu", "Tavt", "Yiii", "Java", "Bali"), CHARACTERS),
}


class Language(NamedTuple):
    """What a language tag says, as far as scores depend on it."""

    code: str  # ISO 639, of two letters where there are two
    script: str | None  # ISO 15924; None where the tag is no language's

    @classmethod
    def parse(cls, tag: str) -> "Language":
        """Read a tag in any of the usual forms: `zh`, `zh-CN`, `zho_Hans`, `cmn`, `ja_XX`, `>>cmn_Hans<<`."""
        code, *others = re.findall("[a-z0-9]+", tag.lower()) or [""]
        code = get_global("language_aliases").get(code, code).partition("_")[0]
        likely = get_global("likely_subtags").get(code)
        scripts = [other.title() for other in others if re.fullmatch("[a-z]{4}", other)]
        return cls(code, None if likely is None else [*scripts, likely.split("_")[1]][0])

    @property
    def tokenizer(self) -> str:
        """What sacreBLEU calls the tokenizer of this language, whether it is installed or not."""
        return TOKENIZERS.get(self.script or "", "13a")

    @property
    def has_moses_tokens(self) -> bool:
        """Whether Moses finds words: it does in every language with spaces, by rules of its own for some of them."""
        return self.script is not None and self.tokenizer == "13a"


class MosesBLEU(BLEU):
    """BLEU of text in the tokens of Moses, which papers call tokenised BLEU. No other figure is comparable with it.

    Moses takes the abbreviations of English for a language that it has none of. The signature says so.

    Args:
        language: ISO 639 code of the text's language, such as `"de"`.
        lowercase: ignore case.
    """

    def __init__(self, language: str, lowercase: bool = False) -> None:
        super().__init__(tokenize="none", lowercase=lowercase, force=True)
        self.moses = sacremoses.MosesTokenizer(language)
        prefixes = "" if language in NonbreakingPrefixes().available_langs else "-prefixes-en"
        self.tokenizer_signature = f"moses-{language}{prefixes}-sacremoses-{sacremoses.__version__}"

    def corpus_score(self, hypotheses: list[str], references: list[list[str]], **kwargs: Any) -> BLEUScore:
        return super().corpus_score(self._tokens(hypotheses), [self._tokens(texts) for texts in references], **kwargs)

    def _tokens(self, texts: list[str]) -> list[str]:
        return [self.moses.tokenize(text, return_str=True, escape=False) for text in texts]


class CharacterTER(TER):
    """Edits of characters, for scripts without spaces of which Tercom has no rules.

    Without the shifts of TER, which are meant for words: among characters they take seconds for a sentence.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenizer_signature += f"-{CHARACTERS}"

    def get_signature(self) -> Signature:
        signature = super().get_signature()
        signature.update("shifts", False)
        return signature

    def _preprocess_segment(self, sent: str) -> str:
        return " ".join(super()._preprocess_segment(sent))

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict[str, Any]) -> list[float]:
        (reference,) = ref_kwargs["ref_words"]
        edits, _ = BeamEditDistance(reference)(hypothesis.split())
        return [edits, len(reference)]


def build_scorers(language: Language | None, lowercase: bool = False) -> dict[str, Metric]:
    """The scores of translations into a language, by name. All that is chosen here shows in their signatures.

    Args:
        language: None: sacreBLEU's defaults.
        lowercase: ignore case.
    """
    tokenizer = language.tokenizer if language is not None else "13a"
    try:
        bleu = BLEU(lowercase=lowercase, tokenize=tokenizer)
    except RuntimeError:  # MeCab is not installed
        bleu = BLEU(lowercase=lowercase, tokenize=CHARACTERS)
    if tokenizer == CHARACTERS:
        ter = CharacterTER(case_sensitive=not lowercase)
    else:
        asian = tokenizer != "13a"  # which acts in normalised text alone
        ter = TER(case_sensitive=not lowercase, normalized=asian, asian_support=asian)
    scorers = {"bleu": bleu, "chrf": CHRF(lowercase=lowercase), "ter": ter}
    if language is not None and language.has_moses_tokens:
        scorers["moses_bleu"] = MosesBLEU(language.code, lowercase)
    return scorers


class TranslationMetric(evaluate.Metric):
    """Corpus BLEU, chrF2 and TER of detokenised text, each with sacreBLEU's signature.

    Both sides are compared in NFC: a letter is the same whether its accent is a character of its own or not. Where
    that changes a text, the signatures end in `unicode:NFC`. Characters that only look alike stay different.

    Args:
        lowercase: ignore case, as for a model of lower-cased text; it shows in the signatures.
        target_lang: tag of the language, in any usual form, which decides the tokens; adds tokenised BLEU,
            `moses_bleu`, where Moses finds words in it.

    Example:

    ```python
    >>> scores = TranslationMetric().compute(predictions=["ein kleiner Test ."], references=["ein kleiner Test ."])
    >>> round(scores["bleu"]), scores["bleu_signature"]
    (100, 'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0')

    ```
    """

    def __init__(self, lowercase: bool = False, target_lang: str | None = None, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})
        self.lowercase = lowercase
        self.language = None if target_lang is None else Language.parse(target_lang)
        self.scorers = build_scorers(self.language, lowercase)

    @property
    def names(self) -> list[str]:
        """The names of the scores."""
        return [*self.scorers]

    def normalize(self, text: str) -> str:
        """The text as it is compared, before its words are found."""
        text = " ".join(unicodedata.normalize("NFC", text).split())
        return text.lower() if self.lowercase else text

    def _build_data_dir(self) -> str:
        return tempfile.gettempdir()  # nothing is written there; the default is made, which a read-only home refuses

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Corpus BLEU, chrF2 and TER.",
            citation="Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018.",
            inputs_description="predictions and references: detokenised text, one reference each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | str]:
        composed = [[unicodedata.normalize("NFC", text) for text in texts] for texts in (predictions, references)]
        has_changed = composed != [predictions, references]
        results: dict[str, float | str] = {}
        for name, scorer in self.scorers.items():
            results[name] = scorer.corpus_score(composed[0], composed[1:]).score
            signature: Signature = scorer.get_signature()
            if has_changed:
                signature.update("unicode", "NFC")
            results[f"{name}_signature"] = str(signature)
        return results


class MultilingualMetric:
    """Scores of translations into several languages: of each by its own rules, as `de_bleu`, and the means, as `bleu`.

    Args:
        metrics: by the languages' names.

    Example:

    ```python
    >>> metric = MultilingualMetric({language: TranslationMetric(target_lang=language) for language in ("de", "fr")})
    >>> texts = ["ein kleiner Test .", "un petit test ."]
    >>> scores = metric.compute(predictions=[texts[0], "rien"], references=texts, language=["de", "fr"])
    >>> round(scores["de_bleu"]), round(scores["fr_bleu"]), round(scores["bleu"])
    (100, 0, 50)
    >>> scores["bleu_signature"]
    'mean:de,fr|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0'

    ```
    """

    def __init__(self, metrics: dict[str, TranslationMetric]) -> None:
        self.metrics = metrics

    @property
    def names(self) -> list[str]:
        """The names of the scores, the means first."""
        return [*self._means, *(f"{language}_{name}" for language, of in self.metrics.items() for name in of.names)]

    @property
    def _means(self) -> list[str]:
        first, *others = self.metrics.values()
        return [name for name in first.names if all(name in other.names for other in others)]

    def compute(self, predictions: list[str], references: list[str], language: list[str]) -> dict[str, float | str]:
        """The scores and their signatures; a mean only if there are texts in every language."""
        scores: dict[str, float | str] = {}
        for name, metric in self.metrics.items():
            rows = [row for row, of_row in enumerate(language) if of_row == name]
            texts = {"predictions": [predictions[i] for i in rows], "references": [references[i] for i in rows]}
            found = metric.compute(**texts) if rows else {}
            scores |= {f"{name}_{key}": value for key, value in found.items()}
        for name in self._means:
            of_name: list = [scores.get(f"{language}_{name}") for language in self.metrics]
            if None not in of_name:
                signatures = dict.fromkeys(str(scores[f"{language}_{name}_signature"]) for language in self.metrics)
                scores[name] = sum(of_name) / len(of_name)
                scores[f"{name}_signature"] = f"mean:{','.join(self.metrics)}|{' '.join(signatures)}"
        return scores

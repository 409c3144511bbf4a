"""BLEU, chrF and TER by sacreBLEU, as an `evaluate.Metric` that needs no network."""

from typing import Any

import datasets
import evaluate
import sacremoses
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.bleu import BLEUScore


class MosesBLEU(BLEU):
    """BLEU of text in the tokens of Moses, which papers call tokenised BLEU. No other figure is comparable with it.

    Args:
        language: of the text, such as `"de"`.
        lowercase: ignore case.
    """

    def __init__(self, language: str, lowercase: bool = False) -> None:
        super().__init__(tokenize="none", lowercase=lowercase, force=True)
        self.moses = sacremoses.MosesTokenizer(language)

    def corpus_score(self, hypotheses: list[str], references: list[list[str]], **kwargs: Any) -> BLEUScore:
        return super().corpus_score(self._tokens(hypotheses), [self._tokens(texts) for texts in references], **kwargs)

    def get_signature(self) -> str:
        moses = f"tok:moses-{self.moses.lang}-sacremoses-{sacremoses.__version__}"
        return str(super().get_signature()).replace("tok:none", moses)

    def _tokens(self, texts: list[str]) -> list[str]:
        return [self.moses.tokenize(text, return_str=True, escape=False) for text in texts]


class TranslationMetric(evaluate.Metric):
    """Corpus BLEU, chrF2 and TER of detokenised text, each with sacreBLEU's signature.

    Args:
        lowercase: ignore case, as for a model of lower-cased text; it shows in the signatures.
        target_lang: adds tokenised BLEU, `moses_bleu`, of this language.

    Example:

    ```python
    >>> scores = TranslationMetric().compute(predictions=["ein kleiner Test ."], references=["ein kleiner Test ."])
    >>> round(scores["bleu"]), scores["bleu_signature"]
    (100, 'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0')

    ```
    """

    def __init__(self, lowercase: bool = False, target_lang: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scorers = {
            "bleu": BLEU(lowercase=lowercase),
            "chrf": CHRF(lowercase=lowercase),
            "ter": TER(case_sensitive=not lowercase),
        }
        if target_lang is not None:
            self.scorers["moses_bleu"] = MosesBLEU(target_lang, lowercase)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Corpus BLEU, chrF2 and TER.",
            citation="Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018.",
            inputs_description="predictions and references: detokenised text, one reference each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | str]:
        results: dict[str, float | str] = {}
        for name, scorer in self.scorers.items():
            results[name] = scorer.corpus_score(predictions, [references]).score
            results[f"{name}_signature"] = str(scorer.get_signature())
        return results

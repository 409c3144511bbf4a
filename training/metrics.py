"""BLEU, chrF and TER by sacreBLEU, as an `evaluate.Metric` that needs no network."""

from typing import Any

import datasets
import evaluate
from sacrebleu.metrics import BLEU, CHRF, TER


class TranslationMetric(evaluate.Metric):
    """Corpus BLEU, chrF2 and TER of detokenised text, each with sacreBLEU's signature.

    Args:
        lowercase: ignore case, as for a model of lower-cased text; it shows in the signatures.

    Example:

    ```python
    >>> scores = TranslationMetric().compute(predictions=["ein kleiner Test ."], references=["ein kleiner Test ."])
    >>> round(scores["bleu"]), scores["bleu_signature"]
    (100, 'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0')

    ```
    """

    def __init__(self, lowercase: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scorers = {
            "bleu": BLEU(lowercase=lowercase),
            "chrf": CHRF(lowercase=lowercase),
            "ter": TER(case_sensitive=not lowercase),
        }

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

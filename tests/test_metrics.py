import pytest
import sacrebleu

from training.metrics import TranslationMetric


PREDICTIONS = ["Ein kleiner Hund läuft .", "Das ist ein Test"]
REFERENCES = ["Ein kleiner Hund läuft schnell.", "Das war ein Test."]


@pytest.mark.parametrize("lowercase", [False, True])
def test_scores_are_sacrebleus_with_their_signatures(lowercase):
    scores = TranslationMetric(lowercase=lowercase).compute(predictions=PREDICTIONS, references=REFERENCES)
    bleu = sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES], lowercase=lowercase)
    assert scores["bleu"] == bleu.score
    assert scores["chrf"] == sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score or lowercase
    assert scores["ter"] == sacrebleu.corpus_ter(PREDICTIONS, [REFERENCES], case_sensitive=not lowercase).score
    assert f"case:{'lc' if lowercase else 'mixed'}" in scores["bleu_signature"]
    assert "tok:13a" in scores["bleu_signature"] and "version:" in scores["ter_signature"]


def test_case_counts_only_without_lowercase():
    shouted = [text.upper() for text in REFERENCES]
    assert TranslationMetric(lowercase=True).compute(predictions=shouted, references=REFERENCES)["bleu"] > 99.9
    assert TranslationMetric().compute(predictions=shouted, references=REFERENCES)["bleu"] < 20


def test_a_metric_can_be_used_again():
    metric = TranslationMetric()
    first = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert metric.compute(predictions=REFERENCES, references=REFERENCES)["bleu"] == pytest.approx(100)
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == first


@pytest.mark.parametrize("lowercase", [False, True])
def test_tokenised_bleu_is_that_of_the_tokens_of_moses(lowercase):
    predictions, references = (
        ['Er sagt: "Der Hund läuft (schnell)."', "Das ist's"],
        ['Er sagt: "Der Hund rennt."', "Das war's"],
    )
    by_hand = [
        ['Er sagt : " Der Hund läuft ( schnell ) . "', "Das ist ' s"],
        ['Er sagt : " Der Hund rennt . "', "Das war ' s"],
    ]
    metric = TranslationMetric(lowercase=lowercase, target_lang="de")
    scores = metric.compute(predictions=predictions, references=references)
    expected = sacrebleu.corpus_bleu(by_hand[0], [by_hand[1]], tokenize="none", lowercase=lowercase, force=True)
    assert scores["moses_bleu"] == pytest.approx(expected.score)
    assert "tok:moses-de-sacremoses-" in scores["moses_bleu_signature"] and "tok:13a" in scores["bleu_signature"]

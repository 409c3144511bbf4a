import importlib.util
import unicodedata

import pytest
import sacrebleu
from datasets import Dataset
from test_tokenization import bert_tokenizer

from admin_hf.parallel_text import as_written
from training.errors import InputError
from training.metrics import Language, TranslationMetric
from training.tokenization import train_tokenizer
from training.tokenized_data import check_references


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


# Three sentences each; what stands for a language that Moses does not know has spaces
SENTENCES = {
    "zh": ["两只红色的狗看见小猫。", "一只年老的猫喜欢汽车。", "四只高大的小鸟听到树木的声音。"],
    "ja": ["二匹の赤い犬が猫を見ています。", "年老いた猫は車が好きです。", "四羽の大きな鳥が木の音を聞く。"],
    "ko": [
        "빨간 개 두 마리가 고양이를 본다.",
        "늙은 고양이는 자동차를 좋아한다.",
        "큰 새 네 마리가 나무 소리를 듣는다.",
    ],
    "th": ["สุนัขสีแดงสองตัวมองเห็นแมว", "แมวแก่ชอบรถยนต์", "นกตัวใหญ่สี่ตัวได้ยินเสียงต้นไม้"],
    "km": ["ឆ្កែក្រហមពីរក្បាលឃើញឆ្មា", "ឆ្មាចាស់ចូលចិត្តរថយន្ត", "បក្សីធំបួនក្បាលឮសំឡេងដើមឈើ"],
    "lo": ["ໝາສີແດງສອງໂຕເຫັນແມວ", "ແມວເຖົ້າມັກລົດ", "ນົກໃຫຍ່ສີ່ໂຕໄດ້ຍິນສຽງຕົ້ນໄມ້"],
    "my": ["ခွေးနီနှစ်ကောင်ကြောင်ကိုမြင်သည်", "ကြောင်အိုကြီးသည်ကားကိုကြိုက်သည်", "ငှက်ကြီးလေးကောင်သစ်ပင်အသံကြားသည်"],
    "tr": [
        "İki kırmızı köpek kediyi görüyor.",
        "Yaşlı kedi arabayı seviyor.",
        "Dört büyük kuş ağacın sesini duyuyor.",
    ],
}
TOKENS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab", "tr": "13a"}


def half_wrong(text: str) -> str:
    """Every second pair of characters is another one, but for spaces."""
    return "".join("X" if i // 2 % 2 and c != " " else c for i, c in enumerate(text))


def installed(tokenizer: str) -> str:
    package = {"ja-mecab": "MeCab", "ko-mecab": "mecab_ko"}.get(tokenizer)
    return tokenizer if package is None or importlib.util.find_spec(package) else "char"


@pytest.mark.parametrize("language", SENTENCES)
def test_every_language_is_scored_by_what_its_words_are(language):
    references = SENTENCES[language]
    metric = TranslationMetric(target_lang=language)
    perfect = metric.compute(predictions=references, references=references)
    assert perfect["bleu"] == pytest.approx(100) and perfect["chrf"] == pytest.approx(100) and perfect["ter"] == 0
    tokenizer = installed(TOKENS.get(language, "char"))
    assert f"tok:{tokenizer}" in perfect["bleu_signature"]
    predictions = [half_wrong(text) for text in references]
    scores = metric.compute(predictions=predictions, references=references)
    assert scores["bleu"] == sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score
    assert 0 < scores["bleu"] < 60 and 0 < scores["chrf"] < 80
    ter = {"normalized": True, "asian_support": True} if language in ("zh", "ja", "ko") else {}
    if tokenizer == "char" and not ter:
        wrong, all_ = (
            sum(map(count, predictions)) for count in (lambda t: t.count("X"), lambda t: len(t.replace(" ", "")))
        )
        assert scores["ter"] == pytest.approx(100 * wrong / all_), "a substitution for each wrong character"
        assert "tok:tercom-char" in scores["ter_signature"] and "shifts:no" in scores["ter_signature"]
    else:
        expected = sacrebleu.corpus_ter(predictions, [references], case_sensitive=True, **ter)
        assert scores["ter"] == expected.score
        assert f"asian:{'yes' if ter else 'no'}" in scores["ter_signature"]
    assert 20 < scores["ter"] <= 100
    assert ("moses_bleu" in scores) == (language == "tr")


def test_moses_says_which_languages_it_has_no_abbreviations_of():
    scores = TranslationMetric(target_lang="tr").compute(predictions=SENTENCES["tr"], references=SENTENCES["tr"])
    assert scores["moses_bleu"] == pytest.approx(100)
    assert "tok:moses-tr-prefixes-en-sacremoses-" in scores["moses_bleu_signature"]


@pytest.mark.parametrize(
    ("tag", "tokenizer", "code"),
    [
        ("zh", "zh", "zh"),
        ("ZH", "zh", "zh"),
        ("zh-CN", "zh", "zh"),
        ("zh_TW", "zh", "zh"),
        ("zho_Hant", "zh", "zh"),
        (">>cmn_Hans<<", "zh", "zh"),
        ("yue", "zh", "yue"),
        ("ja_XX", "ja-mecab", "ja"),
        ("jpn_Jpan", "ja-mecab", "ja"),
        ("kor_Hang", "ko-mecab", "ko"),
        ("tha", "char", "th"),
        ("khm_Khmr", "char", "km"),
        ("bur", "char", "my"),
        ("bo", "char", "bo"),
        ("dzo", "char", "dz"),
        ("shn_Mymr", "char", "shn"),
        ("jav_Java", "char", "jv"),
        ("jv", "13a", "jv"),
        ("nan_Latn", "13a", "nan"),
        ("deu_Latn", "13a", "de"),
        ("pt-BR", "13a", "pt"),
        ("german", "13a", "german"),
        ("cn", "13a", "cn"),
    ],
)
def test_a_language_is_known_by_any_usual_tag(tag, tokenizer, code):
    language = Language.parse(tag)
    assert (language.tokenizer, language.code) == (tokenizer, code)
    assert language.has_moses_tokens == (tokenizer == "13a" and tag not in ("german", "cn"))


def test_both_normal_forms_are_the_same_text_and_said():
    texts = {
        form: [unicodedata.normalize(form, text) for text in ("Mädchen läuft über Öl.", "각 나무")]
        for form in ("NFC", "NFD")
    }
    for lowercase in (False, True):
        metric = TranslationMetric(lowercase, "de")
        plain = metric.compute(predictions=texts["NFC"], references=texts["NFC"])
        assert "unicode" not in " ".join(plain[name] for name in plain if name.endswith("signature"))
        for predictions, references in (("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")):
            scores = metric.compute(predictions=texts[predictions], references=texts[references])
            for name in ("bleu", "chrf", "ter", "moses_bleu"):
                assert scores[name] == plain[name]
                *parts, form, version = scores[f"{name}_signature"].split("|")
                assert "|".join([*parts, version]) == plain[f"{name}_signature"] and form == "unicode:NFC"


def test_characters_that_only_look_alike_stay_different():
    scores = TranslationMetric(target_lang="zh").compute(
        predictions=["你好,世界!再见"], references=["你好，世界！再见"]
    )
    assert scores["bleu"] < 50 and scores["ter"] > 0 and "unicode" not in scores["bleu_signature"]


# --- what scores cannot say -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([["Ein Mädchen läuft über die Brücke.", "Zwei Hunde, drei Katzen!"] * 3], 70)


def split(tokenizer, *targets: str, sources: tuple[str, ...] | None = None) -> Dataset:
    """As a split is when it is evaluated: the longest first."""
    rows = [
        {"index": i, "source": source, "target": target, "labels": tokenizer(text_target=target)["input_ids"]}
        for i, (source, target) in enumerate(zip(sources or ("x",) * len(targets), targets, strict=True))
    ]
    return Dataset.from_list(sorted(rows, key=lambda row: -len(row["labels"])))


def warnings(caplog, tokenizer, data: Dataset, language: str = "de", lowercase: bool = False) -> str:
    caplog.clear()
    check_references(TranslationMetric(lowercase, language), tokenizer, {"validation": data}, 100)
    return caplog.text


def test_targets_that_the_tokenizer_gives_back_are_nothing_to_warn_of(tokenizer, caplog):
    decomposed = unicodedata.normalize("NFD", "Ein Mädchen läuft.")
    assert (
        warnings(
            caplog, tokenizer, split(tokenizer, "Ein Mädchen  läuft.", decomposed, "\u200b", sources=("x", "x", ""))
        )
        == ""
    )


def test_targets_that_the_tokenizer_changes_are_counted(tokenizer, caplog):
    data = split(tokenizer, "Zwei Hunde", "Zwei Katzen 猫!", "Ein Ölfaß", "Hunde")
    text = warnings(caplog, tokenizer, data)
    assert "2 of 4 validation pairs (the first is number 2) have targets that the tokenizer does not give back" in text
    assert "of '猫!' it makes '!'." in text


def test_an_accent_that_is_stripped_is_said(caplog):
    bert = bert_tokenizer()
    text = warnings(caplog, bert, split(bert, "zwei hunde", "ein Mädchen"), lowercase=True)
    assert "1 of 2 validation pairs (the first is number 2)" in text and "of 'ädchen' it makes 'adchen'" in text


def test_a_pair_without_a_target_is_said_and_none_at_all_refused(tokenizer, caplog):
    data = split(tokenizer, "Hunde", " ", "", sources=("dogs", "cats", ""))
    assert (
        "1 of 3 validation pairs (the first is number 2) have no target; they are translated, but not scored"
        in warnings(caplog, tokenizer, data)
    )
    with pytest.raises(InputError, match="None of the 2 validation pairs has a target"):
        warnings(caplog, tokenizer, split(tokenizer, "", "\ufeff"))


@pytest.mark.parametrize(("language", "said"), [("de", True), ("cn", True), ("zh", False), ("th", False)])
def test_targets_without_spaces_in_a_language_with_spaces_are_said(tokenizer, caplog, language, said):
    text = warnings(caplog, tokenizer, split(tokenizer, *SENTENCES["zh"]), language)
    assert (
        "3 of 3 validation pairs (the first is number 1) have targets without spaces between words" in text
    ) == said
    assert ("--target_lang cn is not a known language code" in text) == (language == "cn")


def test_a_line_is_what_was_decoded_but_for_line_ends():
    line = "10\u00a0% \u3000 groß"
    assert as_written(f" {line}\r\n\u2028\x85 noch\x0bso\r") == f"{line}    noch so"
    assert as_written(line) == line
    for separator in "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029":
        assert len(as_written(f"a{separator}b").splitlines()) == 1


def test_scores_need_no_folder_of_their_own(tmp_path):
    """A home that cannot be written to, as in many containers."""
    (tmp_path / "file").touch()
    scores = TranslationMetric(cache_dir=str(tmp_path / "file" / "cache")).compute(
        predictions=["ein Satz für vier Wörter"], references=["ein Satz für vier Wörter"]
    )
    assert scores["bleu"] == pytest.approx(100)

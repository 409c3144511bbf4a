"""Several target languages: a tag before the source chooses one, in training, scores, exports and users' text."""

import json
import logging
import random
from types import SimpleNamespace

import pytest
import sacrebleu
from datasets import Dataset
from huggingface_hub import ModelCard
from tiny_runs import arguments, assert_equal_weights, flags, run
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, MarianMTModel, PreTrainedTokenizerFast

from admin_hf import translate
from admin_hf.__main__ import main
from admin_hf.encoding import Encoder, read_control_tokens_as_text
from admin_hf.report.text import first_target, predictions
from admin_hf.run.folder import Run
from admin_hf.translation.lines import LineTranslator
from training.arguments import parse_arguments
from training.data import contents_of
from training.metrics import MultilingualMetric, TranslationMetric
from training.results import collect, page
from training.tokenized_data import prepare_data


LANGUAGES = ("de", "fr", "cs")
WORDS = ("one", "two", "six", "ten", "red", "big", "cat", "dog")
SHAPE = "d_model=32,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=64,decoder_ffn_dim=64"
SHAPE += ",encoder_attention_heads=2,decoder_attention_heads=2,dropout=0"
OPTIONS = {"target_lang": ",".join(LANGUAGES), "config_overrides": SHAPE, "vocab_size": 80}


def in_language(line: str, language: str) -> str:
    """Word for word; no two languages share a word."""
    return " ".join(f"{word[0]}{language}{word[1:]}" for word in line.split())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences of eight words, in toy languages."""
    folder, draw = tmp_path_factory.mktemp("toy"), random.Random(0)
    for split, count in {"train": 400, "validation": 15, "test": 20}.items():
        lines = [" ".join(draw.sample(WORDS, k=draw.randint(2, 4))) for _ in range(count)]
        for name in ("en", *LANGUAGES):
            texts = lines if name == "en" else [in_language(line, name) for line in lines]
            (folder / f"{split}.{name}").write_text("".join(f"{text}\n" for text in texts))
    return folder


def lines_of(path) -> list[str]:
    return path.read_text().splitlines()


def prepared(data, output, **changes):
    values = arguments(data, output, cache_dir=output / "cache", do_eval=True, do_predict=True, **OPTIONS | changes)
    return prepare_data(parse_arguments(flags(values)))


# --- what is trained on ---------------------------------------------------------------------------


def test_every_source_is_tagged_and_a_tag_is_one_token(data, tmp_path):
    raw, tokenizer, splits = prepared(data, tmp_path)
    stock = {**raw["train"]}
    tags = {language: tokenizer.convert_tokens_to_ids(f">>{language}<<") for language in LANGUAGES}
    assert len({*tags.values()}) == 3 and tokenizer.unk_token_id not in tags.values()
    assert tokenizer.eos_token_id == 0 and tokenizer.pad_token_id == len(tokenizer) - 1, "Marian's layout"
    assert len(splits["train"]) == 3 * 400 and len(splits["test"]) == 3 * 20
    for split in ("train", "validation"):
        for row in splits[split]:
            assert row["input_ids"][0] == tags[row["language"]]
            assert not {*row["input_ids"][1:], *row["labels"]} & {*tags.values()}
    first = stock["fr"][0]
    row = next(row for row in splits["train"] if row["language"] == "fr")
    assert row["input_ids"] == tokenizer(f">>fr<< {first['source']}")["input_ids"], "as users write it"
    assert tokenizer.decode(row["labels"], skip_special_tokens=True) == in_language(first["source"], "fr")


def test_a_tag_within_a_line_is_text(data, tmp_path, caplog):
    for name in ("en", *LANGUAGES):
        text = (data / f"train.{name}").read_text()
        (tmp_path / f"train.{name}").write_text(text.replace(text.split("\n")[0], ">>fr<< one", 1))
    with caplog.at_level(logging.WARNING):
        _, tokenizer, splits = prepared(data, tmp_path / "run", train_file=tmp_path / "train", vocab_size=90)
    assert splits["train"][0]["input_ids"].count(tokenizer.convert_tokens_to_ids(">>fr<<")) == 0
    assert splits["train"][0]["input_ids"][0] == tokenizer.convert_tokens_to_ids(">>de<<")
    said = "(the first is number 1) contain the name of a control token, such as <s>, which is read as text"
    assert said in caplog.text


def test_a_tag_is_followed_by_one_space_whatever_the_tokenizer_makes_of_two():
    """As in training and in stock Transformers; a tokenizer of bytes keeps every space."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["</s>", "<pad>", ">>de<<", ">>fr<<"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["red one", "two dogs"], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<pad>")
    tokenizer = read_control_tokens_as_text(tokenizer, ">>de<< >>fr<< ")
    engine = SimpleNamespace(generation_config=GenerationConfig(max_length=20), positions=None)
    translator = LineTranslator(engine, tokenizer)
    lines = [">>de<< red one", "  >>fr<<two dogs", ">>de<<   two dogs", ">>de<< \u200b", " red"]
    expected = [
        Encoder(tokenizer, prefix=prefix)([text]).ids[0]
        for prefix, text in ((">>de<< ", "red one"), (">>fr<< ", "two dogs"), (">>de<< ", "two dogs"), ("", " red"))
    ]
    assert translator._encode(lines) == dict(zip([0, 1, 2, 4], expected, strict=True)), "a blank one stays blank"


def test_limits_are_of_each_language_and_source_text_alone_has_no_scores(data, tmp_path):
    changes = {"max_train_samples": 300, "max_eval_samples": 4, "test_file": data / "test.en"}
    raw, _, splits = prepared(data, tmp_path, **changes)
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [900, 12, 60]
    assert "target" not in splits["test"].column_names
    assert [*contents_of(raw)["train"]] == [str(data / f"train.{name}") for name in ("en", *LANGUAGES)]


def test_each_text_of_a_data_set_by_name_is_recorded():
    texts = {"de": Dataset.from_dict({"source": ["a"]}), "fr": Dataset.from_dict({"source": ["b"]})}
    for name, dataset in texts.items():
        dataset.info.download_checksums = {"user/set": {"num_bytes": 1, "checksum": name}}
    found = contents_of({"train": texts})["train"]
    assert [content["checksum"] for content in found.values()] == ["de", "fr"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_lang": "de,de"}, "--target_lang de,de has 'de' twice"),
        ({"target_lang": "de,en"}, "are both 'en'"),
        ({"target_lang": "de, fr"}, "expected languages with commas between them"),
        ({"target_lang": "de fr"}, "expected languages with commas between them"),
        ({"target_lang": "de;fr"}, "expected languages with commas between them"),
        ({"target_lang": "de,"}, "expected languages with commas between them"),
        ({"target_lang": "de,sv"}, "train.sv does not exist"),
        ({"target_lang": "de,zh", "metric_for_best_model": "moses_bleu"}, "no Moses tokenizer for --target_lang zh"),
    ],
)
def test_languages_that_cannot_be_trained_are_refused(data, tmp_path, capsys, changes, message):
    assert run(data, tmp_path / "run", **OPTIONS | changes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_test_set_in_some_of_the_languages_is_refused(data, tmp_path, capsys):
    for name in ("en", "de", "fr"):
        (tmp_path / f"test.{name}").write_text("one\n")
    assert run(data, tmp_path / "run", test_file=tmp_path / "test", do_predict=True, **OPTIONS) == 2
    assert "The test data have no 'cs'" in capsys.readouterr().err


def test_a_tokenizer_without_a_tag_is_refused_and_so_are_sources_without_one(data, tmp_path, capsys):
    one = OPTIONS | {"target_lang": "de", "vocab_size": 50}
    assert run(data, tmp_path / "german", **one, max_steps=1) == 0
    assert run(data, tmp_path / "new", **OPTIONS, tokenizer_name=tmp_path / "german") == 2
    assert "The tokenizer does not have >>de<<, by which --target_lang de,fr,cs" in capsys.readouterr().err
    scored = {"do_train": None, "do_predict": True, "max_steps": None, "config_overrides": None}
    assert run(data, tmp_path / "german", **(OPTIONS | scored | {"vocab_size": 50})) == 2, "nor has the run's own"
    assert "The tokenizer does not have >>de<<, by which --target_lang de,fr,cs" in capsys.readouterr().err
    assert not (tmp_path / "german" / "generated_predictions.de.txt").exists()
    assert run(data, tmp_path / "all", **OPTIONS, max_steps=1) == 0
    trained = {"model_name_or_path": tmp_path / "all", "config_overrides": None, "vocab_size": None, "max_steps": 1}
    assert run(data, tmp_path / "on", **one | trained) == 2
    assert "whose sources begin with a language code, such as >>cs<<: give" in capsys.readouterr().err
    assert run(data, tmp_path / "on", **one | trained, source_prefix=">>de<< ") == 0
    assert run(data, tmp_path / "two", **one | trained | {"target_lang": "cs,de"}) == 0


def test_a_run_goes_on_as_if_it_had_not_been_stopped(data, tmp_path):
    options = OPTIONS | {"lr_scheduler_type": "constant", "save_steps": 2}
    assert run(data, tmp_path / "whole", **options) == 0
    assert run(data, tmp_path / "stopped", **options, max_steps=2) == 0
    assert run(data, tmp_path / "stopped", **options) == 0
    assert_equal_weights(tmp_path / "whole", tmp_path / "stopped")
    recorded = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert [file["name"] for file in recorded["train"]] == [f"train.{name}" for name in ("en", *LANGUAGES)]


def test_other_text_in_one_of_the_languages_is_refused(data, tmp_path, capsys):
    assert run(data, tmp_path / "run", **OPTIONS, max_steps=1) == 0
    for name in ("en", *LANGUAGES):
        text = (data / f"train.{name}").read_text()
        (tmp_path / f"train.{name}").write_text(text.replace("a", "b") if name == "fr" else text)
    assert run(data, tmp_path / "run", **OPTIONS, train_file=tmp_path / "train") == 2
    assert "train.fr had" in capsys.readouterr().err


def test_scores_of_a_language_are_those_of_its_own_lines():
    metric = MultilingualMetric({language: TranslationMetric(target_lang=language) for language in ("de", "zh")})
    references = ["ein Hund läuft über das Gras", "一只狗在草地上奔跑", "zwei Hunde sitzen im Schnee"]
    lines = ["ein Hund rennt über das Gras", "一只狗在雪地上奔跑", "zwei Hunde sitzen im Gras"]
    scores = metric.compute(predictions=lines, references=references, language=["de", "zh", "de"])
    german = sacrebleu.corpus_bleu(lines[::2], [references[::2]]).score
    chinese = sacrebleu.corpus_bleu(lines[1:2], [references[1:2]], tokenize="zh").score
    assert 0 < german < 100 and 0 < chinese < 100 and german != chinese
    assert scores["de_bleu"] == pytest.approx(german) and scores["zh_bleu"] == pytest.approx(chinese)
    assert scores["bleu"] == pytest.approx((german + chinese) / 2)
    assert "tok:13a" in scores["bleu_signature"] and "tok:zh" in scores["bleu_signature"]
    assert "de_moses_bleu" in scores and not scores.keys() & {"zh_moses_bleu", "moses_bleu"}
    assert {*metric.names} == {name for name, score in scores.items() if not isinstance(score, str)}
    alone = metric.compute(predictions=lines[::2], references=references[::2], language=["de", "de"])
    assert "de_bleu" in alone and "bleu" not in alone


# --- what is learnt -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run that has learnt its languages."""
    output = tmp_path_factory.mktemp("trained") / "run"
    options = {
        "max_steps": 300,
        "per_device_train_batch_size": 64,
        "do_eval": True,
        "do_predict": True,
        "learning_rate": 0.005,
    }
    assert run(data, output, **OPTIONS | options) == 0
    return output


def expected(data, language: str) -> list[str]:
    return lines_of(data / f"test.{language}")


def are_in(lines: list[str], language: str) -> bool:
    return {word for line in lines for word in line.split()} <= {in_language(word, language) for word in WORDS}


@pytest.mark.slow
def test_the_tag_decides_the_language(data, trained):
    for language in LANGUAGES:
        lines = lines_of(trained / f"generated_predictions.{language}.txt")
        assert are_in(lines, language)
        right = sum(line == target for line, target in zip(lines, expected(data, language), strict=True))
        assert right >= 18, "of 20"
    assert not (trained / "generated_predictions.txt").exists()


@pytest.mark.slow
def test_each_language_has_its_scores_and_there_is_a_mean(data, trained):
    scores = json.loads((trained / "results.json").read_text())["scores"]
    found = {}
    for language in LANGUAGES:
        lines = lines_of(trained / f"generated_predictions.{language}.txt")
        found[language] = sacrebleu.corpus_bleu(lines, [expected(data, language)]).score
        assert scores[f"test_{language}_bleu"] == pytest.approx(found[language])
        assert scores[f"vanilla_test_{language}_bleu"] == pytest.approx(found[language])
        assert f"tok:moses-{language}" in scores[f"eval_{language}_moses_bleu_signature"]
    assert scores["test_bleu"] == pytest.approx(sum(found.values()) / 3)
    assert scores["test_bleu_signature"].startswith("mean:de,fr,cs|nrefs:1|")
    assert {"eval_loss", "eval_bleu", "test_loss"} <= scores.keys()


@pytest.mark.slow
def test_stock_marian_and_ctranslate2_read_the_tags_of_users(data, trained, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(trained / "vanilla")
    model = MarianMTModel.from_pretrained(trained / "vanilla")
    tagged = [f">>{language}<< {line}" for line in expected(data, "en") for language in LANGUAGES]
    by_tag = [
        lines_of(trained / f"generated_predictions.{language}.txt")[row] for row in range(20) for language in LANGUAGES
    ]
    ids = model.generate(**tokenizer(tagged, return_tensors="pt", padding=True))
    assert [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)] == by_tag
    ctranslate2 = pytest.importorskip("ctranslate2")
    converter = ctranslate2.converters.TransformersConverter(str(trained / "vanilla"))
    converter.convert(str(tmp_path / "ct2"))
    translator = ctranslate2.Translator(str(tmp_path / "ct2"))
    sources = [tokenizer.convert_ids_to_tokens(tokenizer(line)["input_ids"]) for line in tagged]
    results = translator.translate_batch(sources, beam_size=1)
    texts = [tokenizer.decode(tokenizer.convert_tokens_to_ids(result.hypotheses[0])) for result in results]
    assert [text.strip() for text in texts] == by_tag


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "vanilla", "checkpoint-300"])
def test_the_command_reads_tags_of_lines_or_of_the_prefix(data, trained, tmp_path, capsys, folder):
    english, results = expected(data, "en"), {}
    for language in LANGUAGES:
        results[language] = lines_of(trained / f"generated_predictions.{language}.txt")
        command = ["translate", str(trained / folder), str(data / "test.en"), "--source_prefix", f">>{language}<< "]
        assert main(command) == 0
        assert capsys.readouterr().out.splitlines() == results[language]
    file = tmp_path / "mixed.en"
    file.write_text("".join(f"  >>{LANGUAGES[row % 3]}<<{line}\n" for row, line in enumerate(english)))
    assert main(["translate", str(trained / folder), str(file)]) == 0
    mixed = [results[LANGUAGES[row % 3]][row] for row in range(20)]
    assert capsys.readouterr().out.splitlines() == mixed


@pytest.mark.slow
def test_lines_without_a_tag_of_the_model_are_said(trained, caplog):
    tokenizer = AutoTokenizer.from_pretrained(trained / "vanilla")
    model = MarianMTModel.from_pretrained(trained / "vanilla")
    lines = [">>fr<< one two", "one two", "", ">>es<< one two", ">>fr<<"]
    with caplog.at_level(logging.WARNING, logger="transformers"):
        found = translate(model, tokenizer, lines)
    assert "Some lines (2, 4) do not begin with a language code, such as >>cs<<" in caplog.text
    assert found[0] == in_language("one two", "fr") and found[2] == found[4] == ""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        assert translate(model, tokenizer, ["one two"], source_prefix=">>de<< ") == [in_language("one two", "de")]
    assert not caplog.text


@pytest.mark.slow
def test_card_report_and_results_page_tell_the_languages_apart(trained):
    card = ModelCard.load(trained / "vanilla" / "README.md")
    assert card.data.language == ["en", *LANGUAGES]
    assert '">>de<< A dog runs."' in card.text and "| test fr | BLEU |" in card.text
    assert first_target(Run(trained)) == ("de", ">>de<< ")
    samples = predictions(Run(trained), 20)
    assert [sample.translation for sample in samples] == lines_of(trained / "generated_predictions.de.txt")
    assert are_in([sample.reference for sample in samples], "de")
    text = page([collect(trained) | {"profile": None}])
    assert all(f"| test {language} |" in text for language in LANGUAGES)

"""Text is text: whatever a line holds is encoded as characters, and decoded as it was."""

import json
import logging
import random
import subprocess
import sys

import hypothesis.strategies as st
import layouts
import pytest
from conftest import tiny_model
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from layouts import CODE, LAYOUTS, save_layout
from tiny_runs import run
from transformers import AutoTokenizer

from admin_hf.analysis.inputs import text_batch
from admin_hf.encoding import Encoder, control_tokens
from training.arguments import DataTrainingArguments, ModelArguments
from training.batching import TranslationCollator
from training.errors import InputError
from training.tokenization import load_tokenizer, save_tokenizer, train_tokenizer
from training.tokenized_data import tokenize_for_evaluation, tokenize_for_training


NAMES = "<s> </s> <pad> <unk> <mask> <extra_id_0> >>de<< [SEP] <0x41>"
# All of Unicode but surrogates, which are no text, and line feeds; with what is likely to go wrong more often
LINES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=30),
    st.lists(
        st.sampled_from(
            [*NAMES.split(), " ", "▁", "\u200b", "\r", "\u2028", "\x00", "İ", "e\u0301", "漢", "😀", "ab", "1"]
        )
    ).map("".join),
)
# 500 lines, in fewer batches
BATCHES = st.lists(LINES, min_size=10, max_size=10)
many = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def arguments(**changes):
    return DataTrainingArguments(source_lang="en", target_lang="de", **changes)


def load(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)
    save_layout(name, folder)
    return load_tokenizer(str(folder), ModelArguments())


@pytest.fixture(scope="module")
def large():
    """4,200 entries, of which 256 are bytes."""
    letters = random.Random(1)
    words = ["".join(letters.choices("abcdefgh", k=9)) for _ in range(1500)]
    return train_tokenizer([layouts.TEXTS, words], 4200)


@pytest.fixture(scope="module")
def given_tokenizers(tmp_path_factory):
    return {name: load(name, tmp_path_factory) for name in LAYOUTS}


@pytest.fixture(params=LAYOUTS)
def given_tokenizer(request, given_tokenizers):
    return given_tokenizers[request.param]


def decoded(tokenizer, texts):
    return tokenizer.batch_decode(tokenizer(texts)["input_ids"], skip_special_tokens=True)


# --- tokenizers of this project -------------------------------------------------------------------


@many
@example([NAMES, "▁", "▁▂▃ a▁b ▁", "<0x41><0x0A>", "漢字 😀 \u0e01", "\ufdd0", "\x00", "", " ", "\u200b"])
@given(BATCHES)
def test_decoding_gives_every_line_back_in_its_normal_form(large, lines):
    normal = large.backend_tokenizer.normalizer.normalize_str
    assert decoded(large, lines) == [normal(line) for line in lines]
    assert large.unk_token_id not in sum(large(lines)["input_ids"], [])


@many
@given(st.lists(st.text(st.sampled_from("TZwmndü<>/s▁ |\t3([."), max_size=20), min_size=10, max_size=10))
@pytest.mark.parametrize("lowercase", [False, True])
def test_small_vocabularies_give_back_the_characters_that_they_have(lowercase, lines):
    tokenizer = SMALL[lowercase]
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str
    known = [
        line for line in lines if tokenizer.unk_token_id not in tokenizer(line)["input_ids"]
    ]  # such as a lone combining mark
    assert decoded(tokenizer, known) == [normal(line) for line in known]


SMALL = [
    train_tokenizer([[*layouts.TEXTS, "▁ | ( [ / < > "]], 120, lowercase=lowercase) for lowercase in (False, True)
]


def test_bytes_are_no_special_tokens_and_leave_the_layout_as_it_is(large):
    assert len(large) == 4200 and sorted(large.get_vocab().values()) == list(range(4200))
    assert (large.eos_token_id, large.unk_token_id, large.pad_token_id) == (0, 1, 4199)
    first = large.convert_tokens_to_ids("<0x00>")
    assert large.convert_ids_to_tokens(range(first, first + 256)) == [f"<0x{i:02X}>" for i in range(256)]
    assert large.tokenize("漢") == [" ", "<0xE6>", "<0xBC>", "<0xA2>"]
    assert large.tokenize("<0x41>") == [" ", "<", "0", "<0x78>", "4", "<0x31>", ">"]
    assert len(control_tokens(large)) == 3
    assert not any("<0x" in token for token in SMALL[0].get_vocab())


def test_bytes_that_are_no_text_decode_to_one_line(large):
    for tokens in (["<0xE6>", "<0xBC>"], ["<0xFF>", " a", "<0x0A>", "<0x0D>"], ["<0xE6>"] * 9, ["</s>", "<0x80>"]):
        text = large.decode(large.convert_tokens_to_ids(tokens), skip_special_tokens=True)
        assert "\ufffd" in text and len(" ".join(text.split()).splitlines()) == 1


def test_it_is_the_same_after_saving(tmp_path, large):
    """In a process with stock Transformers alone."""
    save_tokenizer(large, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "marian"}')
    line = f"Two {NAMES} ▁ 漢"
    program = (
        "import json, sys; from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); ids = tokenizer(sys.argv[2])['input_ids']\n"
        "print(json.dumps([ids, tokenizer.decode(ids, skip_special_tokens=True)]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path), line]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [large(line)["input_ids"], line]


@pytest.mark.parametrize("size", [5000, 1200, 700, 100, 20])
def test_the_size_that_a_refused_vocabulary_is_told_fits(size):
    """With and without bytes: the data gives some 600 entries of its own, and has 40 characters."""
    letters = random.Random(1)
    texts = [["".join(letters.choices("abcdefghijklmnopqrstuvwxyzäöüABCDEFG0", k=4)) for _ in range(150)]]
    with pytest.raises(InputError) as refused:
        for tried in (size, size - 60):  # one of them cannot be
            train_tokenizer(texts, tried)
    told = int(str(refused.value).rpartition(" ")[2].rstrip("."))
    assert len(train_tokenizer(texts, told)) == told


# --- tokenizers that are given --------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@many
@example([NAMES, f"{CODE} a", f"a{CODE}a", "</s>", "a</s>a <s>a<pad>", "<mask>", " <mask> ", "▁", "\x00", ""])
@given(lines=BATCHES)
def test_nothing_in_a_line_is_a_control_token(given_tokenizers, name, lines):
    tokenizer = given_tokenizers[name]
    controls = {*control_tokens(tokenizer).values()} - {tokenizer.unk_token_id}
    for encoder in (Encoder(tokenizer), Encoder(tokenizer, target=True)):
        for ids in encoder(lines).ids:
            assert ids[: len(encoder.front)] == encoder.front and ids[-1:] == encoder.back == [tokenizer.eos_token_id]
            assert controls.isdisjoint(ids[len(encoder.front) : -1])
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert len(" ".join(text.split()).splitlines()) <= 1


@pytest.mark.parametrize("name", ["bart", "t5", "t5_class", "fairseq"])
def test_names_of_control_tokens_are_decoded_as_they_were(tmp_path, given_tokenizers, name):
    """Also in stock Transformers, which loads what was saved."""
    line = f"so gut <s>gut</s> <pad> <unk>gut<unk> <mas> </s>so {CODE}"
    tokenizer = given_tokenizers[name]
    (ids,) = Encoder(tokenizer)([line]).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == line
    tokenizer.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock(line)["input_ids"] == ids
    assert (
        load_tokenizer(str(tmp_path), ModelArguments()).backend_tokenizer.to_str() == stock.backend_tokenizer.to_str()
    )


def test_a_word_that_is_a_control_token_becomes_unknown_where_the_tokenizer_cannot_help_it(given_tokenizers, caplog):
    tokenizer = given_tokenizers["marian"]
    data = Dataset.from_dict({"source": ["gut", f"{CODE} gut", "gut"], "target": ["gut"] * 3})
    tokenized = tokenize_for_evaluation(data, tokenizer, arguments(), "test").sort("index")
    assert tokenized["input_ids"][1] == [tokenizer.unk_token_id, *tokenized["input_ids"][0]]
    assert "1 of 3 test sources (the first is number 2) contain the name of a control token that this" in caplog.text


@pytest.mark.parametrize("prefix", ["translate: ", f"{CODE} ", f"{CODE}", f"so {CODE} gut: "])
def test_a_prefix_is_read_as_before(given_tokenizers, given_tokenizer, prefix):
    """Control tokens in it are control tokens, and what follows is as if it were one text."""
    expected = given_tokenizer(f"{prefix}Two young men", split_special_tokens=False)["input_ids"]
    encoder = Encoder(given_tokenizer, prefix=prefix)
    assert encoder(["Two young men"]).ids == [expected]
    (guarded,) = encoder(["Two </s> men"]).ids
    assert guarded.count(given_tokenizer.eos_token_id) == 1
    code = control_tokens(given_tokenizer).get(CODE)
    if code is not None:
        assert expected.count(code) == encoder([f"Two {CODE}"]).ids[0].count(code)
        assert expected.count(code) == 1 or not prefix.startswith(CODE)


@pytest.mark.parametrize("name", ["bart", "t5", "words", "marian"])
def test_who_translates_with_a_prefix_gets_its_control_tokens(tmp_path, name):
    (tmp_path / "given").mkdir()
    save_layout(name, tmp_path / "given")
    load_tokenizer(str(tmp_path / "given"), ModelArguments(), f"{CODE} ").save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer(f"{CODE} Two")["input_ids"].count(tokenizer.convert_tokens_to_ids(CODE)) == 1


# --- training and evaluation data -----------------------------------------------------------------


def tokenize(tokenizer, sources, targets, **changes):
    return tokenize_for_training(
        Dataset.from_dict({"source": sources, "target": targets}), tokenizer, arguments(**changes)
    )


def test_the_user_is_told_of_names_of_control_tokens_and_of_marks_that_are_lost(given_tokenizers, caplog):
    sources = ["so gut", "gut </s> so", "gut", "<pad> gut"]
    with caplog.at_level(logging.WARNING, logger="training.data"):
        tokenized = tokenize(given_tokenizers["t5"], sources, ["gut"] * 3 + ["so▁gut"])
    tokenizer = given_tokenizers["t5"]
    assert [ids.count(1) for ids in tokenized["input_ids"]] == [1] * 4 and 0 not in tokenized["input_ids"][3]
    assert tokenizer.batch_decode(tokenized["input_ids"][:], skip_special_tokens=True) == sources
    assert "2 of 4 training sources (the first is number 2) contain the name of a control token" in caplog.text
    assert "1 of 4 training targets (the first is number 4) contain a character by which" in caplog.text
    caplog.clear()
    tokenize(given_tokenizers["bart"], ["▁"], ["a▁b"])
    tokenize(SMALL[0], ["so gut"], ["▁ gut"])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_targets_begin_with_their_first_word(given_tokenizers):
    """The decoder starts from its own token; `<s>` before every target would be one more to predict, for nothing."""
    tokenizer = given_tokenizers["bart"]
    tokenized = tokenize(tokenizer, ["Two men"], ["Two men"])
    assert tokenized["input_ids"][0] == tokenizer("Two men")["input_ids"]
    assert tokenized["labels"][0] == tokenizer("Two men")["input_ids"][1:]


def test_invisible_text_is_empty_in_training(large, given_tokenizers, caplog):
    sources = ["a", "\u200b", "\ufeff \u2060", "b", None]
    with caplog.at_level(logging.WARNING, logger="training.data"):
        tokenized = tokenize(large, sources, ["x", "y", "y", "\u200b", "y"])
    assert len(tokenized) == 1 and "4 empty on one side" in caplog.text
    # BERT's normaliser leaves nothing of a private character
    assert len(tokenize(given_tokenizers["bert"], ["men"] * 2, ["men", "\ue000"])) == 1


UNKNOWN_TO_GIVEN = "Привет всем людям, как ваши дела"


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("name", ["t5", "fairseq", "words", "bert", "marian"])
def test_training_text_that_the_tokenizer_does_not_know_is_refused(given_tokenizers, name, side):
    pairs = {"source": ["Two young"] * 3, "target": ["so gut"] * 3, side: [UNKNOWN_TO_GIVEN] * 3}
    with pytest.raises(InputError, match=rf"does not know \d+% of the tokens of the training {side}s"):
        tokenize(given_tokenizers[name], **{f"{key}s": texts for key, texts in pairs.items()})


def test_few_unknown_tokens_are_said_and_none_are_not(given_tokenizers, caplog):
    tokenizer = given_tokenizers["fairseq"]
    with caplog.at_level(logging.WARNING, logger="training.data"):
        tokenize(tokenizer, ["so gut wie hier"] * 200, ["gut"] * 199 + ["漢"])
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        tokenize(tokenizer, ["gut"] * 9, ["Mädchen"] * 7 + ["漢 ist gut"] + ["gut"])
        share = 1 / sum(len(tokenizer.tokenize(text)) for text in ["Mädchen"] * 7 + ["漢 ist gut", "gut"])
        unknown = f"contain tokens that are unknown, {share:.1%}"
        assert f"1 of 9 training targets (the first is number 8) {unknown}" in caplog.text
        assert "sources" not in caplog.text
        caplog.clear()
        test = Dataset.from_dict({"source": ["gut", UNKNOWN_TO_GIVEN]})
        assert len(tokenize_for_evaluation(test, tokenizer, arguments(), "test")) == 2
        assert "1 of 2 test sources (the first is number 2) contain tokens that are unknown, " in caplog.text


def test_padding_is_on_the_right_whatever_the_tokenizer_says(tmp_path, given_tokenizers):
    save_layout("fairseq", tmp_path)
    stored = AutoTokenizer.from_pretrained(tmp_path)
    assert stored.padding_side == stored.truncation_side == "left"
    features = [{"input_ids": [5, 6, 2], "labels": [5, 2]}, {"input_ids": [2], "labels": [2]}]
    loaded = given_tokenizers["fairseq"]
    for tokenizer in (loaded, stored):
        batch = TranslationCollator(tokenizer, tiny_model())(features)
        assert batch["input_ids"].tolist() == [[5, 6, 2], [2, 1, 1]] and batch["labels"].tolist() == [
            [5, 2],
            [2, -100],
        ]
    batch = text_batch(AutoTokenizer.from_pretrained(tmp_path), ["gut so", "gut </s>"], ["gut", "so gut so"])
    assert batch["attention_mask"][:, 0].tolist() == [1, 1] and batch["labels"][:, 0].min() > 3
    assert (batch["input_ids"] == 2).sum(1).tolist() == [1, 1]
    loaded.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.padding_side == saved.truncation_side == "right"


# --- layouts, from the folder to the scores -------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "has no padding token"),
        ({"pad_token": "<|endoftext|>"}, "pads with its end-of-sentence token"),
        ({"pad_token": "<pad>", "unk_token": "<pad>"}, "pads with its token for unknown text"),
        ({"pad_token": "<pad>"}, r"does not end sentences with <\|endoftext\|>"),
    ],
)
def test_layouts_that_cannot_be_trained_with_are_refused(tmp_path, changes, message):
    layouts.gpt2(**changes).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        load_tokenizer(str(tmp_path), ModelArguments())


def test_a_damaged_tokenizer_is_refused(tmp_path):
    save_layout("t5", tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="cannot be loaded: "):
        load_tokenizer(str(tmp_path), ModelArguments())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Files of few pairs, in which there are names of control tokens."""
    folder = tmp_path_factory.mktemp("hostile")
    for split in ("train", "validation", "test"):
        for language in ("en", "de"):
            lines = [*layouts.TEXTS[:6], "so gut", f"gut <s>so</s> gut {CODE}", "<pad> <mask> gut <unk>"]
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["bart", "t5", "fairseq", "marian"])
def test_every_layout_is_trained_exported_and_scored(hostile, tmp_path, name):
    save_layout(name, (tmp_path / "tokenizer"))
    options = {"do_eval": True, "do_predict": True, "tokenizer_name": tmp_path / "tokenizer", "vocab_size": None}
    options |= {"source_prefix": f"{CODE} ", "cache_dir": tmp_path / "cache", "max_steps": 2}
    assert run(hostile, tmp_path / "run", **options) == 0
    scores = json.loads((tmp_path / "run" / "results.json").read_text())["scores"]
    assert scores["eval_loss"] < 8  # ln(320) is 5.8; a banned entry among the labels costs 10,000
    assert len((tmp_path / "run" / "generated_predictions.txt").read_text().splitlines()) == 9
    for folder in ("run", "run/vanilla"):
        saved = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert saved.padding_side == "right"
        assert (
            saved(f"{CODE} gut")["input_ids"]
            == load_tokenizer(str(tmp_path / "tokenizer"), ModelArguments(), f"{CODE} ")(f"{CODE} gut")["input_ids"]
        )

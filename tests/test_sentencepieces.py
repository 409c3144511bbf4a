"""Tokenizers out of sentencepiece models against sentencepiece itself."""

import random
import sys
from pathlib import Path

import pytest
import sentencepiece
from layouts import TEXTS
from tiny_runs import arguments, flags, run
from transformers import AutoTokenizer

import run_translation
from training.arguments import ModelArguments
from training.embedded_data import write_embedded_data
from training.segmentation import BpeDropout
from training.tokenization import load_tokenizer


MULTI30K = Path(__file__).parents[2] / "shared" / "multi30k"
ODD = ["", " ", "  two  spaces ", "x\ty\u00a0z", "①Ⅻ ﬁ ｆｕｌｌ e\u0301", "漢字 😀", "a▁b …"]
_RANDOM = random.Random(0)
ODD += ["".join(_RANDOM.choice("aäßenZ 09.,'▁<>/éﬁ①漢\u00a0\t\u200b") for _ in range(12)) for _ in range(300)]

VARIANTS = {
    "unigram": {"model_type": "unigram"},
    "bpe": {"model_type": "bpe"},
    "unigram, bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 340},
    "bpe, bytes": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 360},
    "text as it is": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "lower case, padding": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf", "pad_id": 3},
    "across words": {"model_type": "unigram", "split_by_whitespace": False},
    "no space in front": {"model_type": "bpe", "add_dummy_prefix": False},
}


def train(folder: Path, texts=TEXTS, **options) -> str:
    """A sentencepiece model; returns its file."""
    options = {"vocab_size": 120, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "joint"), **options
    )
    return str(folder / "joint.model")


def assert_same_ids(file, texts):
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=file), load_tokenizer(file, ModelArguments())
    expected = theirs.encode(texts)
    ids = ours(texts)["input_ids"]
    for text, one, line in zip(texts, expected, ids, strict=True):
        assert line == [*one, theirs.eos_id()], text
        if theirs.unk_id() not in one:
            assert ours.decode(line, skip_special_tokens=True) == theirs.decode(one), text


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_and_text_are_those_of_sentencepiece(variant, tmp_path):
    file = train(tmp_path, **VARIANTS[variant])
    assert_same_ids(file, [*TEXTS[:3], *ODD])


@pytest.mark.slow
@pytest.mark.skipif(not MULTI30K.exists(), reason="Multi30k is not beside the project")
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_ids_and_text_are_those_of_sentencepiece_on_multi30k(model_type, tmp_path):
    lines = [(MULTI30K / f"val.{language}").read_text("utf-8").splitlines() for language in ("en", "de", "fr", "cs")]
    file = train(tmp_path, lines[0] + lines[1], model_type=model_type, vocab_size=2000)
    assert_same_ids(file, sum(lines, []))


def test_padding_comes_behind_all_pieces_unless_there_is_one(tmp_path):
    tokenizer = load_tokenizer(train(tmp_path), ModelArguments())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "joint.model"))
    assert tokenizer.pad_token_id == len(pieces) == len(tokenizer) - 1 and tokenizer.padding_side == "right"
    assert [tokenizer.unk_token_id, tokenizer.eos_token_id] == [pieces.unk_id(), pieces.eos_id()]
    with_padding = load_tokenizer(train(tmp_path, pad_id=3), ModelArguments())
    assert with_padding.pad_token_id == 3 and with_padding.pad_token == "<pad>"


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_names_of_control_tokens_and_bytes_are_text(model_type, tmp_path):
    file = train(tmp_path, model_type=model_type, byte_fallback=True, vocab_size=360)
    tokenizer = load_tokenizer(file, ModelArguments())
    text = "a </s> <pad> <s> <unk> <0x41> b"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_run_needs_the_model_no_more_when_it_is_done(tmp_path):
    write_embedded_data(tmp_path / "data", train=40, validation=4, test=2)
    texts = [(tmp_path / "data" / f"train.{language}").read_text("utf-8") for language in ("en", "de")]
    file = train(tmp_path, "".join(texts).splitlines(), model_type="bpe", vocab_size=100)
    before = load_tokenizer(file, ModelArguments())
    assert run(tmp_path / "data", tmp_path / "out", tokenizer_name=file, vocab_size=None, bpe_dropout=0.1) == 0
    Path(file).unlink()
    published = AutoTokenizer.from_pretrained(tmp_path / "out" / "vanilla")
    assert published(TEXTS)["input_ids"] == before(TEXTS)["input_ids"]
    ids = before("Zwei Menschen")["input_ids"][:-1]
    assert BpeDropout(published, 0.0).segment(ids[:1], random.random, 0.0) == ids[:1]


REFUSED = {
    "words": ({"model_type": "word", "vocab_size": 30}, "is neither a Unigram nor a BPE model"),
    "no end": ({"eos_id": -1}, "has no end-of-sentence token </s>: train it without --eos_id=-1"),
    "symbols": ({"user_defined_symbols": ["<2de>", "xyz"]}, r"has user-defined symbols (<2de>, xyz), which"),
    "suffix": ({"treat_whitespace_as_suffix": True}, "marks spaces in another way than by a ▁ before each word"),
}


def refuse(name, folder, capsys) -> str:
    """The sentence by which the script refuses a tokenizer."""
    given = arguments(folder / "no-data", folder / "out", tokenizer_name=name)
    assert run_translation.main(flags(given)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    assert not (folder / "out").exists()
    return lines[-1]


@pytest.mark.parametrize("case", REFUSED)
def test_other_models_are_refused(case, tmp_path, capsys):
    options, message = REFUSED[case]
    assert message in refuse(train(tmp_path, **options), tmp_path, capsys)


def test_what_is_no_model_is_refused(tmp_path, capsys, monkeypatch):
    for content in (b"", b"no model", b"\x0a\xff\xff\xff\xff\x0f" * 9, b"\x00" * 100):
        (tmp_path / "bad.model").write_bytes(content)
        assert "contains no model of sentencepiece" in refuse(str(tmp_path / "bad.model"), tmp_path, capsys)
    assert "No such file" in refuse(str(tmp_path / "none.model"), tmp_path, capsys)
    two = refuse("source.spm,target.spm", tmp_path, capsys)
    assert "names several sentencepiece models, but source and target share one vocabulary" in two
    file = train(tmp_path)
    for package in ("sentencepiece", "google.protobuf.message"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert "pip install sentencepiece protobuf" in refuse(file, tmp_path, capsys)

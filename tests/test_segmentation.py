"""BPE-dropout against the package tokenizers' own, and what a training with it sees."""

import copy
import pickle
import random
from collections import Counter
from functools import partial

import pytest
import torch
from datasets import Dataset
from layouts import LAYOUTS, TEXTS, bart, fairseq, save_layout, t5
from tiny_runs import SHAPE, arguments, assert_equal_weights, flags, run
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import run_translation
from training.arguments import DataTrainingArguments
from training.batching import longest_side
from training.embedded_data import write_embedded_data
from training.errors import InputError
from training.segmentation import BpeDropout, DropoutCollator, check_bpe
from training.tokenization import train_tokenizer
from training.tokenized_data import tokenize_for_training
from training.trainer import TranslationTrainer


OWN = partial(train_tokenizer, [TEXTS], 150)
BPE = {"own": OWN, "lower case": partial(OWN, lowercase=True), "bytes": bart, "fairseq": fairseq}


def rows(tokenizer, texts=TEXTS, **changes) -> Dataset:
    """Pairs of texts, tokenised as the script does; the target is the source read backwards by words."""
    pairs = {"source": texts, "target": [" ".join(text.split()[::-1]) for text in texts]}
    data = DataTrainingArguments(source_lang="en", target_lang="de", **{"bpe_dropout": 0.1} | changes)
    return tokenize_for_training(Dataset.from_dict(pairs), tokenizer, data)


def own_dropout(tokenizer, dropout):
    """The tokenizer with the dropout of the package tokenizers, whose draws cannot be repeated."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.model.dropout = dropout
    return tokenizer


# --- the segmentation -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", BPE)
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_without_dropout_and_with_nothing_but_it_nothing_is_left_to_chance(layout, dropout):
    tokenizer = BPE[layout]()
    texts = [*TEXTS, "ungesehene Wörter, a漢漢a </s> 😀"]
    data = rows(tokenizer, texts)
    expected = own_dropout(tokenizer, dropout)
    segmentation = BpeDropout(tokenizer, dropout)
    for row, text in zip(data, texts, strict=True):
        ids = expected(text, split_special_tokens=True)["input_ids"]
        assert segmentation.pair(row, epoch=0)["input_ids"] == ids, text
        assert sum(row["source_words"]) == len(row["input_ids"])


def test_nothing_is_merged_across_the_border_of_words():
    """Here words are of three letters, wherever they begin."""
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "</s>", "a", "b", "c", "ca"])}
    backend = Tokenizer(models.BPE(vocabulary, [("c", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(".{3}"), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    (row,) = rows(tokenizer, ["abcabccab"])
    assert row["source_words"] == [3, 3, 2, 1]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [*"abcabc", "ca", "b", "</s>"]
    assert BpeDropout(tokenizer, 0.0).pair(row, 0)["input_ids"] == row["input_ids"]


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_segmentations_are_as_frequent_as_those_of_tokenizers(dropout):
    tokenizer, word, draws = OWN(), "Mädchen", 6000
    assert len(tokenizer.tokenize(word)) < 4
    theirs = own_dropout(tokenizer, dropout)
    expected = Counter(tuple(ids[:-1]) for ids in theirs([word] * draws)["input_ids"])
    segmentation, draw = BpeDropout(tokenizer, dropout), random.Random(0).random
    ids = tokenizer(word)["input_ids"][:-1]
    found = Counter(tuple(segmentation.segment(ids, draw, dropout)) for _ in range(draws))
    assert len(expected) > 5
    for which in expected.keys() | found.keys():
        one, other = expected[which], found[which]
        assert abs(one - other) < 5 * (one + other) ** 0.5 + 5, tokenizer.convert_ids_to_tokens(which)


def test_a_segmentation_follows_from_seed_epoch_and_place_alone():
    tokenizer = OWN()
    data = rows(tokenizer)
    one, same, other = (BpeDropout(tokenizer, 0.5, seed) for seed in (1, 1, 2))
    torch.manual_seed(3)
    first = [one.pair(row, 0) for row in data]
    assert first == [same.pair(row, 0) for row in data.select(range(len(data) - 1, -1, -1))][::-1]
    assert first != [one.pair(row, 1) for row in data] and first != [other.pair(row, 0) for row in data]
    repeated = [pair["input_ids"] for pair in first[:: len(TEXTS) // 10]]  # TEXTS has each line ten times
    assert len(set(map(tuple, repeated))) > 1
    for pair, row in zip(first, data, strict=True):
        for side in ("input_ids", "labels"):
            assert tokenizer.decode(pair[side]) == tokenizer.decode(row[side])


def test_a_prefix_and_its_control_tokens_stay_words_of_their_own():
    tokenizer = fairseq()
    data = rows(tokenizer, source_prefix="<s> to German: ", bpe_dropout=1.0)
    ids = BpeDropout(tokenizer, 1.0).pair(data[0], 0)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert all(len(token) == 1 or token == "<unk>" for token in tokenizer.convert_ids_to_tokens(ids[1:-1]))


def test_what_does_not_fit_is_left_with_fewer_pieces():
    tokenizer = OWN()
    data = rows(tokenizer)
    free, bound = BpeDropout(tokenizer, 0.5, limits=(99, 99)), BpeDropout(tokenizer, 0.5, limits=(60, 50))
    pairs = [(free.pair(row, 0), bound.pair(row, 0), row) for row in data]
    assert any(len(pair["input_ids"]) > 60 for pair, *_ in pairs) or any(len(p["labels"]) > 50 for p, *_ in pairs)
    for _, pair, row in pairs:
        assert len(pair["input_ids"]) <= max(60, len(row["input_ids"]))
        assert len(pair["labels"]) <= max(50, len(row["labels"]))
    row = data[0]
    exactly = {name: row[name] for name in ("input_ids", "labels")}
    assert BpeDropout(tokenizer, 1.0).pair(row, 0, longest=len(row["input_ids"])) == exactly


def test_lengths_leave_room_for_most_pairs_and_no_more():
    tokenizer = OWN()
    data = rows(tokenizer)
    segmentation = BpeDropout(tokenizer, 0.2, limits=(500, 500))
    lengths = segmentation.lengths(data)
    drawn = [[max(map(len, segmentation.pair(row, epoch).values())) for row in data] for epoch in range(1, 11)]
    over = sum(a > b for epoch in drawn for a, b in zip(epoch, lengths, strict=True)) / lengths.size / 10
    assert 0.02 < over < 0.3
    assert (lengths >= data["length"][:]).all() and lengths.mean() < 1.2 * sum(map(sum, drawn)) / lengths.size / 10
    assert BpeDropout(tokenizer, 0.2, limits=(48, 47)).lengths(data).max() == 48


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_bpe_is_taken(layout, tmp_path):
    save_layout(layout, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if layout in ("bart", "fairseq"):
        check_bpe(tokenizer)
    else:
        with pytest.raises(InputError, match="--bpe_dropout needs a BPE tokenizer"):
            check_bpe(tokenizer)


# --- in a training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_embedded_data(folder, train=60, validation=4, test=2)
    return folder


@pytest.fixture
def batches(monkeypatch):
    """All batches that are trained on."""
    seen = []
    step = TranslationTrainer.training_step
    monkeypatch.setattr(
        TranslationTrainer,
        "training_step",
        lambda self, model, inputs, *rest: seen.append(inputs) or step(self, model, inputs, *rest),
    )
    return seen


def sentences(batches):
    return sorted(tuple(ids[ids != -100].tolist()) for batch in batches for ids in batch["labels"])


@pytest.mark.parametrize(
    ("size", "compiled"),
    [
        ({"max_tokens": 160}, False),
        ({"max_tokens": 160, "pad_to_multiple_of": 8}, False),
        ({"max_tokens": 160}, True),
        ({}, True),
    ],
)
def test_every_epoch_has_other_subwords_in_batches_that_hold_their_budget(data, tmp_path, batches, size, compiled):
    options = {"num_train_epochs": 2, "max_steps": -1, "predict_with_generate": False, "bpe_dropout": 0.3} | size
    options |= {"torch_compile_backend": "eager"} if compiled else {}
    assert run(data, tmp_path / "out", **options) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    epochs = [sentences(half) for half in (batches[: len(batches) // 2], batches[len(batches) // 2 :])]
    epochs = [[ids for ids in epoch if ids] for epoch in epochs]  # rows that fill up a bucket have none
    text = sorted((data / "train.de").read_text("utf-8").splitlines())
    for epoch in epochs:
        assert sorted(tokenizer.decode(ids, skip_special_tokens=True) for ids in epoch) == text
    assert epochs[0] != epochs[1]
    assert sum(map(len, epochs[0])) > 1.1 * sum(map(len, tokenizer(text)["input_ids"]))
    for batch in batches:
        for name in ("input_ids", "labels"):
            rows, length = batch[name].shape
            assert "max_tokens" not in size or rows * length <= 160
            assert length % size.get("pad_to_multiple_of", 1) == 0
        assert not compiled or batch["input_ids"].shape == batch["labels"].shape, "a bucket"


def test_only_the_training_text_is_drawn(data, tmp_path):
    options = {"do_eval": True, "max_steps": 1, "predict_with_generate": False}
    assert run(data, tmp_path / "plain", **options) == 0
    assert run(data, tmp_path / "dropout", **options, bpe_dropout=0.5) == 0
    for name in ("", "vanilla"):
        one, other = (tmp_path / run / name / "tokenizer.json" for run in ("plain", "dropout"))
        assert one.read_bytes() == other.read_bytes()


def test_workers_draw_as_one_process_does(data, tmp_path):
    options = {"bpe_dropout": 0.3, "max_tokens": 400, "predict_with_generate": False}
    # Workers are started in the first epoch. A loader that keeps them draws less from the random stream of the model's
    # dropout, so there is none
    none = ",dropout=0,attention_dropout=0,activation_dropout=0"
    options |= {"num_train_epochs": 3, "max_steps": -1, "config_overrides": SHAPE + none}
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    for name, others in (("alone", {}), ("workers", workers)):
        assert run(data, tmp_path / name, **options, **others) == 0
    assert_equal_weights(tmp_path / "alone", tmp_path / "workers")


def test_collators_can_be_sent_to_workers():
    tokenizer = OWN()
    collator = DropoutCollator(BpeDropout(tokenizer, 0.5), list, partial(longest_side, 100, 1))
    collator.set_epoch(3)
    data = list(rows(tokenizer).select(range(2)))
    assert pickle.loads(pickle.dumps(collator.segmentation)).pair(data[0], 3) == collator(data)[0]


def test_another_tokenizer_is_refused_before_the_data_is_read(data, tmp_path, capsys):
    t5().save_pretrained(tmp_path / "t5")
    given = arguments(data, tmp_path / "out", bpe_dropout=0.1, tokenizer_name=tmp_path / "t5", train_file="no/such")
    assert run_translation.main(flags(given)) == 2
    assert (
        "--bpe_dropout needs a BPE tokenizer of the package tokenizers, and this is a Unigram"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()

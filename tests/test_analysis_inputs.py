"""What the analyses look at: models, fresh or saved, and batches."""

import doctest
from importlib import import_module

import pytest
import torch
from conftest import randomize, tiny_config, tiny_model

from admin_hf import initialize_omega, profile_residuals, reparameterize
from admin_hf.analysis import layer_dependency, load_model, random_batch, text_batch


def test_a_configuration_is_initialised_from_the_seed_and_profiled(tmp_path, batch):
    tiny_config().save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    model = load_model(tmp_path, seed=5, batch=batch)
    assert torch.equal(torch.random.get_rng_state(), state) and not model.training
    torch.manual_seed(5)
    expected = type(model)(tiny_config())
    initialize_omega(expected, profile_residuals(expected, batch))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    again = load_model(tmp_path / "config.json", seed=5, batch=batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_is_loaded_as_it_is(tmp_path):
    model = randomize(tiny_model())
    model.bfloat16().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, seed=9)
    assert loaded.dtype == torch.float32
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_stock_marian_model_is_post_ln(tmp_path, batch):
    """It computes what `admin` does with ω = 1, but has no ω and is no Admin model."""
    stock = reparameterize(randomize(tiny_model()))
    stock.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert (loaded.config.encoder_residual, loaded.config.decoder_residual) == ("post_ln", "post_ln")
    assert {name: tuple(value.shape) for name, value in loaded.named_parameters()} == {
        name: tuple(value.shape) for name, value in stock.named_parameters()
    }
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, stock(**batch).logits, atol=1e-5)
    assert layer_dependency(loaded, batch).decoder.system == "post_ln"


def test_loading_a_checkpoint_leaves_the_random_state(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_run_that_has_only_checkpoints_is_not_measured_as_a_fresh_model(tmp_path):
    """As a run is that diverged: its configuration is in its folder, and its weights are below."""
    tiny_config().save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path / "checkpoint-7")
    with pytest.raises(ValueError, match=f"such as {tmp_path / 'checkpoint-7'}"):
        load_model(tmp_path)
    load_model(tmp_path / "config.json")


def test_weights_of_another_configuration_are_refused(tmp_path):
    tiny_model(encoder_residual="pre_ln").save_pretrained(tmp_path)
    tiny_config(encoder_residual="admin").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not belong together"):
        load_model(tmp_path)


def test_random_sentences_have_no_special_token_but_the_last():
    config = tiny_config(max_position_embeddings=12)
    batch = random_batch(config, rows=30, length=20, seed=1)
    for ids in (batch["input_ids"], batch["labels"]):
        assert ids.shape == (30, 12) and (ids[:, -1] == config.eos_token_id).all()
        assert set(ids[:, :-1].unique().tolist()) == set(range(50)) - {config.eos_token_id, config.pad_token_id}
    assert not torch.equal(batch["input_ids"], batch["labels"])
    assert torch.equal(batch["labels"], random_batch(config, rows=30, length=20, seed=1)["labels"])


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 30, "pad_token_id": 29}, 30),
        ({"eos_token_id": None}, 50),
    ],
)
def test_random_tokens_are_of_the_vocabularies_that_there_are(changes, size):
    model = tiny_model(**changes)
    batch = random_batch(model.config, rows=30)
    assert 0.9 * size < batch["labels"].unique().numel() <= batch["labels"].max() + 1 <= size
    assert model(**batch).loss.isfinite()


def test_a_vocabulary_of_special_tokens_has_no_random_ones():
    with pytest.raises(ValueError, match="vocab_size=1 leaves no tokens except"):
        random_batch(tiny_config(vocab_size=1))


def tokenizer():
    from training.tokenization import train_tokenizer

    return train_tokenizer(iter([["a man walks ."] * 5, ["ein mann geht ."] * 5]), vocab_size=34)


def test_text_is_padded_and_cut_on_both_sides():
    words = tokenizer()
    batch = text_batch(words, ["a man", "a man walks a man walks ."], ["ein mann geht .", "geht"], max_length=6)
    for row, text in enumerate(["a man", "a man walks a man walks ."]):
        ids = words(text, truncation=True, max_length=6)["input_ids"]
        assert batch["input_ids"][row].tolist() == ids + [words.pad_token_id] * (6 - len(ids))
        assert batch["attention_mask"][row].sum() == len(ids)
    ids = words(text_target="geht")["input_ids"]
    assert batch["labels"][1].tolist() == ids + [-100] * (batch["labels"].shape[1] - len(ids))
    with pytest.raises(ValueError, match="1 sources and 2 targets"):
        text_batch(words, ["a"], ["b", "c"])


@pytest.mark.parametrize("module", ["inputs", "dependency", "gradients"])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(import_module(f"admin_hf.analysis.{module}"))
    assert result.attempted > 0 and result.failed == 0

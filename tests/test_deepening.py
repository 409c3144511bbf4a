"""A deepened model: which layer is a copy of which, what starts anew, and that it trains and folds as any other."""

import copy

import pytest
import torch
from conftest import PAD, SYSTEM_PAIRS, VOCAB_SIZE, padded_batch, tiny_config, tiny_model
from test_callback import dataset, trainer  # noqa: F401  a fixture
from test_reparameterization import assert_same_function, logits, trained_model
from transformers import MarianConfig, MarianMTModel

from admin_hf import AdminForConditionalGeneration, AdminModel, AdminProfilingCallback, deepen, inject, reparameterize
from admin_hf.architecture import STACKS
from admin_hf.residual import AdminConnection


# By layers before and after, written out
COPIES = {(2, 3): [0, 0, 1], (2, 4): [0, 0, 1, 1], (2, 5): [0, 0, 0, 1, 1], (3, 5): [0, 0, 1, 1, 2]}
COPIES |= {(3, 6): [0, 0, 1, 1, 2, 2], (2, 2): [0, 1], (1, 3): [0, 0, 0]}


def stock_model(**changes) -> MarianMTModel:
    """As opus-mt is: Swish, a bias of the output layer, forced eos, and a ban of padding in generation."""
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    ids = {"pad_token_id": PAD, "decoder_start_token_id": PAD, "eos_token_id": 0, "forced_eos_token_id": 0}
    options = {"activation_function": "swish", "scale_embedding": True, "vocab_size": VOCAB_SIZE}
    torch.manual_seed(0)
    model = MarianMTModel(MarianConfig(**sizes | heads | ids | options | changes)).eval()
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "embed_positions" not in name):
            parameter += 0.3 * torch.randn_like(parameter)
        model.final_logits_bias.normal_()
    model.generation_config.update(num_beams=6, max_length=40, bad_words_ids=[[PAD]])
    return model


def omegas(model: AdminForConditionalGeneration) -> list[torch.Tensor]:
    return [module.omega for module in model.modules() if isinstance(module, AdminConnection)]


# --- what is copied ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "decoder"), SYSTEM_PAIRS)
@pytest.mark.parametrize(("before", "after"), [((2, 3), (3, 6)), ((2, 3), (5, 5)), ((2, 2), (4, 2)), ((1, 3), (3, 5))])
def test_every_layer_is_a_copy_of_its_source(encoder, decoder, before, after):
    model = trained_model(encoder, decoder, encoder_layers=before[0], decoder_layers=before[1])
    given = copy.deepcopy(model.state_dict())
    result = deepen(model, *after)
    state = result.state_dict()
    for stack, *depth in zip(STACKS, before, after, strict=True):
        for place, copied in enumerate(COPIES[tuple(depth)]):
            prefix, source = (f"model.{stack}.layers.{i}." for i in (place, copied))
            names = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
            assert {name for name in names if not name.endswith("omega")} == {
                name.removeprefix(source) for name in given if name.startswith(source) and not name.endswith("omega")
            }
            for name in (name for name in names if not name.endswith("omega")):
                assert torch.equal(state[prefix + name], given[source + name]), prefix + name
        assert len(getattr(result.model, stack).layers) == getattr(result.config, f"{stack}_layers") == depth[1]
    for name in (name for name in given if ".layers." not in name and not name.endswith("omega_profiled")):
        assert torch.equal(state[name], given[name]), name
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items()), "it stays as it is"


def test_omega_and_constants_start_as_in_a_new_model_of_the_depth():
    result = deepen(trained_model(), 5, 4)
    assert not result.omega_initialized and not result.is_profiled
    assert len(omegas(result)) == (2 * 5 - 1) + (3 * 4 - 1)
    assert all((omega == 1).all() for omega in omegas(result))
    uniform = deepen(trained_model("admin_uniform", "admin_uniform"), 5, 4)
    assert torch.stack(omegas(uniform)[:9]).unique().item() == pytest.approx((11 / 2.3978953 - 1) ** 0.5)  # ln 11
    deep = deepen(trained_model("deepnorm", "deepnorm"), 5, 4)
    assert deep.model.encoder.layers[4].final_layer_norm.shortcut_scale == pytest.approx(0.81 * 2500 ** (1 / 16))
    assert deep.model.decoder.layers[0].final_layer_norm.shortcut_scale == pytest.approx(12 ** (1 / 4))


def test_only_the_decoder_gets_deeper_and_all_is_profiled_anew():
    result = deepen(trained_model(), decoder_layers=3)
    assert (result.config.encoder_layers, result.config.decoder_layers) == (2, 3)
    assert all((omega == 1).all() for omega in omegas(result))


def test_a_stock_model_keeps_settings_dtype_and_mode():
    stock = stock_model(tie_word_embeddings=False, share_encoder_decoder_embeddings=False).to(torch.bfloat16).train()
    result = deepen(stock, 6, 4)
    assert type(result) is AdminForConditionalGeneration and result.training and result.dtype == torch.bfloat16
    assert {omega.dtype for omega in omegas(result)} == {torch.float32}
    assert result.generation_config.to_dict() == stock.generation_config.to_dict()
    assert result.generation_config is not stock.generation_config
    changed = {"encoder_layers": 6, "decoder_layers": 4, "num_hidden_layers": 6, "model_type": "admin"}
    for name in stock.config.to_dict().keys() - changed.keys() - {"transformers_version"}:
        assert getattr(result.config, name) == getattr(stock.config, name), name
    for name in ("lm_head.weight", "final_logits_bias", "model.encoder.embed_tokens.weight"):
        assert torch.equal(result.state_dict()[name], stock.state_dict()[name]), name
    assert not result.model.encoder.embed_positions.weight.requires_grad


def test_the_random_state_stays():
    model, state = tiny_model(), torch.get_rng_state()
    deepen(model, 4, 4)
    assert torch.equal(torch.get_rng_state(), state)


# --- what it computes -------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "decoder"), SYSTEM_PAIRS)
def test_the_same_depth_is_the_same_function(encoder, decoder, batch):
    model = trained_model(encoder, decoder)
    result = deepen(model, 2, 2)
    assert torch.equal(logits(result, batch), logits(model, batch))
    assert result.omega_initialized == model.omega_initialized and result.is_profiled == model.is_profiled


def test_a_stock_model_of_the_same_depth_is_the_same_function(batch):
    stock = stock_model()
    result = deepen(stock)
    assert torch.equal(logits(result, batch), logits(stock, batch))
    assert result.omega_initialized and not result.is_profiled, "as from_pretrained leaves it"


@pytest.mark.parametrize("make", [trained_model, stock_model])
def test_a_trainer_profiles_it_as_a_new_model_and_it_folds(make, tmp_path, dataset):  # noqa: F811
    model = deepen(make(), 3, 4)
    trainer(model, dataset, tmp_path, [AdminProfilingCallback(verbose=False)]).train()
    assert model.is_profiled and (tmp_path / "residual_profile.json").exists()
    assert all((omega != 1).all() for omega in omegas(model))
    folded = reparameterize(model.eval())  # which verifies it
    assert type(folded) is MarianMTModel and folded.config.encoder_layers == 3
    assert_same_function(model, folded)


def test_it_is_saved_and_loaded(tmp_path):
    model = deepen(stock_model(), 4, 4)
    model.save_pretrained(tmp_path)
    loaded = AdminForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, padded_batch()), logits(model, padded_batch()))


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "depth", "message"),
    [
        (tiny_model, (1, 2), "encoder_layers=1 is less than the 2 that the model has"),
        (stock_model, (4, 0), "decoder_layers=0 is less than the 2"),
        (lambda: AdminModel(tiny_config()), (4, 4), "AdminModel cannot be deepened; expected an AdminForCond"),
        (lambda: inject(stock_model()), (4, 4), "injected ω: deepen the model that `reparameterize` returns"),
    ],
)
def test_what_cannot_be_deepened_is_refused(make, depth, message):
    with pytest.raises(ValueError, match=message):
        deepen(make(), *depth)

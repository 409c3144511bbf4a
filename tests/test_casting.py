"""Weights that are cast at once, some of them joined, give what autocast gives, which casts them one by one."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import padded_batch, randomize, tiny_model, without_dropout
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, EncoderDecoderCache

from admin_hf import kernels, modeling_admin
from admin_hf.compilation import CompiledPass
from admin_hf.kernels import cast_at_once, kept_casts, weight_casts


@pytest.fixture
def model():
    return without_dropout(randomize(tiny_model()).train())


def loss_and_gradients(model, batches, dtype=torch.bfloat16, at_once=True):
    model.zero_grad()
    losses = []
    for batch in batches:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            with cast_at_once(kept_casts(model), dtype) if at_once else nullcontext():
                loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_joints(monkeypatch):
    monkeypatch.setattr(kernels, "joined_projections", lambda model: {})


def error(gradients, exact):
    distance = sum((gradients[name] - exact[name]).square().sum() for name in exact)
    return float(distance / sum(gradient.square().sum() for gradient in exact.values())) ** 0.5


def test_loss_and_gradients_are_bit_for_bit_those_of_autocast_where_nothing_is_joined(model, monkeypatch):
    without_joints(monkeypatch)
    batches = [padded_batch(seed=seed) for seed in range(2)]
    expected = copy.deepcopy(loss_and_gradients(model, batches, at_once=False))
    torch.testing.assert_close(loss_and_gradients(model, batches), expected, rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["admin", "sdpa", "eager"])
def test_joined_projections_are_the_single_ones(model, attention):
    model.set_attn_implementation(attention)
    batches = [padded_batch(seed=seed) for seed in range(2)]
    expected = copy.deepcopy(loss_and_gradients(model, batches, torch.float32, at_once=False))
    torch.testing.assert_close(loss_and_gradients(model, batches, torch.float32), expected, rtol=1e-4, atol=1e-6)


def test_joined_projections_are_as_exact_in_bfloat16(model):
    batches = [padded_batch(seed=seed) for seed in range(2)]
    losses, exact = loss_and_gradients(model, batches, torch.float32, at_once=False)
    _, single = loss_and_gradients(model, batches, at_once=False)
    joined_losses, joined = loss_and_gradients(model, batches)
    torch.testing.assert_close(joined_losses, losses, rtol=0.01, atol=0)
    assert 0 < error(joined, exact) < 1.2 * error(single, exact)


def test_self_attention_is_one_product_and_source_attention_two(model, monkeypatch):
    sizes = []
    linear = torch.nn.functional.linear

    def counting(x, weight, bias=None):
        sizes.append(len(weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    width, layers = model.config.d_model, model.config.encoder_layers
    model.config.encoder_ffn_dim = model.config.decoder_ffn_dim
    loss_and_gradients(model, [padded_batch()])
    assert sizes.count(3 * width) == layers + model.config.decoder_layers
    assert sizes.count(2 * width) >= model.config.decoder_layers


def test_a_frozen_weight_gets_no_gradient(model):
    frozen = model.model.encoder.layers[0]
    frozen.fc1.requires_grad_(False)
    frozen.self_attn.requires_grad_(False)
    frozen.self_attn.k_proj.requires_grad_(True)
    _, gradients = loss_and_gradients(model, [padded_batch()])
    assert not [name for name in gradients if "encoder.layers.0.fc1" in name]
    projections = {name for name in gradients if "encoder.layers.0.self_attn." in name}
    assert projections == {f"model.encoder.layers.0.self_attn.k_proj.{name}" for name in ("weight", "bias")}
    assert gradients["model.encoder.layers.0.fc2.weight"].any()


def test_layers_hold_their_parameters_again_also_after_an_error(model):
    before = dict(model.named_parameters())
    casts = weight_casts(model.model)
    with pytest.raises(RuntimeError), cast_at_once(casts, torch.bfloat16):
        assert {cast.holder[cast.name].dtype for cast in casts} == {torch.bfloat16}
        assert not set(map(id, model.model.parameters())) & {id(p) for name, p in before.items() if "fc1" in name}
        raise RuntimeError
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    attentions = [module for module in model.modules() if isinstance(module, modeling_admin.AdminAttention)]
    assert len(attentions) == model.config.encoder_layers + 2 * model.config.decoder_layers
    assert {attention.joined_weight for attention in attentions} == {None}


def test_all_linear_layers_but_the_output_are_cast(model):
    cast = [parameters[name] for cast in weight_casts(model.model) for parameters, name in cast.parameters]
    linears = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(map(id, cast)) == sorted(id(p) for linear in linears for p in linear.parameters())
    assert all(weight is not model.lm_head.weight for weight in cast)


def test_an_adapter_on_a_projection_is_computed_also_where_its_weight_was_joined_before(model):
    loss_and_gradients(model, [padded_batch()])
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = copy.deepcopy(loss_and_gradients(model, [padded_batch()], torch.float32, at_once=False))
    assert [name for name in expected[1] if "lora" in name]
    torch.testing.assert_close(
        loss_and_gradients(model, [padded_batch()], torch.float32), expected, rtol=1e-4, atol=1e-6
    )
    assert adapted.peft_config


def test_a_hook_on_a_projection_is_called_also_where_its_weight_was_joined_before(model):
    loss_and_gradients(model, [padded_batch()])
    seen = []
    projection = model.model.decoder.layers[0].self_attn.v_proj
    hook = projection.register_forward_hook(lambda module, inputs, output: seen.append(output))
    loss_and_gradients(model, [padded_batch()])
    hook.remove()
    assert len(seen) == 1


def test_a_pass_with_a_cache_fills_it(model):
    batch = padded_batch()
    inputs = {"decoder_input_ids": batch.pop("labels").clamp(min=2), **batch}
    expected = model(**inputs, use_cache=True)
    with cast_at_once(weight_casts(model.model), torch.float32):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        name = modeling_admin.CACHE_NAMES[hasattr(expected, "past_key_values")]
        found = model.model(**inputs, use_cache=True, **{name: cache})
    assert cache.get_seq_length() == inputs["decoder_input_ids"].shape[1]
    torch.testing.assert_close(
        found.last_hidden_state @ model.lm_head.weight.T + model.final_logits_bias, expected.logits
    )


@pytest.mark.slow  # 15 s
def test_compiled_layers_take_the_joined_weights_of_each_pass(monkeypatch):
    model = without_dropout(randomize(tiny_model(encoder_layers=3, decoder_layers=3)).train())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = CompiledPass(model, lambda **batch: (model(**batch).loss,), backend=counter)
    for seed in range(3):
        randomize(model, seed, scale=0.02)
        batch = padded_batch(seed=seed)
        losses, exact = loss_and_gradients(model, [batch], torch.float32, at_once=False)
        _, single = loss_and_gradients(model, [batch], at_once=False)
        model.zero_grad()
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            patch.setattr(
                modeling_admin, "weights_cast_at_once", lambda m: cast_at_once(kept_casts(m), torch.bfloat16)
            )
            (loss,) = compiled(batch)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close(loss, losses[0], rtol=0.01, atol=0)
        assert error(found, exact) < 1.5 * error(single, exact)
    assert counter.frame_count == 4  # the first layer of each stack has no ω in front, so it differs from the others

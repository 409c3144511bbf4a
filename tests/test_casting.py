"""Weights that are cast at once are those that autocast makes one by one."""

import copy

import pytest
import torch
from conftest import padded_batch, randomize, tiny_model, without_dropout

from admin_hf.kernels import cast_at_once, linear_weights


@pytest.fixture
def model():
    return without_dropout(randomize(tiny_model()).train())


def loss_and_gradients(model, batches, at_once):
    model.zero_grad()
    losses = []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            if at_once:
                with cast_at_once(linear_weights(model.model), torch.bfloat16):
                    loss = model(**batch).loss
            else:
                loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    return losses, {name: p.grad for name, p in model.named_parameters()}


def test_loss_and_gradients_are_those_of_autocast(model):
    batches = [padded_batch(seed=seed) for seed in range(2)]
    expected = copy.deepcopy(loss_and_gradients(model, batches, at_once=False))
    torch.testing.assert_close(loss_and_gradients(model, batches, at_once=True), expected, rtol=0, atol=0)


def test_a_frozen_weight_gets_no_gradient(model):
    frozen = model.model.encoder.layers[0].fc1
    frozen.requires_grad_(False)
    _, gradients = loss_and_gradients(model, [padded_batch()], at_once=True)
    assert frozen.weight.grad is None and frozen.bias.grad is None
    assert gradients["model.encoder.layers.0.fc2.weight"].any()


def test_layers_hold_their_parameters_again_also_after_an_error(model):
    before = dict(model.named_parameters())
    places = linear_weights(model.model)
    with pytest.raises(RuntimeError), cast_at_once(places, torch.bfloat16):
        assert {parameters[name].dtype for parameters, name in places} == {torch.bfloat16}
        assert not set(map(id, model.model.parameters())) & {id(p) for name, p in before.items() if "fc1" in name}
        raise RuntimeError
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}


def test_all_linear_layers_but_the_output_are_cast(model):
    linears = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear_weights(model.model)) == 2 * len(linears)
    assert all(parameters[name] is not model.lm_head.weight for parameters, name in linear_weights(model.model))


def test_the_projections_of_a_sublayer_read_one_cast_tensor(model):
    read = {}

    def remember(module, inputs):
        read.setdefault(module, []).append(inputs[0])

    decoder = model.model.decoder.layers
    attentions = [decoder[0].self_attn, model.model.encoder.layers[0].self_attn]
    groups = [[getattr(attention, f"{name}_proj") for name in "qkv"] for attention in attentions]
    groups.append([layer.encoder_attn.k_proj for layer in decoder] + [layer.encoder_attn.v_proj for layer in decoder])
    for projection in (projection for group in groups for projection in group):
        projection.register_forward_pre_hook(remember)
    with torch.autocast("cpu", torch.bfloat16):
        model(**padded_batch())
    for group in groups:
        inputs = [x for projection in group for x in read[projection]]
        assert len(inputs) == len(group) and {x.data_ptr() for x in inputs} == {inputs[0].data_ptr()}
        assert inputs[0].dtype == torch.bfloat16

"""β against computations of another kind, on tiny models."""

import pytest
import torch
from conftest import SYSTEM_PAIRS, randomize, tiny_config, tiny_model

from admin_hf.analysis import initialized_model, layer_dependency, random_batch
from admin_hf.analysis.dependency import MAX_TOKENS, own_dependency
from admin_hf.connections import KeelConnection
from admin_hf.residual import SYSTEMS, PostLNConnection, ResidualSystem, residual_connections


def recorded(model, batch, stack):
    """Shortcut, branch and output of every connection of a stack at the real tokens."""
    seen = []
    real = batch["labels"].ne(-100) if stack == "decoder" else batch["attention_mask"].bool()
    handles = [
        connection.register_forward_hook(
            lambda module, args, output: seen.append((module, *(x[real].detach() for x in (*args, output))))
        )
        for _, connection in residual_connections(getattr(model.model, stack))
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def slow_beta(seen):
    """β by another route: with every σ held, the stack is linear, so a component is what the stack makes of one of
    ν, embedding and branches alone, without the others. Row i has those of ν, of the embedding and of branches 1 …"""

    def chain(sizes):
        x, outputs = sizes[1] * seen[0][1], []
        for i, (connection, shortcut, branch, _) in enumerate(seen):
            s, r = (getattr(connection, name, 1.0) for name in ("shortcut_scale", "branch_scale"))
            if i % (len(seen) // 2) == 0:  # of two layers
                layer_input = x
            x = x + layer_input if connection.adds_layer_input else x
            x = x * s + sizes[i + 2] * branch * r
            if isinstance(connection, PostLNConnection | KeelConnection):
                b = shortcut * s + branch * r
                x = (x - x.mean(-1, keepdim=True)) / (b.var(-1, correction=0, keepdim=True) + connection.eps).sqrt()
                x = x * connection.weight + sizes[0] * connection.bias
            outputs.append(x)
        return torch.stack(outputs)

    components = torch.stack([chain(alone) for alone in torch.eye(len(seen) + 2, dtype=torch.double)], dim=-1)
    outputs = torch.stack([output for *_, output in seen])
    assert torch.allclose(components.sum(-1), outputs, atol=1e-10)
    return components.flatten(1, 2).std(1, correction=0) / outputs.flatten(1).std(1, correction=0)[:, None]


@pytest.mark.parametrize("pair", SYSTEM_PAIRS, ids="-".join)
def test_beta_is_what_the_stack_makes_of_each_branch_alone(pair, batch):
    model = randomize(tiny_model(encoder_residual=pair[0], decoder_residual=pair[1])).double()
    dependency = layer_dependency(model, batch)
    for stack in ("encoder", "decoder"):
        found = getattr(dependency, stack)
        expected = slow_beta(recorded(model, batch, stack))
        assert found.error < 1e-12
        assert len(found.beta) == len(expected) == len(found.names)
        for i, row in enumerate(found.beta):
            assert row == pytest.approx(expected[i, 1 : i + 3].tolist(), rel=1e-3)
        assert found.bias == pytest.approx(expected[:, 0].tolist(), rel=1e-3)


def test_components_sum_to_the_output_in_float32_after_many_layers(batch):
    model = initialized_model(tiny_config(encoder_layers=30, decoder_layers=20), batch=batch)
    dependency = layer_dependency(model, batch)
    assert 0 < dependency.encoder.error < 1e-4 and 0 < dependency.decoder.error < 1e-4


@pytest.mark.parametrize("system", SYSTEMS)
def test_own_dependency_is_the_diagonal(system, batch):
    model = randomize(tiny_model(encoder_residual=system, decoder_residual=system)).double()
    dependency = layer_dependency(model, batch)
    for stack, own in own_dependency(model, batch).items():
        assert own == pytest.approx([row[-1] for row in dependency.stacks[stack].beta], rel=1e-3)


def test_padding_is_left_out_of_beta(batch):
    model, wider = tiny_model(), dict(batch)
    for name, value in (("input_ids", 49), ("attention_mask", 0), ("labels", -100)):
        wider[name] = torch.nn.functional.pad(batch[name], (0, 5), value=value)
    narrow = layer_dependency(model, batch)
    for stack in ("encoder", "decoder"):
        for row, expected in zip(
            getattr(layer_dependency(model, wider), stack).beta, getattr(narrow, stack).beta, strict=True
        ):
            assert row == pytest.approx(expected, rel=1e-3)


def test_a_batch_of_padding_is_refused(batch):
    for name, value, stack in (("attention_mask", 0, "encoder"), ("labels", -100, "decoder")):
        with pytest.raises(ValueError, match=f"only padding in the {stack}"):
            layer_dependency(tiny_model(), batch | {name: torch.full_like(batch[name], value)})


def test_beta_is_of_the_first_tokens_of_a_large_batch():
    model = tiny_model()
    batch = random_batch(model.config, rows=MAX_TOKENS // 16 + 4, length=16)
    first = {name: tensor[: MAX_TOKENS // 16] for name, tensor in batch.items()}
    assert layer_dependency(model, batch).encoder.beta == layer_dependency(model, first).encoder.beta


def test_own_dependency_at_initialisation_falls_with_admin_and_pre_ln_and_is_level_with_post_ln():
    """The tolerances are the spread over weights and tokens: the exponents of five seeds lie within 0.06, around these
    values. 1/i, an exponent of −1, is that of many branches of one variance, without the embedding."""
    for system, exponent in (("admin", -0.57), ("pre_ln", -0.56), ("post_ln", 0.15)):
        sizes = {"d_model": 256, "encoder_ffn_dim": 512, "encoder_layers": 12, "decoder_layers": 1}
        config = tiny_config(encoder_residual=system, decoder_residual=system, **sizes)
        stack = layer_dependency(initialized_model(config), random_batch(config)).encoder
        assert stack.exponent() == pytest.approx(exponent, abs=0.06)
        assert ("is level" if system == "post_ln" else "falls") in stack.verdict()
        # Branches are nearly independent: chance correlations of 256 dimensions make 0.84 to 1.10 of the 1
        assert sum(beta**2 for beta in stack.beta[-1]) == pytest.approx(1, abs=0.16)


def test_independent_branches_of_variance_one_give_the_closed_forms():
    """Pre-LN: β²_{i,j} = 1 / (i + 1). Post-LN: β²_{i,i} = 1/2, and half as much for each further sub-layer."""

    class Unit(ResidualSystem):
        def connect(self, layer, layer_idx):
            super().connect(layer, layer_idx)
            for name in ("self_attn", "fc1"):
                setattr(layer, name, UnitNoise(getattr(layer, name)))
            layer.fc2, layer.activation_fn = torch.nn.Identity(), torch.nn.Identity()

    class UnitNoise(torch.nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.returns_pair = not isinstance(attention, torch.nn.Linear)

        def forward(self, x, **kwargs):
            noise = torch.randn_like(x)
            return (noise, None) if self.returns_pair else noise

    class UnitPreLN(Unit, SYSTEMS["pre_ln"]):
        pass

    torch.manual_seed(0)
    try:
        for name, system in (("unit", Unit), ("unit_pre_ln", UnitPreLN)):
            SYSTEMS[name] = system
        for name, expected in (
            ("unit", lambda i, j: 0.5 ** (i - max(j, 1) + 1)),
            ("unit_pre_ln", lambda i, j: 1 / (i + 1)),
        ):
            config = tiny_config(encoder_residual=name, d_model=512, encoder_layers=3, scale_embedding=False)
            model = initialized_model(config)
            model.model.encoder.embed_positions.weight.data.zero_()
            model.model.shared.weight.data.normal_()
            beta = layer_dependency(model, random_batch(config)).encoder.beta
            for i, row in enumerate(beta, start=1):
                assert [b**2 for b in row] == pytest.approx([expected(i, j) for j in range(i + 1)], rel=0.05)
    finally:
        SYSTEMS.pop("unit", None), SYSTEMS.pop("unit_pre_ln", None)


def test_a_connection_that_computes_something_else_is_refused(batch):
    class Crooked(PostLNConnection):
        def forward(self, shortcut, branch):
            return super().forward(shortcut, branch.relu())

    model = tiny_model()
    model.model.decoder.layers[0].final_layer_norm = Crooked(16)
    with pytest.raises(ValueError, match="differ from its output by .* standard deviations"):
        layer_dependency(model, batch)
    assert not any(module._forward_hooks for module in model.modules())

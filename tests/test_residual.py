"""Residual connections and systems against their equations, and constants worked out by hand."""

import doctest
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import PAD, SYSTEM_PAIRS, VOCAB_SIZE, learn, padded_batch, randomize, tiny_config, tiny_model
from test_connections import layer_norm
from torch import nn
from transformers import Trainer

from admin_hf import AdminForConditionalGeneration, initialize_omega, profile_residuals
from admin_hf.connections import (
    AdminConnection,
    B2TConnection,
    DeepNormConnection,
    FixUpConnection,
    GPASConnection,
    KeelConnection,
    LayerNormScalingConnection,
    LayerScaleConnection,
    PostLNConnection,
    PreLNConnection,
    ReZeroConnection,
    ReZeroPostLNConnection,
    ScaleModule,
    residual_connections,
)
from admin_hf.residual import SYSTEMS, AdminUniform, DeepNorm, ResidualSystem


PAGE = Path(__file__).parents[1] / "docs" / "systems.md"

every_system = pytest.mark.parametrize("system", SYSTEMS)


def model_of(system: str, **changes) -> AdminForConditionalGeneration:
    return tiny_model(encoder_residual=system, decoder_residual=system, **changes)


def scales_of(model: nn.Module) -> list[tuple[nn.Parameter, float]]:
    modules = [module for module in model.modules() if isinstance(module, ScaleModule)]
    return [(m.get_parameter(name), value) for m in modules for name, value in m.initial_scales.items()]


# --- what a system gives each sub-layer ---------------------------------------------------------------

KINDS = {
    "admin": AdminConnection,
    "post_ln": PostLNConnection,
    "pre_ln": PreLNConnection,
    "rezero": ReZeroConnection,
    "rezero_post_ln": ReZeroPostLNConnection,
    "fixup": FixUpConnection,
    "looklinear": PostLNConnection,
    "deepnorm": DeepNormConnection,
    "admin_uniform": AdminConnection,
    "admin_uniform_o1": AdminConnection,
    "admin_uniform_on": AdminConnection,
    "admin_constant": DeepNormConnection,
    "admin_constant_o1": DeepNormConnection,
    "ds_init": PostLNConnection,
    "keel": KeelConnection,
    "layer_norm_scaling": LayerNormScalingConnection,
    "layer_scale": LayerScaleConnection,
    "gpas": GPASConnection,
}


def kind_of(system: str, index: int, per_layer: int) -> type:
    """The connection of sub-layer `index` of a stack of two layers."""
    if system == "b2t":
        return B2TConnection if index % per_layer == per_layer - 1 else PostLNConnection
    if system == "mix_ln":  # a quarter of two layers is none
        return PreLNConnection
    # The first sub-layer of a stack has no ω
    return PostLNConnection if system.startswith("admin") and index == 0 else KINDS[system]


@pytest.mark.parametrize(("encoder", "decoder"), SYSTEM_PAIRS)
def test_every_sublayer_has_the_connection_of_its_system_in_execution_order(encoder, decoder):
    model = tiny_model(encoder_residual=encoder, decoder_residual=decoder)
    order = []
    for stack, system, per_layer in ((model.model.encoder, encoder, 2), (model.model.decoder, decoder, 3)):
        connections = dict(residual_connections(stack))
        assert len(connections) == 2 * per_layer
        for index, (name, connection) in enumerate(connections.items()):
            assert type(connection) is kind_of(system, index, per_layer)
            label = f"{per_layer}.{name}"
            connection.register_forward_pre_hook(lambda *_, label=label: order.append(label))
    model(**padded_batch())
    expected = [f"2.{name}" for name, _ in residual_connections(model.model.encoder)]
    expected += [f"3.{name}" for name, _ in residual_connections(model.model.decoder)]
    assert order == expected


@pytest.mark.parametrize(("encoder", "decoder"), SYSTEM_PAIRS)
def test_branches_read_what_the_connection_gives_them_and_are_scaled_as_it_says(encoder, decoder):
    """What `branch_input`, `shortcut_scale` and `branch_scale` say is what the layers compute."""
    model = randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder))
    for stack in (model.model.encoder, model.model.decoder):
        for layer in stack.layers:
            connection, seen = layer.final_layer_norm, {}
            layer.fc1.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(read=args[0]))
            connection.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(x=args[0], f=args[1]))
            connection.register_forward_hook(lambda m, args, output, seen=seen: seen.update(out=output))
            model(**padded_batch())
            if not connection.adds_layer_input:  # the shortcut is then more than what the branch reads
                torch.testing.assert_close(seen["read"], connection.branch_input(seen["x"]))
            total = connection.shortcut_scale * seen["x"] + connection.branch_scale * seen["f"]
            if isinstance(connection, PostLNConnection | KeelConnection):
                total = nn.functional.layer_norm(total, (16,), connection.weight, connection.bias)
            torch.testing.assert_close(seen["out"], total)


def test_fixups_scalars_stand_where_the_method_has_them(batch):
    model = randomize(model_of("fixup"))
    encoder, decoder = model.model.encoder, model.model.decoder
    for stack, sublayers in ((encoder, 2), (decoder, 3)):
        for layer in stack.layers:  # a multiplier and a bias for each branch, and two biases around the ReLU
            assert len(scales_of(layer)) == 2 * sublayers + 2
            before, after = layer.activation_fn.input_bias, layer.activation_fn.output_bias
            x = torch.randn(2, 5, 16)
            torch.testing.assert_close(layer.feed_forward(x), layer.fc2((layer.fc1(x) + before).relu() + after))
    outputs = model(**batch, output_hidden_states=True)
    seen = {}
    encoder.layers[-1].register_forward_hook(lambda m, args, output: seen.update(x=output))
    encoder(batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = encoder.layer_norm.multiplier * (seen["x"] + encoder.layer_norm.input_bias)
    torch.testing.assert_close(outputs.encoder_last_hidden_state, expected)
    assert not list(decoder.layer_norm.parameters())


# --- constants, each worked out by hand ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "stack", "alpha", "beta"),
    [
        ((6, 6), "encoder", 1.41794, 0.49699),  # 0.81 · 6^(5/16) and 0.87 / 6^(5/16)
        ((6, 6), "decoder", 2.05977, 0.34329),  # 18^(1/4) and 72^(-1/4)
        ((60, 12), "encoder", 2.63313, 0.26763),  # (60⁴ · 12)^(1/16) = e^(18.862285 / 16) = 3.25077
        ((60, 12), "decoder", 2.44949, 0.28868),  # 36^(1/4) = √6 and 144^(-1/4) = 1 / √12
    ],
)
def test_deepnorm_constants(layers, stack, alpha, beta):
    system = DeepNorm(tiny_config(encoder_layers=layers[0], decoder_layers=layers[1]), stack)
    assert system.connection(0).shortcut_scale == pytest.approx(alpha, abs=1e-5), "also on the first sub-layer"
    gains = {name: initializer.keywords["gain"] for name, initializer in system.initializers.items()}
    small = pytest.approx(beta, abs=1e-5)
    assert gains == {"q_proj": 1, "k_proj": 1, "v_proj": small, "out_proj": small, "fc1": small, "fc2": small}


def test_uniform_omega():
    """sqrt(201 / ln 201 − 1) = sqrt(201 / 5.30330 − 1) = 6.0746, and sqrt(301 / 5.70711 − 1) = 7.1931."""
    deep = tiny_config(encoder_layers=100, decoder_layers=100)
    assert AdminUniform(deep, "encoder").omega == pytest.approx(6.0746, abs=1e-4)
    assert AdminUniform(deep, "decoder").omega == pytest.approx(7.1931, abs=1e-4)
    model = model_of("admin_uniform")  # sqrt(5 / ln 5 − 1) = sqrt(5 / 1.60944 − 1), and with 7 for 5: 7 / 1.94591
    for stack, expected in ((model.model.encoder, 1.45144), (model.model.decoder, 1.61161)):
        omegas = [c.omega for _, c in residual_connections(stack) if isinstance(c, AdminConnection)]
        assert len(omegas) == len(list(residual_connections(stack))) - 1, "none on the first sub-layer"
        for omega in omegas:
            assert omega.requires_grad and omega.shape == (16,)
            torch.testing.assert_close(omega.detach(), torch.full((16,), expected), rtol=0, atol=1e-5)


def test_uniform_omega_needs_no_profile_and_keeps_its_value(batch):
    model = tiny_model(encoder_residual="admin_uniform")
    assert model_of("admin_uniform").omega_initialized and not model.omega_initialized, "the decoder's is profiled"
    uniform = model.model.encoder.layers[1].final_layer_norm
    assert uniform.initialized
    start = uniform.omega.detach().clone()
    profile = profile_residuals(model, batch)
    assert profile.encoder.omega[1:] == pytest.approx([float(start[0])] * 3)
    profile.encoder.omega = [9.0] * 4
    initialize_omega(model, profile)
    assert model.omega_initialized
    assert torch.equal(uniform.omega, start)
    measured = model.model.decoder.layers[1].final_layer_norm.omega.detach()
    assert float(measured[0]) == pytest.approx(profile.decoder.omega[-1])


D, F = 128, 512
XAVIER, XAVIER_FFN = (2 / (D + D)) ** 0.5, (2 / (D + F)) ** 0.5
BETA_ENCODER, BETA_DECODER = 0.87 * 32 ** (-1 / 16), 24 ** (-1 / 4)  # two layers each: N⁴M = 32, 12M = 24
STANDARD = dict.fromkeys(("q_proj", "k_proj", "v_proj"), XAVIER / 2**0.5) | {"out_proj": XAVIER}
STANDARD |= {"fc1": XAVIER_FFN, "fc2": XAVIER_FFN}
FIXUP = dict.fromkeys(("q_proj", "k_proj", "v_proj"), XAVIER / 2**0.5 * 10 ** (-1 / 6))  # L = 2 · 2 + 3 · 2
FIXUP |= {"out_proj": 0.0, "fc1": XAVIER_FFN * 10 ** (-1 / 2), "fc2": 0.0}


def deepnorm_stds(beta: float) -> dict[str, float]:
    small = {"v_proj": XAVIER, "out_proj": XAVIER, "fc1": XAVIER_FFN, "fc2": XAVIER_FFN}
    return {"q_proj": XAVIER, "k_proj": XAVIER} | {name: beta * std for name, std in small.items()}


STDS = {
    "encoder": dict.fromkeys(SYSTEMS, STANDARD) | {"fixup": FIXUP, "deepnorm": deepnorm_stds(BETA_ENCODER)},
    "decoder": dict.fromkeys(SYSTEMS, STANDARD) | {"fixup": FIXUP, "deepnorm": deepnorm_stds(BETA_DECODER)},
}


@pytest.mark.parametrize("meta", [False, True])
@every_system
def test_branches_start_with_the_systems_standard_deviations(system, meta):
    sizes = {"d_model": D, "encoder_ffn_dim": F, "decoder_ffn_dim": F}
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        config = tiny_config(encoder_residual=system, decoder_residual=system, **sizes)
        model = AdminForConditionalGeneration(config)
    if meta:
        model.to_empty(device="cpu")
        model.init_weights()
    for stack, expected in STDS.items():
        for name, module in getattr(model.model, stack).named_modules():
            if isinstance(module, nn.Linear):
                std = expected[system][name.rpartition(".")[2]]
                if system == "ds_init":
                    std *= (1 + int(name.split(".")[1])) ** -0.5
                assert not module.bias.any()
                assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.03), name
                # Uniform entries lie within √3 standard deviations, normal ones do not
                beyond = bool((module.weight.abs() > 1.0001 * 3**0.5 * std).any())
                assert beyond == (system == "deepnorm"), name
    for scale, start in scales_of(model):
        assert bool((scale == start).all()) and scale.requires_grad
    assert (model.lm_head.weight is model.model.shared.weight) == (system != "fixup")


@every_system
def test_scales_are_spared_from_weight_decay(system):
    model = model_of(system)
    decayed = {model.get_parameter(name) for name in Trainer.get_decay_parameter_names(None, model)}
    assert model.model.encoder.layers[0].fc1.weight in decayed
    assert not decayed & {scale for scale, _ in scales_of(model)}


@pytest.mark.parametrize(
    ("system", "encoder", "decoder"),
    [
        ("admin_uniform_o1", 200**0.5, 300**0.5),
        ("admin_uniform_on", 1.0, 1.0),
        ("admin_constant", 6.0746, 7.1931),  # as in the test of uniform ω above
        ("admin_constant_o1", 200**0.5, 300**0.5),
        ("keel", 200.0, 300.0),
    ],
)
def test_constants_of_the_depth(system, encoder, decoder):
    config = tiny_config(encoder_layers=100, decoder_layers=100)
    for stack, expected in (("encoder", encoder), ("decoder", decoder)):
        first, second = (SYSTEMS[system](config, stack).connection(index) for index in (0, 1))
        scale = torch.as_tensor(second.shortcut_scale).detach()
        torch.testing.assert_close(scale, torch.full_like(scale, expected), rtol=0, atol=1e-4)
        assert system == "keel" or first.shortcut_scale == 1


def test_layer_norm_scaling_divides_by_the_root_of_the_layers_number():
    scales = [SYSTEMS["layer_norm_scaling"](tiny_config(), "decoder").connection(i).input_scale for i in range(12)]
    assert scales == pytest.approx([1] * 3 + [0.70711] * 3 + [0.57735] * 3 + [0.5] * 3, abs=1e-5)


@pytest.mark.parametrize(("layers", "start"), [(18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)])
def test_layer_scale_starts_smaller_where_it_is_deeper(layers, start):
    connection = SYSTEMS["layer_scale"](tiny_config(encoder_layers=layers), "encoder").connection(0)
    torch.testing.assert_close(connection.gain.detach(), torch.full((16,), start))


@pytest.mark.parametrize(("layers", "post_ln"), [(3, 0), (4, 1), (11, 2), (12, 3)])
def test_a_quarter_of_mix_ln_is_post_ln(layers, post_ln):
    system = SYSTEMS["mix_ln"](tiny_config(decoder_layers=layers), "decoder")
    kinds = [type(system.connection(index)) for index in range(3 * layers)]
    assert kinds == [PostLNConnection] * 3 * post_ln + [PreLNConnection] * 3 * (layers - post_ln)


def test_gpas_scales_what_comes_out_and_not_its_gradient():
    connection = GPASConnection(16)
    connection.alpha.data.fill_(0.5)
    x, f = (torch.randn(3, 16, requires_grad=True) for _ in range(2))
    out = connection(x, f)
    gate = 0.5 / (1 + math.exp(-0.5))
    torch.testing.assert_close(out, (1 - gate) * (x + f))
    out.backward(direction := torch.randn(3, 16))
    torch.testing.assert_close(x.grad, direction)
    torch.testing.assert_close(f.grad, direction)
    slope = gate / 0.5 + gate * (1 - gate / 0.5)  # SiLU'(a) = σ + a σ (1 − σ)
    torch.testing.assert_close(connection.alpha.grad, -(slope * (x + f) * direction).sum().reshape(1).detach())


def test_b2t_adds_the_input_of_the_layer_before_its_last_norm(batch):
    model = randomize(model_of("b2t"))
    for stack in (model.model.encoder, model.model.decoder):
        layer, seen = stack.layers[1], {}
        layer.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(z=args[0]))
        layer.fc1.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(x=args[0]))
        layer.register_forward_hook(lambda m, args, output, seen=seen: seen.update(out=output))
        model(**batch)
        norm = layer.final_layer_norm
        total = seen["z"] + seen["x"] + layer.feed_forward(seen["x"])
        expected = nn.functional.layer_norm(total, (16,), norm.weight, norm.bias)
        torch.testing.assert_close(seen["out"], expected)


# --- identity at the start ----------------------------------------------------------------------------


def stack_inputs_and_outputs(model, batch):
    """Of both stacks: what enters the first layer, and what comes out."""
    seen = {}
    for name, stack in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        stack.layers[0].register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    outputs = model(**batch, output_hidden_states=True)
    return [
        (seen["encoder"], outputs.encoder_last_hidden_state),
        (seen["decoder"], outputs.decoder_hidden_states[-1]),
    ]


@pytest.mark.parametrize("system", ["rezero", "fixup"])
def test_a_stack_without_layer_norm_starts_as_the_identity(batch, system):
    for embedded, output in stack_inputs_and_outputs(model_of(system), batch):
        assert embedded.std() > 0.5
        assert torch.equal(embedded, output)


def test_rezero_post_ln_starts_as_repeated_normalisation(batch):
    for embedded, output in stack_inputs_and_outputs(model_of("rezero_post_ln"), batch):
        torch.testing.assert_close(output, layer_norm(embedded), rtol=0, atol=1e-4)


def test_fixups_logits_start_at_zero(batch):
    logits = model_of("fixup")(**batch).logits
    assert not logits[..., :PAD].any() and (logits[..., PAD] == -1e4).all()


def test_looklinears_feed_forward_branches_start_linear():
    """fc2(relu(fc1 x)) = A B x, with the halves of the weights, for any x."""
    torch.manual_seed(1)
    x = 3 * torch.randn(2, 5, 16, dtype=torch.float64)
    model = model_of("looklinear").double()
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        a, b = layer.fc2.weight[:, :16], layer.fc1.weight[:16]
        torch.testing.assert_close(layer.feed_forward(x), x @ (a @ b).T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_ffn_dim": 31}, "encoder_ffn_dim=31 must be even"),
        ({"decoder_ffn_dim": 33}, "decoder_ffn_dim=33 must be even"),
        ({"activation_function": "gelu"}, "activation_function='gelu' must be 'relu'"),
    ],
)
def test_looklinear_refuses_what_it_cannot_make_linear(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(encoder_residual="looklinear", decoder_residual="looklinear", **changes)
    tiny_config(**changes)


# --- parameters that are shared, or not ---------------------------------------------------------------


@pytest.mark.parametrize("system", ["rezero", "rezero_post_ln"])
def test_the_sublayers_of_a_layer_share_one_alpha(system, tmp_path, batch):
    model = model_of(system)
    alphas = {name: p for name, p in model.named_parameters() if name.endswith("alpha")}
    layers = [f"model.{stack}.layers.{i}" for stack in ("encoder", "decoder") for i in range(2)]
    assert list(alphas) == [f"{layer}.self_attn_layer_norm.alpha" for layer in layers]
    for value, alpha in enumerate(alphas.values(), start=1):
        alpha.data.fill_(value)
    model.save_pretrained(tmp_path)
    loaded = AdminForConditionalGeneration.from_pretrained(tmp_path)
    for either in (model, loaded):
        for value, layer in enumerate(layers, start=1):
            connections = [connection for _, connection in residual_connections(either.get_submodule(layer))]
            assert [float(c.branch_scale.detach()) for c in connections] == [value] * len(connections)


def test_at_the_start_only_alpha_learns_in_rezero(batch):
    model = model_of("rezero").train()
    model(**batch).loss.backward()
    for name, parameter in model.model.decoder.layers.named_parameters():
        moves = parameter.grad is not None and bool(parameter.grad.any())
        assert moves == name.endswith("alpha"), name
    # The decoder does not look at the encoder yet
    assert not any(bool(p.grad.any()) for p in model.model.encoder.layers.parameters())
    for layer in model.model.decoder.layers:
        layer.self_attn_layer_norm.alpha.data.fill_(0.1)
    model.zero_grad()
    model(**batch).loss.backward()
    assert all(bool(layer.self_attn_layer_norm.alpha.grad.any()) for layer in model.model.encoder.layers)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"share_encoder_decoder_embeddings": False}])
def test_fixups_output_layer_is_its_own_and_starts_at_zero(tmp_path, batch, changes):
    model = tiny_model(decoder_residual="fixup", **changes)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    assert id(model.lm_head.weight) not in embeddings and not model.lm_head.weight.any()
    tied = model.model.encoder.embed_tokens.weight is model.model.decoder.embed_tokens.weight
    assert tied == (changes == {}), "input embeddings are tied as the configuration says"
    learn(model, batch, updates=3).eval()
    assert model.lm_head.weight[:PAD].any() and not model.lm_head.weight[PAD].any()
    model.save_pretrained(tmp_path)
    loaded = AdminForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.decoder.embed_tokens.weight)
    # The class that all models share has not changed
    assert tiny_model().lm_head.weight is not model.lm_head.weight
    fresh = tiny_model(share_encoder_decoder_embeddings=False)
    assert fresh.lm_head.weight is fresh.model.decoder.embed_tokens.weight


def test_only_the_decoders_system_says_whether_the_output_layer_is_tied():
    model = tiny_model(encoder_residual="fixup")
    assert model.lm_head.weight is model.model.shared.weight and model.lm_head.weight.any()


@pytest.mark.parametrize("share", [True, False])
def test_fixups_output_layer_follows_when_embeddings_are_resized(batch, share):
    model = learn(tiny_model(decoder_residual="fixup", share_encoder_decoder_embeddings=share), batch, updates=3)
    before = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(VOCAB_SIZE + 6)
    if not share:
        model.resize_decoder_token_embeddings(VOCAB_SIZE + 6)
    logits = model.eval()(**batch).logits
    assert logits.shape[-1] == model.lm_head.weight.shape[0] == VOCAB_SIZE + 6
    assert torch.equal(model.lm_head.weight[:VOCAB_SIZE], before)
    assert model.lm_head.weight is not model.model.decoder.embed_tokens.weight


# --- half precision, training -------------------------------------------------------------------------


WITHOUT_SCALES = {"post_ln", "pre_ln", "looklinear", "deepnorm", "admin_constant", "admin_constant_o1", "ds_init"}
WITHOUT_SCALES |= {"b2t", "keel", "mix_ln", "layer_norm_scaling"}


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
@every_system
def test_scales_stay_float32_to_the_bit(system, convert):
    model = model_of(system)
    for scale, _ in scales_of(model):
        scale.data.fill_(1.2345678)
    convert(model)
    assert model.lm_head.weight.dtype in (torch.float16, torch.bfloat16)
    assert model.model.encoder.layers[0].fc1.weight.dtype == model.lm_head.weight.dtype
    assert bool(scales_of(model)) == (system not in WITHOUT_SCALES)
    for scale, _ in scales_of(model):
        assert scale.dtype == torch.float32 and bool((scale == torch.tensor(1.2345678)).all())


@every_system
def test_scales_follow_to_float64_and_to_other_devices(system):
    assert {p.dtype for p in model_of(system).double().parameters()} == {torch.float64}
    assert all(p.is_meta for p in model_of(system).to("meta").parameters())


@pytest.mark.parametrize(("encoder", "decoder"), SYSTEM_PAIRS)
def test_every_system_learns(batch, encoder, decoder):
    model = tiny_model(encoder_residual=encoder, decoder_residual=decoder, dropout=0.0)
    initialize_omega(model, profile_residuals(model, batch))
    learn(model, batch, updates=20).eval()
    assert float(model(**batch).loss.detach()) < 0.8 * math.log(VOCAB_SIZE), "0.8 of what knowing nothing costs"


@every_system
def test_every_parameter_gets_a_gradient_under_autocast(batch, system):
    """None is left out of the graph, which DistributedDataParallel would wait for."""
    model = randomize(model_of(system)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
    for scale, _ in scales_of(model):
        assert scale.grad.any()


# --- systems of one's own -----------------------------------------------------------------------------


class OwnSystem(ResidualSystem):
    """Branches with an initialisation of their own, an untied output layer, and something behind the stack."""

    initializers = ResidualSystem.initializers | {"fc2": nn.init.zeros_, "lm_head": nn.init.ones_}

    def after_stack(self):
        return nn.Tanh()


def test_a_system_of_ones_own_needs_no_edit_of_the_model(monkeypatch, batch):
    monkeypatch.setitem(SYSTEMS, "own", OwnSystem)
    model = model_of("own")
    assert all(not layer.fc2.weight.any() and layer.fc1.weight.any() for layer in model.model.encoder.layers)
    assert bool((model.lm_head.weight == 1).all()) and model.model.shared.weight.std() > 0.1
    assert model(**batch).encoder_last_hidden_state.abs().max() < 1


def test_the_example_of_the_documentation_runs():
    try:
        result = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
        assert result.attempted > 5 and result.failed == 0
    finally:
        SYSTEMS.pop("small_branches", None)


def test_the_page_of_systems_lists_them_all():
    table = PAGE.read_text(encoding="utf-8").partition("## All of them")[2].partition("## ")[0]
    assert [
        name
        for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) ", table, re.MULTILINE)
        for name in re.findall(r"\w+", row)
    ] == list(SYSTEMS)


def test_an_unknown_system_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=f"encoder_residual='own'.*choose one of {', '.join(SYSTEMS)}"):
        tiny_config(encoder_residual="own")

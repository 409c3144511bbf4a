import json
import random

import numpy as np
import pytest
import torch
from conftest import PAD, SYSTEM_PAIRS, padded_batch, randomize, tiny_model
from torch import nn

from admin_hf import ResidualProfile, initialize_omega, profile_residuals
from admin_hf.profiling import StackProfile
from admin_hf.residual import AdminConnection, residual_connections


def stacks(model, profile):
    return [(model.base_model.encoder, profile.encoder), (model.base_model.decoder, profile.decoder)]


def real_tokens(batch):
    return [batch["attention_mask"].bool(), batch["labels"].ne(-100)]


# --- what is measured ---------------------------------------------------------------------------------


def test_the_chain_is_what_an_observer_of_the_branches_computes(batch):
    """Independent of the profile: put the profile's ω into the model, run it with the same random numbers, and compare
    each ω with the variances of the real branch outputs, caught where attention and feed-forward return them."""
    model = tiny_model(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    profile = profile_residuals(model, batch)
    initialize_omega(model, profile)
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.model.named_modules():
        if name.endswith(("self_attn", "encoder_attn", "fc2")):
            module.register_forward_hook(
                lambda m, args, out, name=name: outputs.update({name: out[0] if isinstance(out, tuple) else out})
            )
        elif name.endswith("layers.0"):
            module.register_forward_pre_hook(lambda m, args, name=name: outputs.update({f"{name}.x_0": args[0]}))
    with torch.no_grad():
        model.train()(**batch)

    for stack, measured, tokens in zip(
        ("encoder", "decoder"), (profile.encoder, profile.decoder), real_tokens(batch), strict=True
    ):
        total = outputs[f"{stack}.layers.0.x_0"][tokens].var(correction=0)
        branches = [out for name, out in outputs.items() if name.startswith(stack) and not name.endswith("x_0")]
        assert len(branches) == len(measured.omega)
        for i, branch in enumerate(branches):
            if i > 0:  # ω_i² = Var[x_0] + Σ_{0<j<i} Var[f_j]
                assert measured.omega[i] == pytest.approx(float(total.sqrt()), rel=1e-5)
            variance = branch[tokens].var(correction=0)
            assert measured.branch_variances[i] == pytest.approx(float(variance), rel=1e-5)
            total = total + variance
        assert measured.omega[0] == 1.0


def test_the_chain_is_the_reference_implementations_too(batch):
    """ω_{i+1}² = Var[ω_i x_{i-1}] + Var[f_i], which equals the sum because LayerNorm outputs have variance 1."""
    profile = profile_residuals(tiny_model(encoder_layers=6, decoder_layers=6), batch)
    for stack in (profile.encoder, profile.decoder):
        for i in range(1, len(stack.omega)):
            shortcut = stack.omega[i - 1] ** 2 * stack.shortcut_variances[i - 1]
            assert stack.omega[i] ** 2 == pytest.approx(shortcut + stack.branch_variances[i - 1], rel=1e-4)


def test_padding_is_left_out(batch):
    model = tiny_model(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    profile = profile_residuals(model, batch)
    longer = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 5), value=PAD),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 5)),
        "labels": nn.functional.pad(batch["labels"], (0, 9), value=-100),
    }
    for measured, padded in zip(stacks(model, profile), stacks(model, profile_residuals(model, longer)), strict=True):
        assert padded[1].branch_variances == pytest.approx(measured[1].branch_variances, rel=1e-5)
        assert padded[1].omega == pytest.approx(measured[1].omega, rel=1e-5)


@pytest.mark.parametrize("form", ["decoder_attention_mask", "decoder_input_ids", "no attention_mask"])
def test_every_form_of_a_batch_says_where_padding_is(batch, form):
    model = tiny_model(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    expected = profile_residuals(model, batch)
    shifted = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    other = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": shifted}
    if form == "decoder_attention_mask":
        other["decoder_attention_mask"] = batch["labels"].ne(-100).long()
    elif form == "no attention_mask":
        # Attention then reads padding, but the variances leave it out: equal where no row is padded
        batch = padded_batch(rows=1)
        other = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
        expected = profile_residuals(model, batch)
    profile = profile_residuals(model, other)
    if form == "decoder_input_ids":
        # The last input of a shorter target is a real token whose label is none: one more position a row counts
        tokens = shifted.ne(PAD)
        tokens[:, 0] = True
        assert int(tokens.sum()) == int(batch["labels"].ne(-100).sum()) + 3
        assert profile.encoder == expected.encoder
        assert profile.decoder.branch_variances == pytest.approx(expected.decoder.branch_variances, rel=0.2)
    else:
        for stack, same in ((profile.encoder, expected.encoder), (profile.decoder, expected.decoder)):
            assert stack.branch_variances == pytest.approx(same.branch_variances, rel=1e-5)


def test_a_large_batch_is_cut_by_rows(monkeypatch):
    model = tiny_model(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    batch = padded_batch(rows=6)
    monkeypatch.setattr("admin_hf.profiling.MAX_PROFILE_TOKENS", 3 * 9 + 8)  # three rows of nine, and a bit
    cut = profile_residuals(model, batch)
    assert cut == profile_residuals(model, {name: value[:3] for name, value in batch.items()})
    monkeypatch.setattr("admin_hf.profiling.MAX_PROFILE_TOKENS", 1)
    assert profile_residuals(model, batch) == profile_residuals(
        model, {name: value[:1] for name, value in batch.items()}
    )


def test_variances_are_accumulated_in_float32_for_half_precision_models(batch):
    config = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    exact = profile_residuals(tiny_model(**config), batch)
    half = profile_residuals(tiny_model(**config).bfloat16(), batch)
    for stack, reference in ((half.encoder, exact.encoder), (half.decoder, exact.decoder)):
        assert stack.omega == pytest.approx(reference.omega, rel=0.02)
        # A sum in bfloat16 would have 8 significant bits
        assert any(value != float(torch.tensor(value, dtype=torch.bfloat16)) for value in stack.branch_variances)


# --- what follows -------------------------------------------------------------------------------------


def test_omega_of_a_hand_made_profile_is_the_closed_form():
    stack = StackProfile(names=["a"], branch_variances=[0.44], shortcut_variances=[1.0], omega=[1.0])
    assert stack.next_omega() == pytest.approx(1.2)  # sqrt(1 + 0.44)
    stack.branch_variances.append(0.25)
    assert stack.next_omega() == pytest.approx(1.3)  # sqrt(1 + 0.44 + 0.25)
    stack.branch_variances.append(0.56)
    assert stack.next_omega() == pytest.approx(1.5)


def test_dependency_on_the_branch_falls_as_one_over_i():
    """β²_{i,i} = Var f_i / (ω_i² + Var f_i), measured on the sum itself, and its mean against 1/i for i ≥ 50."""
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    model = tiny_model(encoder_layers=30, decoder_layers=20, **sizes)
    batch = padded_batch(rows=8, source=20, target=20)
    profile = profile_residuals(model, batch)
    initialize_omega(model, profile)
    measured: dict[str, list[float]] = {"encoder": [], "decoder": []}
    for (stack, _), name, tokens in zip(stacks(model, profile), measured, real_tokens(batch), strict=True):
        for _, connection in residual_connections(stack):

            def observe(module, args, name=name, tokens=tokens):
                shortcut, branch = (t[tokens].detach() for t in args)
                omega = module.omega if isinstance(module, AdminConnection) else 1.0
                scaled, f = (shortcut * omega).var(correction=0), branch.var(correction=0)
                measured[name].append(float(f / (scaled + f)))

            connection.register_forward_pre_hook(observe)
    model.train()(**batch)
    for (_, stack), dependencies in zip(stacks(model, profile), measured.values(), strict=True):
        exact = [f / (omega**2 + f) for f, omega in zip(stack.branch_variances, stack.omega, strict=True)]
        assert dependencies[1:] == pytest.approx(exact[1:], rel=0.05), "another draw of the dropout"
        ratios = [exact[i] * (i + 1) for i in range(50, len(exact))]  # i counts from 0
        assert ratios and 0.75 < np.mean(ratios) < 1.25


def test_initialising_writes_omega_into_all_entries_and_nothing_else(batch):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profile = profile_residuals(model, batch)
    assert not model.omega_initialized and not model.is_profiled
    initialize_omega(model, profile)
    assert model.omega_initialized and model.is_profiled
    values = {
        f"model.{s}.{name}.omega": omega
        for s, stack in (("encoder", profile.encoder), ("decoder", profile.decoder))
        for name, omega in zip(stack.names, stack.omega, strict=True)
    }
    for name, value in model.state_dict().items():
        if name.endswith("omega"):
            assert torch.equal(value, torch.full((16,), values[name])), name
            assert values[name] > 1
        elif name.endswith("omega_profiled"):
            assert (before[name], value) == (0, 1)
        else:
            assert torch.equal(value, before[name]), name


# --- nothing else changes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "decoder"), SYSTEM_PAIRS)
def test_weights_modes_and_random_states_are_left_as_they_were(batch, encoder, decoder):
    model = randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder, encoder_layerdrop=0.5))
    model.train()
    model.model.decoder.layers[1].eval()  # a part that its user has frozen
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    profile = profile_residuals(model, batch)
    assert len(profile.encoder.names) == 4 and len(profile.decoder.names) == 6, "LayerDrop is off"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.model.encoder.layerdrop == 0.5
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_failure_leaves_the_model_as_it_was(batch):
    model = tiny_model()
    model.model.decoder.layers[1].fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.final_layer_norm is nan"):
        profile_residuals(model, batch)
    assert not model.training
    assert all(bool((m.omega == 1).all()) for m in model.modules() if isinstance(m, AdminConnection))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("missing", ["source", "target"])
def test_a_batch_without_one_side_is_refused(batch, missing):
    del batch["input_ids" if missing == "source" else "labels"]
    with pytest.raises(ValueError, match=f"no {missing}"):
        profile_residuals(tiny_model(), batch)


# --- a profile is data --------------------------------------------------------------------------------


def test_a_profile_survives_json_and_serves_another_seed(tmp_path, batch):
    profile = profile_residuals(tiny_model(), batch)
    profile.save(tmp_path / "folder" / "profile.json")
    assert ResidualProfile.load(tmp_path / "folder" / "profile.json") == profile
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["profile.json"]
    assert json.loads((tmp_path / "folder" / "profile.json").read_text())["decoder"]["omega"][0] == 1.0
    other = tiny_model(seed=7)
    initialize_omega(other, profile)
    assert float(other.model.encoder.layers[1].final_layer_norm.omega.detach()[0]) == pytest.approx(
        profile.encoder.omega[3]
    )


@pytest.mark.parametrize(
    "text", ["not JSON", '{"encoder": {"names": []}, "nonsense": {}}', "[1]", '{"encoder": {"names": ["a"]}}']
)
def test_a_file_that_is_no_profile_is_refused(tmp_path, text):
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ValueError, match="profile.json"):
        ResidualProfile.load(tmp_path / "profile.json")


def test_a_profile_of_another_model_is_refused_and_nothing_is_written(batch):
    model = tiny_model()
    with pytest.raises(ValueError, match="The profile has 6 sub-layers in its encoder, the model has 4"):
        initialize_omega(model, profile_residuals(tiny_model(encoder_layers=3), batch))
    broken = profile_residuals(model, batch)
    broken.decoder.omega[-1] = float("nan")
    with pytest.raises(ValueError, match="layers.1.final_layer_norm is nan"):
        initialize_omega(model, broken)
    assert not model.omega_initialized
    assert all(bool((m.omega == 1).all()) for m in model.modules() if isinstance(m, AdminConnection))


def test_the_table_is_short_at_any_depth(batch):
    table = profile_residuals(tiny_model(encoder_layers=40, decoder_layers=1), batch).table()
    lines = table.splitlines()
    assert len(lines) == 1 + 6 + 3
    assert "encoder.layers.0.self_attn_layer_norm" in lines[1] and "encoder.layers.39.final_layer_norm" in lines[6]


@pytest.mark.slow
def test_a_hundred_layers_in_each_stack_are_profiled(batch):
    model = tiny_model(encoder_layers=100, decoder_layers=100)
    profile = profile_residuals(model, batch)
    assert len(profile.encoder.omega) == 200 and len(profile.decoder.omega) == 300
    assert profile.encoder.omega == sorted(profile.encoder.omega) and 5 < profile.encoder.omega[-1] < 15

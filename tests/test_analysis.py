"""The analyses against computations of another kind, on tiny models; their figures and their command line."""

import doctest
import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import SYSTEM_PAIRS, randomize, tiny_config, tiny_model

from admin_hf import ResidualProfile, initialize_omega, profile_residuals
from admin_hf.__main__ import main
from admin_hf.analysis import (
    drawing,
    gradient_norms,
    initialized_model,
    layer_dependency,
    load_model,
    omega_history,
    random_batch,
    run_checkpoints,
    text_batch,
    training_loss,
)
from admin_hf.analysis.dependency import MAX_TOKENS
from admin_hf.analysis.gradients import StackGradients
from admin_hf.analysis.omega import OmegaHistory, StackOmega
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
            x = x * s + sizes[i + 2] * branch * r
            if isinstance(connection, PostLNConnection):
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
        with pytest.raises(ValueError, match=f"padding only in the {stack}"):
            layer_dependency(tiny_model(), batch | {name: torch.full_like(batch[name], value)})


def test_beta_is_of_the_first_tokens_of_a_large_batch():
    model = tiny_model()
    batch = random_batch(model.config, rows=MAX_TOKENS // 16 + 4, length=16)
    first = {name: tensor[: MAX_TOKENS // 16] for name, tensor in batch.items()}
    assert layer_dependency(model, batch).encoder.beta == layer_dependency(model, first).encoder.beta


def test_own_dependency_at_initialisation_falls_with_admin_and_pre_ln_and_is_level_with_post_ln():
    exponents = {}
    for system in ("admin", "pre_ln", "post_ln"):
        sizes = {"d_model": 64, "encoder_ffn_dim": 128, "encoder_layers": 12, "decoder_layers": 1}
        config = tiny_config(encoder_residual=system, decoder_residual=system, **sizes)
        stack = layer_dependency(initialized_model(config), random_batch(config)).encoder
        exponents[system] = stack.exponent()
        assert sum(beta**2 for beta in stack.beta[-1]) == pytest.approx(1, abs=0.25)  # nearly independent
    assert exponents["admin"] < -0.4 and exponents["pre_ln"] < -0.4 and abs(exponents["post_ln"]) < 0.3


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


@pytest.mark.parametrize("module", ["inputs", "dependency", "gradients"])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(import_module(f"admin_hf.analysis.{module}"))
    assert result.attempted > 0 and result.failed == 0


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", SYSTEM_PAIRS, ids="-".join)
def test_gradient_norms_are_those_of_autograd(pair, batch):
    model = randomize(tiny_model(encoder_residual=pair[0], decoder_residual=pair[1], label_smoothing=0.1))
    outputs = {"encoder": [], "decoder": []}
    handles = [
        connection.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        for stack, seen in outputs.items()
        for _, connection in residual_connections(getattr(model.model, stack))
    ]
    logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    # The smoothed loss over the vocabulary without padding, written out
    log_probabilities = logits[batch["labels"] != -100].log_softmax(-1)[:, :-1]
    targets = batch["labels"][batch["labels"] != -100]
    nll = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    loss = (0.9 * nll - 0.1 * log_probabilities.mean(-1)).mean()
    assert loss.item() == pytest.approx(training_loss(model, batch).item(), rel=1e-4)
    measured = gradient_norms(model, batch)
    for stack, seen in outputs.items():
        norms = [g.norm().item() for g in torch.autograd.grad(loss, seen, retain_graph=True)]
        found = getattr(measured, stack)
        assert found.largest_norm == pytest.approx(max(norms), rel=1e-3)
        assert found.relative_norms == pytest.approx([norm / max(norms) for norm in norms], rel=1e-3)


def test_measuring_gradients_leaves_the_model_as_it_was(batch):
    model = tiny_model().train()
    model.model.encoder.eval()
    model.model.encoder.layers[0].fc1.weight.requires_grad_(False)
    before = [(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    gradient_norms(model, batch)
    layer_dependency(model, batch)
    assert ([(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())


def test_steps_and_verdict_tell_where_gradients_vanish():
    """Each step back through encoder-attention halves the gradient, the others leave it."""
    names = [f"layers.{i}.{name}" for i in range(4) for name in ResidualSystem.SUBLAYERS["decoder"]]
    norms = [2.0 ** -(4 - (i + 2) // 3) for i in range(12)]
    stack = StackGradients("post_ln", names, norms, 3.0)
    assert stack.steps() == pytest.approx({"self-attention": 1, "encoder-attention": 0.5, "feed-forward": 1})
    assert stack.lowest_to_highest() == pytest.approx(1 / 16)
    assert "gradients vanish" in stack.verdict() and "0.50 through encoder-attention" in stack.verdict()
    assert "do not vanish" in StackGradients("pre_ln", names, norms[::-1], 3.0).verdict()
    assert "no gradient" in StackGradients("fixup", names, [0.0] * 12, 0.0).verdict()


def test_a_loss_that_is_not_finite_is_refused(batch):
    model = tiny_model()
    model.model.decoder.layers[0].fc1.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="training loss is nan"):
        gradient_norms(model, batch)
    with pytest.raises(ValueError, match="no labels"):
        gradient_norms(model, {"input_ids": batch["input_ids"]})


# --- ω over a run ---------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, batch):
    """A run's folder with a profile and two checkpoints, as Trainer leaves it; ω is 1.5 and 2 in them but for one."""
    model = tiny_model(encoder_layers=12)
    profile = profile_residuals(model, batch)
    initialize_omega(model, profile)
    profile.save(tmp_path / "residual_profile.json")
    for step, value in ((90, 1.5), (100, 2.0)):
        for name, parameter in model.named_parameters():
            if name.endswith("omega"):
                parameter.data.fill_(value)
        model.model.encoder.layers[10].final_layer_norm.omega.data[0] = 7.0
        for layer in model.model.encoder.layers:
            layer.self_attn.q_proj.weight.data *= 1.5
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-110").mkdir()  # cut short
    return tmp_path


def test_omega_is_read_by_sublayer_in_execution_order_and_by_update(run):
    profile = ResidualProfile.load(run / "residual_profile.json")
    history = omega_history(run_checkpoints(run)[::-1], profile)
    assert history.updates == [0, 90, 100]
    assert history.encoder.names == profile.encoder.names[1:] and history.decoder.names == profile.decoder.names[1:]
    assert history.encoder.mean[0] == history.encoder.min[0] == profile.encoder.omega[1:]
    changed = history.encoder.names.index("layers.10.final_layer_norm")
    assert history.encoder.max[2] == [7.0 if i == changed else 2.0 for i in range(23)]
    assert history.encoder.mean[2][changed] == pytest.approx((15 * 2 + 7) / 16)
    assert history.decoder.mean[1:] == [[1.5] * 5, [2.0] * 5]


def test_the_update_of_a_folder_of_another_name_is_in_its_trainer_state(run):
    (run / "checkpoint-90").rename(run / "best")
    assert omega_history([run / "best"]).updates == [90]
    (run / "best" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="does not say after how many updates"):
        omega_history([run / "best"])


def test_checkpoints_of_different_models_are_refused(run):
    tiny_model(encoder_layers=1).save_pretrained(run / "checkpoint-100")
    with pytest.raises(ValueError, match="Not all have the same sub-layers"):
        omega_history([run / "checkpoint-90", run / "checkpoint-100"])
    with pytest.raises(ValueError, match="no checkpoints"):
        omega_history([])


def test_verdict_on_omega_counts_what_fell():
    stack = StackOmega(["a", "b"], [[1.0, 4.0], [0.5, 8.0]], [[1.0, 4.0], [0.25, 8.0]], [[1.0, 4.0], [0.75, 9.0]])
    text = OmegaHistory([0, 10], stack, StackOmega([], [[], []], [[], []], [[], []])).verdict()
    assert "fell in 1 of 2 sub-layers" in text and "factor of 1.00 (0.50 to 2.00)" in text
    assert "between 0.25 and 9.00" in text and "Decoder: has no ω" in text


@pytest.mark.parametrize(("first", "last", "factor"), [(2.0, -1.0, "-0.50"), (2.0, 0.0, "0.00"), (0.0, 2.0, "inf")])
def test_a_mean_of_omega_may_reach_zero(first, last, factor):
    stack = StackOmega(["a"], [[first], [last]], [[first], [last]], [[first], [last]])
    assert f"changed by a factor of {factor} " in stack.verdict()


def test_an_omega_that_is_not_finite_is_refused_by_name(run):
    model = tiny_model(encoder_layers=12)
    model.model.encoder.layers[3].final_layer_norm.omega.data[2] = float("nan")
    model.save_pretrained(run / "checkpoint-100")
    with pytest.raises(ValueError, match=r"checkpoint-100 has NaN .* in .*layers.3.final_layer_norm.omega"):
        omega_history(run_checkpoints(run))


# --- what is measured -----------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="vocab_size=1 leaves no random tokens"):
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


# --- figures --------------------------------------------------------------------------------------


def test_lines_have_labels_caption_and_styles_that_grey_print_tells_apart(tmp_path):
    series = {name: ([1, 2], [k, k]) for k, name in enumerate("abcdefgh")} | {"empty": ([], [])}
    figure = drawing.draw_lines(tmp_path / "new" / "x.png", "Title", "x", "y", series, caption="as expected")
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == list("abcdefgh")
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines[:6]}) == 6
    assert len({str(style) for _, style in drawing.STYLES}) == 6
    assert figure.get_supxlabel() == "as expected"
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"]


def test_the_heat_map_shows_beta(batch):
    result = layer_dependency(tiny_model(encoder_layers=3), batch)
    figure = drawing.draw_dependency(result)
    pixels = figure.axes[0].get_images()[0].get_array()
    assert pixels.shape == (6, 7)
    assert pixels[4].compressed().tolist() == pytest.approx(result.encoder.beta[4])
    assert result.verdict() in " ".join(figure.get_supxlabel().split())


def test_gradients_of_several_models_are_lines_of_one_figure(batch):
    results = {name: gradient_norms(tiny_model(decoder_residual=name), batch) for name in ("admin", "pre_ln")}
    figure = drawing.draw_gradients(results)
    lines = figure.axes[1].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [r.decoder.relative_norms for r in results.values()]
    assert figure.axes[0].get_yscale() == "log"


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def config_folder(tmp_path):
    tiny_config().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_a_newcomer_without_data_gets_figure_numbers_and_verdict(config_folder, tmp_path, capsys):
    assert main(["analyze", "dependency", config_folder, "--output", str(tmp_path / "out"), "--seed", "3"]) == 0
    data = json.loads((tmp_path / "out" / "dependency.json").read_text())
    model = load_model(config_folder, seed=3)
    assert data["encoder"]["beta"] == layer_dependency(model, random_batch(model.config, seed=3)).encoder.beta
    assert data["verdict"] in capsys.readouterr().out and "Fig. 7" in data["expectation"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dependency.json", "dependency.png"]


def test_several_sources_share_the_figure_of_gradients_and_no_other(config_folder, tmp_path):
    tiny_config(encoder_residual="pre_ln").save_pretrained(tmp_path / "other" / "tiny")
    for what in ("gradients", "dependency"):
        sources = [config_folder, str(tmp_path / "other" / "tiny" / "config.json")]
        assert main(["analyze", what, *sources, "--output", str(tmp_path / "out")]) == 0
    labels = [f"{tmp_path.name}-tiny", "other-tiny"]
    assert list(json.loads((tmp_path / "out" / "gradients.json").read_text())) == labels
    names = {"gradients.png", "gradients.json", *(f"dependency-{a}.{b}" for a in labels for b in ("png", "json"))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_text_is_measured_by_the_sources_own_tokenizer(tmp_path):
    words = tokenizer()
    model = tiny_model(vocab_size=len(words))
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    for name, lines in (("a.en", ["a man", "a man walks ."]), ("a.de", ["ein mann", "geht ."])):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    text = ["--text", str(tmp_path / "a.en"), str(tmp_path / "a.de")]
    assert main(["analyze", "gradients", str(tmp_path / "model"), *text, "--output", str(tmp_path / "out")]) == 0
    batch = text_batch(words, ["a man", "a man walks ."], ["ein mann", "geht ."])
    data = json.loads((tmp_path / "out" / "gradients.json").read_text())["model"]
    assert data["decoder"]["largest_norm"] == pytest.approx(gradient_norms(model, batch).decoder.largest_norm)


def test_omega_of_a_run_starts_with_its_profile(run, tmp_path):
    assert main(["analyze", "omega", str(run), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "omega.json").read_text())["updates"] == [0, 90, 100]
    assert (tmp_path / "out" / "omega.png").exists()


@pytest.mark.parametrize("what", ["updates", "output-change"])
def test_the_analyses_of_change_have_a_command(what, run, config_folder, tmp_path):
    arguments = {
        "updates": [str(run)],
        "output-change": [config_folder, "--repeats", "1", "--sublayers", "2", "4", "6"],
    }
    assert main(["analyze", what, *arguments[what], "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{what}.json", f"{what}.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dependency", "./nowhere"], "There is no ./nowhere"),
        (["dependency", "CONFIG", "CONFIG"], "named twice"),
        (["dependency", "CONFIG", "--text", "a", "b"], "has no tokenizer"),
        (["omega", "CONFIG"], "no complete checkpoint"),
        (["omega", "./nowhere"], "There is no folder"),
        (["updates", "CONFIG"], "no complete checkpoint"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_leaves_nothing(arguments, message, config_folder, tmp_path, capsys):
    arguments = [config_folder if argument == "CONFIG" else argument for argument in arguments]
    assert main(["analyze", *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", [".", "config.json"])
def test_the_folder_one_is_in_is_a_source(source, config_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(config_folder)
    assert main(["analyze", "gradients", source, "--output", str(tmp_path / "out")]) == 0
    assert list(json.loads((tmp_path / "out" / "gradients.json").read_text())) == ["tiny"]
    assert main(["analyze", "gradients", source, config_folder]) == 2  # named twice


@pytest.mark.parametrize("below", [(), ("new", "newer")])
def test_an_output_that_cannot_be_a_folder_is_refused_before_anything_is_measured(
    below, config_folder, tmp_path, capsys
):
    (tmp_path / "out").write_text("mine")
    assert main(["analyze", "dependency", config_folder, "--output", str(tmp_path.joinpath("out", *below))]) == 2
    printed = capsys.readouterr()
    assert f"{tmp_path / 'out'} is a file" in printed.err and printed.out == ""
    assert (tmp_path / "out").read_text() == "mine"


def test_a_file_that_cannot_be_replaced_leaves_no_half_behind(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(OSError):
        drawing.write_file(tmp_path / "x.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_text_that_is_not_utf_8_is_refused_by_name(tmp_path, capsys):
    words = tokenizer()
    tiny_model(vocab_size=len(words)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    (tmp_path / "a.en").write_bytes("café\n".encode("latin-1"))
    text = ["--text", str(tmp_path / "a.en"), str(tmp_path / "a.en")]
    assert main(["analyze", "gradients", str(tmp_path), *text, "--output", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'a.en'} is not UTF-8 text" in capsys.readouterr().err


def test_a_missing_matplotlib_is_one_sentence(config_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["analyze", "dependency", config_folder, "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "admin-hf[analysis]" in printed.err and printed.out == ""  # before anything is measured


@pytest.mark.slow
def test_the_other_commands_need_no_matplotlib():
    code = "import sys, admin_hf.__main__, admin_hf.analysis.drawing; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_says_what_the_paper_expects(capsys):
    for what in ("dependency", "gradients", "output-change", "updates", "omega"):
        with pytest.raises(SystemExit):
            main(["analyze", what, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "The paper expects" in text and f"{what}.png" in text

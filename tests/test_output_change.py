import json
from copy import deepcopy
from dataclasses import asdict
from math import log

import numpy
import pytest
import torch
from conftest import randomize, tiny_config, tiny_model

from admin_hf.analysis.drawing import draw_output_change
from admin_hf.analysis.inputs import initialized_model, random_batch
from admin_hf.analysis.output_change import OutputChange, fitted_curve, model_changes, output_change
from admin_hf.residual import SYSTEMS


LINEARS = [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")] + ["fc1", "fc2"]


def by_hand(model, batch, steps):
    """The change of the encoder's output when each matrix gets its step, by a second model and a loop over tokens."""
    moved = deepcopy(model)
    for name, step in steps.items():
        moved.get_submodule(name).weight.data += step
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        before, after = (m.get_encoder()(**inputs).last_hidden_state for m in (model, moved))
    squares = [
        sum((a - b) ** 2 for a, b in zip(after[row, column].tolist(), before[row, column].tolist(), strict=True))
        for row, column in batch["attention_mask"].nonzero().tolist()
    ]
    return sum(squares) / len(squares)


@pytest.mark.parametrize("system", ["admin", "post_ln", "pre_ln"])
def test_both_changes_are_those_of_a_model_perturbed_by_hand(system, batch):
    model = randomize(tiny_model(encoder_residual=system)).double()
    names = [f"model.encoder.layers.{layer}.{name}" for layer in range(2) for name in LINEARS]
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in names}

    noise = torch.Generator().manual_seed(5)
    random = {
        name: 1e-4 * torch.randn(model.get_submodule(name).weight.shape, generator=noise).sign() for name in names
    }
    expected = by_hand(model, batch, random)
    changes = model_changes(model, batch, seed=5)
    assert changes["random"] == pytest.approx(expected, rel=1e-4)

    logits = model(**batch).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    adam = torch.optim.Adam([model.get_submodule(name).weight for name in names], lr=1e-6, eps=1e-30)
    adam.step()
    steps = {}
    for name, weight in weights.items():
        parameter = model.get_submodule(name).weight
        steps[name] = parameter.detach() - weight
        parameter.data.copy_(weight)
    assert changes["adam"] == pytest.approx(by_hand(model, batch, steps), rel=1e-3)


def test_only_matrices_of_encoder_layers_move_by_equal_steps_and_against_the_gradient(batch):
    model = tiny_model().double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps = []

    def look(encoder, args):
        step = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
        steps.append({name: delta for name, delta in step.items() if delta.any()})

    hook = model.model.encoder.register_forward_pre_hook(look)
    model_changes(model, batch)
    hook.remove()
    *unmoved, random, adam = steps
    assert not any(unmoved)
    matrices = {f"model.encoder.layers.{layer}.{name}.weight" for layer in range(2) for name in LINEARS}
    assert random.keys() == matrices and adam.keys() == matrices
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if name in matrices:
            assert random[name].abs().allclose(torch.tensor(1e-4).double()) and abs(random[name].mean()) < 5e-5
            assert adam[name].allclose(-1e-6 * parameter.grad.sign())


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_are_left_as_they_were(training, batch):
    model = tiny_model(dropout=0.5).train(training)
    model.model.decoder.eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first = model_changes(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.model.encoder.training is training and not model.model.decoder.training
    assert model_changes(model, batch) == first, "dropout is off"


def test_weights_come_back_after_an_error(batch):
    model = tiny_model()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 3:  # of the loss, of F(x_0, W), of F(x_0, W*)
            raise KeyboardInterrupt

    model.model.encoder.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model_changes(model, batch)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


# --- sweep ----------------------------------------------------------------------------------------


def sweep(batch, **options):
    config = tiny_config(decoder_residual="pre_ln")
    return output_change(config, batch, systems=["admin"], sublayers=(2, 4, 6), **{"repeats": 1} | options)


def test_a_sweep_measures_a_profiled_model_for_each_depth_and_repeat(batch):
    result = sweep(batch, repeats=2, seed=7)
    model = initialized_model(tiny_config(encoder_layers=3, max_position_embeddings=9), 8, batch)
    assert model.model.encoder.layers[2].final_layer_norm.omega.mean() > 1.3
    expected = model_changes(model, batch, 8)
    assert {curve.perturbation: curve.changes[2][1] for curve in result.curves} == expected
    assert json.loads(json.dumps(asdict(result)))["curves"][0]["linear"].keys() == {"slope", "intercept", "r_squared"}


def test_a_sweep_depends_on_its_seed_alone(batch):
    state = torch.get_rng_state()
    first = sweep(batch)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert sweep(batch) == first != sweep(batch, seed=1)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_can_be_measured(system, batch):
    result = output_change(tiny_config(), batch, systems=[system], sublayers=(2, 4, 8), repeats=1)
    assert len(result.curves) == 2 and result.verdict().count(result.curves[0].label) >= 2


def test_the_encoder_s_own_system_is_measured_beside_those_of_the_paper(batch):
    class Own(SYSTEMS["post_ln"]):
        pass

    SYSTEMS["own"] = Own
    try:
        result = output_change(tiny_config(encoder_residual="own"), batch, sublayers=(2, 4, 6), repeats=1)
    finally:
        del SYSTEMS["own"]
    assert [(curve.perturbation, curve.system) for curve in result.curves] == [
        (perturbation, system)
        for perturbation in ("random", "adam")
        for system in ("post_ln", "pre_ln", "admin", "deepnorm", "own")
    ]
    assert result.curves[4].mean == result.curves[0].mean, "which is Post-LN under another name"


@pytest.mark.slow
def test_post_ln_outgrows_admin():
    """Of real models: at 12 sub-layers its output moves two to six times as far, at 72 seven times and more."""
    config = tiny_config(d_model=32, encoder_ffn_dim=64, decoder_layers=1)
    batch = random_batch(config, rows=4, length=16)
    result = output_change(config, batch, systems=("post_ln", "admin"), sublayers=(12, 36, 72), repeats=3)
    assert result.verdict().count("at N = 72 Post-LN changes") == 2, "whatever the step"
    for post_ln, admin in (result.curves[:2], result.curves[2:]):
        ratios = [one / other for one, other in zip(post_ln.mean, admin.mean, strict=True)]
        assert ratios[0] > 1.5 and ratios[-1] > max(4, 1.5 * ratios[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sublayers": (2, 4)}, r"\[2, 4\]; expected three or more"),
        ({"sublayers": (2, 5, 8)}, "even numbers"),
        ({"sublayers": (4, 2, 6)}, "rising"),
        ({"sublayers": (0, 2, 4)}, "above 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"systems": ["post_ln", "postln"]}, "'postln' is not a residual system"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_model_is_built(options, message, batch):
    batch["input_ids"] += 1000  # which the first model refuses
    with pytest.raises(ValueError, match=message):
        output_change(tiny_config(), batch, **options)


def test_a_batch_needs_labels(batch):
    with pytest.raises(ValueError, match="no labels"):
        output_change(tiny_config(), {"input_ids": batch["input_ids"]})


# --- fits and verdict -----------------------------------------------------------------------------

DEPTHS = [12, 24, 50, 100, 200]


def test_fits_are_those_of_numpy():
    rng = numpy.random.default_rng(0)
    changes = (rng.random((5, 4)) + numpy.array(DEPTHS)[:, None] / 100).tolist()
    curve = fitted_curve("admin", "adam", DEPTHS, changes, [1.0] * 5)
    assert curve.mean == pytest.approx(numpy.mean(changes, axis=1)) and curve.std == pytest.approx(
        numpy.std(changes, axis=1, ddof=1)
    )
    for fit, x in ((curve.linear, DEPTHS), (curve.logarithmic, numpy.log(DEPTHS))):
        slope, intercept = numpy.polyfit(x, curve.mean, 1)
        residual = numpy.array(curve.mean) - slope * numpy.array(x) - intercept
        assert (fit.slope, fit.intercept) == pytest.approx((slope, intercept))
        assert fit.r_squared == pytest.approx(1 - numpy.var(residual) / numpy.var(curve.mean))


def synthetic(**functions):
    """Of which the change is a hundredth of Σβ²_ii."""
    curves = [
        fitted_curve(system, perturbation, DEPTHS, [[f(n), f(n)] for n in DEPTHS], [100 * f(n) for n in DEPTHS])
        for perturbation in ("random", "adam")
        for system, f in functions.items()
    ]
    return OutputChange(DEPTHS, curves, d_model=16, seed=0)


def test_the_verdict_names_the_better_fit():
    result = synthetic(post_ln=lambda n: 3 * n + 1, admin=lambda n: 2 * log(n))
    post_ln, admin = result.curves[:2]
    assert post_ln.linear.r_squared == pytest.approx(1) and post_ln.linear.slope == pytest.approx(3)
    assert admin.logarithmic.r_squared == pytest.approx(1) and admin.logarithmic.slope == pytest.approx(2)
    assert post_ln.logarithmic.r_squared < 0.9 and admin.linear.r_squared < 0.9
    assert result.verdict().startswith(
        "Random perturbation: Post-LN linear in N, R² 1.00; Admin linear in log N, R² 1.00; at N = 200 Post-LN "
        "changes 56.7 times as much as Admin."  # 601 / (2 · ln 200)
    )


def test_the_theorem_is_one_line_for_all_systems():
    result = synthetic(post_ln=lambda n: 3 * n + 1, admin=lambda n: 2 * log(n))
    theorem = result.theorem("random")
    assert theorem.constant == pytest.approx(0.01) and theorem.r_squared == pytest.approx(1)
    assert theorem.ratios == {"Post-LN": pytest.approx((0.01, 0.01)), "Admin": pytest.approx((0.01, 0.01))}
    assert "Theorem 2, change = C Σβ²_ii: R² 1.00 with C = 0.01; change over Σβ²_ii: Post-LN 0.01 to 0.01; Admin" in (
        result.verdict()
    )
    result.curves[0].own[:] = [own / 10 for own in result.curves[0].own]  # no line is right for both
    assert result.theorem("random").r_squared < 1
    assert result.theorem("random").ratios["Post-LN"] == pytest.approx((0.1, 0.1))
    assert synthetic(rezero=lambda n: 0.0).theorem("random") is None


@pytest.mark.slow
def test_the_theorem_holds_under_random_steps():
    """Theorem 2, of real models of one initialisation: the change spans a factor of 25, its quotient by Σβ²_ii of 2.
    DeepNorm's matrices are smaller, so that the same step moves their branches further: its C is another."""
    config = tiny_config(d_model=64, encoder_ffn_dim=128, decoder_layers=1)
    result = output_change(config, random_batch(config, rows=4, length=16), sublayers=(12, 36, 72), repeats=2)
    assert {curve.system for curve in result.curves} == {"post_ln", "pre_ln", "admin", "deepnorm"}
    theorem = result.theorem("random")
    same = [theorem.ratios[name] for name in ("Post-LN", "Pre-LN", "Admin")]
    assert max(high for _, high in same) < 2 * min(low for low, _ in same) and theorem.r_squared > 0.9
    assert theorem.ratios["DeepNorm"][0] > 2 * theorem.constant
    changes = [change for curve in result.curves[:3] for change in curve.mean]
    assert max(changes) > 10 * min(changes)


def test_the_verdict_says_where_a_system_does_not_grow():
    result = synthetic(rezero=lambda n: 0.0, deepnorm=lambda n: 5 - n / 100)
    assert "rezero none at any depth; DeepNorm linear in N, falling, R² 1.00." in result.verdict()
    assert result.curves[0].linear.r_squared == 1 and result.curves[0].linear.slope == 0


def test_the_figure_shows_means_deviations_fits_and_verdict(tmp_path):
    result = synthetic(post_ln=lambda n: 3 * n + 1, admin=lambda n: 2 * log(n), rezero=lambda n: 0.0)
    figure = draw_output_change(result, tmp_path / "change.png")
    assert (tmp_path / "change.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in figure.axes] == [
        "Random perturbation",
        "Adam step",
        "Theorem 2: random perturbation",
    ]
    assert [list(points.get_xdata()) for points in figure.axes[2].get_lines()[:2]] == [
        curve.own for curve in result.curves[:2]
    ]
    for axes, curves in zip(figure.axes[:2], (result.curves[:2], result.curves[3:5]), strict=True):
        assert axes.get_yscale() == "log"
        assert [bar.get_label() for bar in axes.containers] == [curve.growth() for curve in curves]
        for bar, curve in zip(axes.containers, curves, strict=True):
            assert list(bar.lines[0].get_xdata()) == DEPTHS and list(bar.lines[0].get_ydata()) == curve.mean
        fits = [line for line in axes.get_lines() if len(line.get_xdata()) == 189]
        assert [line.get_ydata()[-1] for line in fits] == pytest.approx([601, 2 * log(200)])
        assert fits[0].get_color() != fits[1].get_color() and fits[0].get_linestyle() != fits[1].get_linestyle()
    assert result.verdict() in " ".join(figure.get_supxlabel().split())

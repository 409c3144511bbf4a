"""ω of a run by sub-layer and update."""

import pytest
from conftest import tiny_model

from admin_hf import ResidualProfile
from admin_hf.analysis import omega_history, run_checkpoints
from admin_hf.analysis.omega import OmegaHistory, StackOmega


def test_omega_is_read_by_sublayer_in_execution_order_and_by_update(run_folder):
    profile = ResidualProfile.load(run_folder / "residual_profile.json")
    history = omega_history(run_checkpoints(run_folder)[::-1], profile)
    assert history.updates == [0, 90, 100]
    assert history.encoder.names == profile.encoder.names[1:] and history.decoder.names == profile.decoder.names[1:]
    assert history.encoder.mean[0] == history.encoder.min[0] == profile.encoder.omega[1:]
    changed = history.encoder.names.index("layers.10.final_layer_norm")
    assert history.encoder.max[2] == [7.0 if i == changed else 2.0 for i in range(23)]
    assert history.encoder.mean[2][changed] == pytest.approx((15 * 2 + 7) / 16)
    assert history.decoder.mean[1:] == [[1.5] * 5, [2.0] * 5]


def test_the_update_of_a_folder_of_another_name_is_in_its_trainer_state(run_folder):
    (run_folder / "checkpoint-90").rename(run_folder / "best")
    assert omega_history([run_folder / "best"]).updates == [90]
    (run_folder / "best" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="does not say after how many updates"):
        omega_history([run_folder / "best"])


def test_checkpoints_of_different_models_are_refused(run_folder):
    tiny_model(encoder_layers=1).save_pretrained(run_folder / "checkpoint-100")
    with pytest.raises(ValueError, match="Not all have the same sub-layers"):
        omega_history([run_folder / "checkpoint-90", run_folder / "checkpoint-100"])
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


def test_an_omega_that_is_not_finite_is_refused_by_name(run_folder):
    model = tiny_model(encoder_layers=12)
    model.model.encoder.layers[3].final_layer_norm.omega.data[2] = float("nan")
    model.save_pretrained(run_folder / "checkpoint-100")
    with pytest.raises(ValueError, match=r"checkpoint-100 has NaN .* in .*layers.3.final_layer_norm.omega"):
        omega_history(run_checkpoints(run_folder))

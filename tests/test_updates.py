from dataclasses import asdict

import pytest
import torch
from conftest import learn, padded_batch, tiny_model
from safetensors.torch import load_file

from admin_hf.analysis import update_norms
from admin_hf.analysis.drawing import draw_updates
from admin_hf.analysis.updates import UpdateNorms


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three checkpoints of a model while it learns; dropout is on, as in training."""
    folder, model = tmp_path_factory.mktemp("run"), tiny_model(dropout=0.3, label_smoothing=0.1)
    torch.manual_seed(0)
    for update in (0, 5, 10):
        model.save_pretrained(folder / f"checkpoint-{update}")
        learn(model, padded_batch(), updates=5)
    return [folder / f"checkpoint-{update}" for update in (0, 5, 10)]


def key(layer: int, projection: str) -> str:
    return f"model.encoder.layers.{layer}.self_attn.{projection}.weight"


def relative(norms: torch.Tensor) -> list:
    return (norms / norms.max()).tolist()


def test_updates_are_differences_of_the_files(run, batch):
    result = update_norms(run, batch)
    assert result.checkpoints == ["checkpoint-0", "checkpoint-5", "checkpoint-10"]
    assert len(result.updates) == len(result.gradients) == 2
    for t, found in enumerate(result.updates):
        before, after = (load_file(folder / "model.safetensors") for folder in run[t : t + 2])
        norms = torch.tensor(
            [[((after[key(n, p)] - before[key(n, p)]) ** 2).sum() ** 0.5 for n in range(2)] for p in PROJECTIONS]
        )
        assert list(found) == list(PROJECTIONS)
        for projection, expected in zip(PROJECTIONS, relative(norms), strict=True):
            assert found[projection] == pytest.approx(expected, rel=1e-4)


def test_gradients_are_those_of_the_smoothed_loss_before_each_update(run, batch):
    result = update_norms(run, batch)
    for folder, found in zip(run[:2], result.gradients, strict=True):
        model = tiny_model()
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        log_p = model(**batch).logits[batch["labels"] != -100].log_softmax(-1)
        targets = batch["labels"][batch["labels"] != -100]
        nll = -log_p.gather(-1, targets[:, None]).mean()
        smooth = -log_p[:, :-1].mean()  # over the vocabulary without padding
        (0.9 * nll + 0.1 * smooth).backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        norms = torch.tensor([[(grads[key(n, p)] ** 2).sum() ** 0.5 for n in range(2)] for p in PROJECTIONS])
        for projection, expected in zip(PROJECTIONS, relative(norms), strict=True):
            assert found[projection] == pytest.approx(expected, rel=1e-3)


def test_reading_leaves_the_random_state(run, batch):
    state = torch.get_rng_state()
    first = update_norms(run, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert update_norms(run, batch) == first


def test_shards_are_one_checkpoint(run, batch, tmp_path):
    model = tiny_model()
    model.load_state_dict(load_file(run[1] / "model.safetensors"), strict=False)
    model.save_pretrained(tmp_path / "checkpoint-5", max_shard_size="10KB")
    assert len(list((tmp_path / "checkpoint-5").glob("*.safetensors"))) > 2
    sharded = update_norms([run[0], tmp_path / "checkpoint-5", run[2]], batch)
    assert asdict(sharded)["updates"] == update_norms(run, batch).updates


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"encoder_layers": 3}, "expected nothing"), ({"encoder_layers": 1}, "nothing"), ({"d_model": 8}, r"\(8, 8\)")],
)
def test_checkpoints_of_another_model_are_refused(changes, message, run, batch, tmp_path):
    tiny_model(**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} contains another model.*{message}"):
        update_norms([run[0], tmp_path], batch)


def test_equal_checkpoints_have_no_update(run, batch):
    with pytest.raises(ValueError, match="checkpoint-5 has the weights of .*checkpoint-5"):
        update_norms([run[1], run[1]], batch)


@pytest.mark.parametrize("count", [0, 1])
def test_an_update_needs_two_checkpoints(count, run, batch):
    with pytest.raises(ValueError, match=f"There are {count} checkpoints"):
        update_norms(run[:count], batch)


def test_a_batch_needs_labels(run):
    with pytest.raises(ValueError, match="no labels.*got input_ids"):
        update_norms(run, {"input_ids": torch.ones(1, 3, dtype=torch.long)})


def norms(*values: float) -> dict[str, list[float]]:
    """Two layers in which each matrix has these norms, times 1, 1/2, 1/4 and 1/8."""
    return {p: [value / 2**k for value in values] for k, p in enumerate(PROJECTIONS)}


def test_the_verdict_compares_the_spreads():
    balanced = UpdateNorms(["a", "b"], gradients=[norms(1.0, 0.1)], updates=[norms(0.8, 1.0)])
    assert balanced.verdict() == (
        "Updates are more balanced than gradients: between the layers of a matrix the largest norm is 1.25 times the "
        "smallest for updates and 10 times for gradients; between all layers and matrices 10 and 80 times (medians "
        "over 1 updates)."
    )
    other = UpdateNorms(["a", "b"], gradients=[norms(0.8, 1.0)], updates=[norms(1.0, 0.0)])
    assert other.verdict().startswith(
        "Updates are not more balanced than gradients: between the layers of a matrix the largest norm is inf times"
    )


def test_the_figure_has_a_line_for_each_layer_of_each_matrix(tmp_path):
    result = UpdateNorms(["a", "b", "c"], [norms(1.0, 0.1), norms(1.0, 0.2)], [norms(0.8, 1.0), norms(0.7, 1.0)])
    figure = draw_updates(result, tmp_path / "updates.png")
    assert (tmp_path / "updates.png").read_bytes().startswith(b"\x89PNG")
    panels = figure.axes[:8]  # W_Q, W_K, W_V, W_O of the gradients, then of the updates
    assert [list(line.get_ydata()) for line in panels[1].get_lines()] == [[0.5, 0.5], [0.05, 0.1]]
    assert [list(line.get_ydata()) for line in panels[4].get_lines()] == [[0.8, 0.7], [1.0, 1.0]]
    assert result.verdict() in " ".join(figure.get_supxlabel().split())

"""The exponential moving average of the weights, against NumPy's, and where a run has it in place of its weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors.numpy import load_file
from test_optimization import tiny_trainer
from tiny_runs import arguments, assert_equal_weights, flags, run, weights
from transformers import TrainerCallback, TrainerState

import run_translation
from admin_hf import AdminForConditionalGeneration, AdminProfilingCallback
from admin_hf.__main__ import main as admin_hf_main
from training.arguments import TranslationTrainingArguments, _check_moving_average
from training.embedded_data import write_embedded_data
from training.errors import InputError
from training.moving_average import WEIGHTS_NAME, MovingAverage


class Record(TrainerCallback):
    """The weights after each update, in float64."""

    def __init__(self) -> None:
        self.updates: list[dict[str, np.ndarray]] = []

    def on_step_end(self, *args, model=None, **kwargs) -> None:
        self.updates.append({name: p.detach().double().numpy().copy() for name, p in model.named_parameters()})


def average_by_hand(updates, decay):
    average = dict(updates[0])
    for t, now in enumerate(updates[1:], start=2):
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * value + (1 - d) * now[name] for name, value in average.items()}
    return average


@pytest.mark.parametrize("decay", [0.25, 0.999])
def test_the_model_of_a_run_is_the_average_of_its_updates(tmp_path, decay):
    record, model = Record(), tiny_model(omega_initialized=False)
    trainer = tiny_trainer(tmp_path, model, max_steps=9, ema_decay=decay, callbacks=[AdminProfilingCallback(), record])
    trainer.train()
    assert len(record.updates) == 9 and any(name.endswith("omega") for name in record.updates[0])
    expected = average_by_hand(record.updates, decay)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert parameter.dtype == torch.float32
    assert model.lm_head.weight is model.model.shared.weight
    assert any(not np.allclose(expected[name], value, atol=1e-3) for name, value in record.updates[-1].items())


def test_an_update_that_is_skipped_does_not_count():
    model = tiny_model()
    average = MovingAverage(model, 0.5)
    for step, skipped in enumerate((False, True, False), start=1):
        with torch.no_grad():
            model.model.shared.weight.fill_(float(step))
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        average.on_step_end(None, TrainerState(global_step=step), None, optimizer=optimizer)
    d = min(0.5, 4 / 13)
    assert average.average["model.shared.weight"].unique().tolist() == pytest.approx([d * 1 + (1 - d) * 3])


# --- in a run -------------------------------------------------------------------------------------

RUN = {"max_steps": 8, "save_steps": 2, "do_eval": True, "eval_strategy": "steps", "eval_steps": 2}
RUN |= {"predict_with_generate": False, "learning_rate": 0.03}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_embedded_data(folder, train=40, validation=6, test=2)
    return folder


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    assert run(data, folder / "run", **RUN, ema_decay=0.5) == 0
    return folder / "run"


def evaluations(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_loss"] for entry in log if "eval_loss" in entry]


def test_training_itself_is_as_without(data, averaged, tmp_path):
    """Bit for bit, in spite of evaluations and checkpoints of the average on the way."""
    assert run(data, tmp_path / "plain", **RUN) == 0
    for step in (2, 4, 6, 8):
        one = load_file(tmp_path / "plain" / f"checkpoint-{step}" / "model.safetensors")
        other = load_file(averaged / f"checkpoint-{step}" / WEIGHTS_NAME)
        trained = [name for name in one if name in other]
        assert {*other} == {*trained} and len(one) - len(trained) <= 2  # whether ω was profiled, and the bias of zeros
        assert all(np.array_equal(one[name], other[name]) for name in trained)
    assert not list((tmp_path / "plain").rglob(WEIGHTS_NAME))
    assert evaluations(tmp_path / "plain") != evaluations(averaged)


def test_the_average_is_what_is_evaluated_saved_scored_and_exported(averaged, tmp_path):
    assert_equal_weights(averaged, averaged / "checkpoint-8")
    checkpoint = weights(averaged / "checkpoint-8")
    raw = load_file(averaged / "checkpoint-8" / WEIGHTS_NAME)
    assert any(not np.array_equal(checkpoint[name].numpy(), value) for name, value in raw.items())
    results = json.loads((averaged / "results.json").read_text())
    assert results["scores"]["eval_loss"] == pytest.approx(evaluations(averaged)[-1], rel=1e-6)
    assert admin_hf_main(["export", str(averaged / "checkpoint-8"), str(tmp_path / "vanilla")]) == 0
    assert_equal_weights(averaged / "vanilla", tmp_path / "vanilla")


def test_the_best_checkpoint_is_the_average_with_the_lowest_loss(data, tmp_path):
    options = RUN | {"load_best_model_at_end": True, "ema_decay": 0.5, "learning_rate": 0.3}
    assert run(data, tmp_path / "run", **options) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = evaluations(tmp_path / "run")[:4]
    assert state["best_global_step"] == 2 * (1 + losses.index(min(losses)))
    assert_equal_weights(tmp_path / "run", tmp_path / "run" / f"checkpoint-{state['best_global_step']}")


def test_the_mean_of_checkpoints_is_that_of_their_averages(data, averaged, tmp_path):
    assert run(data, averaged, **RUN, ema_decay=0.5, average_last=3) == 0
    checkpoints = [load_file(averaged / f"checkpoint-{step}" / "model.safetensors") for step in (4, 6, 8)]
    for name, value in weights(averaged).items():
        mean = np.mean([stored[name] for stored in checkpoints], axis=0, dtype=np.float64)
        assert np.array_equal(value.numpy(), mean.astype(value.numpy().dtype)), name
    assert run(data, averaged, **RUN, ema_decay=0.5) == 0  # as the other tests know it
    assert_equal_weights(averaged, averaged / "checkpoint-8")


def test_a_checkpoint_without_an_optimiser_is_gone_on_from_its_average(data, tmp_path):
    options = RUN | {"save_only_model": True, "ema_decay": 0.5}
    assert run(data, tmp_path / "run", **options | {"max_steps": 4}) == 0
    assert not list((tmp_path / "run").rglob(WEIGHTS_NAME))
    assert run(data, tmp_path / "run", **options) == 0


# --- what is refused ------------------------------------------------------------------------------


def test_weights_of_half_precision_are_refused(data, tmp_path, capsys):
    assert run(data, tmp_path / "first", max_steps=1, predict_with_generate=False) == 0
    AdminForConditionalGeneration.from_pretrained(tmp_path / "first").bfloat16().save_pretrained(tmp_path / "first")
    given = {"model_name_or_path": tmp_path / "first", "config_overrides": None, "ema_decay": 0.9}
    assert run(data, tmp_path / "second", **given) == 2
    assert "error: --ema_decay 0.9 needs weights in float32, but " in capsys.readouterr().err


def test_weights_that_are_spread_and_optimisers_that_average_are_refused(tmp_path, monkeypatch):
    args = TranslationTrainingArguments(str(tmp_path), use_cpu=True, ema_decay=0.9)
    _check_moving_average(args)
    args.optim = "schedule_free_adamw"
    with pytest.raises(InputError, match="schedule_free_adamw averages the weights itself: leave --ema_decay out"):
        _check_moving_average(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args.use_cpu = False
    with pytest.raises(InputError, match="--ema_decay 0.9: FSDP shards the weights"):
        _check_moving_average(args)


def test_a_checkpoint_of_an_average_needs_the_flag(data, averaged, tmp_path, capsys):
    given = arguments(data, tmp_path / "out", resume_from_checkpoint=averaged / "checkpoint-4")
    assert run_translation.main(flags(given)) == 2
    assert "checkpoint-4 belongs to a run with --ema_decay: give this flag, too." in capsys.readouterr().err

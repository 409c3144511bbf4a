"""`--torch_compile` trains as it does without, on batches of few shapes."""

import json
import logging

import pytest
import torch
from conftest import PAD, tiny_model
from test_compilation import Replay, nothing_compiled_yet  # noqa: F401
from test_distributed import run_processes
from tiny_runs import SHAPE, arguments, assert_equal_weights, flags, run, weights

from admin_hf import compilation, profile_residuals
from training.trainer import TranslationTrainer


COMPILED = {"torch_compile_backend": "eager", "max_steps": 12, "max_tokens": 160, "lr_scheduler_type": "constant"}
NO_DROPOUT = {"config_overrides": f"{SHAPE},dropout=0,attention_dropout=0,activation_dropout=0"}


@pytest.fixture
def shapes(monkeypatch):
    """Passes are captured as on a GPU, by the stand-in; the shapes of `labels` that were."""
    captured = []

    def recorded(self, batch, run, record):
        captured.append(tuple(batch["labels"].shape))
        original(self, batch, run, Replay)

    original = compilation._Recorded.__init__
    monkeypatch.setattr(compilation._Recorded, "__init__", recorded)
    monkeypatch.setattr(compilation, "CUDAGraphs", lambda device: Replay)
    monkeypatch.setattr(compilation, "records", lambda device: True)
    return captured


def differences(one, other):
    """The largest difference of each weight, but of key biases: Adam makes steps of the noise of their gradients."""
    return [float((one[name] - other[name]).abs().max()) for name in one if "k_proj.bias" not in name]


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3, "max_steps": 6, "label_smoothing_factor": 0.1},
        {"optim": "radam", "adam_beta2": 0.9},
        {
            "max_tokens": None,
            "per_device_train_batch_size": 8,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "do_eval": True,
        },
    ],
    ids=["accumulation", "radam", "rows and evaluation"],
)
def test_a_compiled_run_ends_as_an_eager_one(data, tmp_path, shapes, monkeypatch, changes):
    options = COMPILED | NO_DROPOUT | changes
    assert run(data, tmp_path / "compiled", **options) == 0
    assert shapes and len(set(shapes)) == len(shapes)  # each is captured once
    monkeypatch.setattr(TranslationTrainer, "compiled_pass", None)
    assert run(data, tmp_path / "eager", **options) == 0
    compiled, eager = weights(tmp_path / "compiled"), weights(tmp_path / "eager")
    assert compiled.keys() == eager.keys()
    assert max(differences(compiled, eager)) < 1e-3  # 12 updates move a weight by about 0.1
    assert (tmp_path / "compiled" / "vanilla" / "config.json").exists()


def test_a_run_that_goes_on_ends_as_an_uninterrupted_one(data, tmp_path, shapes):
    options = COMPILED | {"save_steps": 5}
    assert run(data, tmp_path / "one", **options) == 0
    assert run(data, tmp_path / "two", **options | {"max_steps": 5}) == 0
    assert run(data, tmp_path / "two", **options) == 0
    assert_equal_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_processes_train_as_one_that_accumulates(data, tmp_path):
    options = COMPILED | NO_DROPOUT | {"max_steps": 4}
    for processes, accumulated in ((1, 2), (2, 1)):
        values = arguments(data, tmp_path / str(processes), **options, gradient_accumulation_steps=accumulated)
        run_processes(["run_translation.py", *flags(values)], processes)
    assert max(differences(weights(tmp_path / "1"), weights(tmp_path / "2"))) < 1e-3


def test_what_cannot_be_compiled_is_said_and_trained_all_the_same(data, tmp_path, shapes, caplog):
    with caplog.at_level(logging.WARNING, logger="training"):
        assert run(data, tmp_path, **COMPILED | {"gradient_checkpointing": True, "max_steps": 2}) == 0
    assert "--torch_compile: this run is not compiled, because gradient checkpointing" in caplog.text
    assert not shapes


@pytest.mark.parametrize(
    "name, value",
    [
        ("torch_compile_mode", "reduce-overhead"),
        ("torch_compile_backend", "foo"),
        ("optim", "galore_adamw_layerwise"),
        ("auto_find_batch_size", True),
    ],
)
def test_what_cannot_go_with_compilation_is_refused(data, tmp_path, capsys, name, value):
    assert run(data, tmp_path, **COMPILED | {name: value}) == 2
    error = capsys.readouterr().err
    assert f"--{name}" in error and error.count("\n") == 1


def test_residual_connections_are_measured_before_a_log(data, tmp_path, shapes):
    assert run(data, tmp_path, **COMPILED) == 0
    logs = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert all("encoder_variance_ratio_max" in log for log in logs if "loss" in log)


def test_rows_that_fill_up_a_batch_do_not_move_the_profile(batch):
    model, filled = tiny_model(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0), {}
    for name, x in batch.items():
        filler = torch.full((5, x.shape[1]), {"input_ids": PAD, "attention_mask": 0, "labels": -100}[name])
        filler[:, 0] = {"input_ids": 0, "attention_mask": 1, "labels": -100}[name]
        filled[name] = torch.cat([x, filler])
    found, expected = (profile_residuals(model, each) for each in (filled, batch))
    for stack in ("encoder", "decoder"):
        assert getattr(found, stack).omega == pytest.approx(getattr(expected, stack).omega, rel=1e-5)

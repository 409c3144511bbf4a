"""Trainings of stock models with an injected ω: real tiny runs, what they record, and the page's table of them."""

import json
from dataclasses import replace

import pytest

from training.embedded_data import write_embedded_data
from training.experiments import preparation, records, stock_models
from training.experiments.architectures import CLAIMS, PRE_LN, SHAPES, architecture_run, architecture_runs
from training.experiments.page import loss_list, make_table
from training.experiments.preparation import prepare
from training.experiments.records import Record, collect, state
from training.experiments.runner import FLAGS, flags
from training.experiments.scales import SCALES, PlannedRun


SCALE = SCALES["architectures"]
TINY = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "intermediate_size": 32, "d_model": 16}
TINY |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
LAYERS = {"opt": "num_hidden_layers", "bert": "num_hidden_layers", "bart": "encoder_layers"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs' relative paths begin."""
    folder = tmp_path_factory.mktemp("architectures")
    write_embedded_data(folder / "text", train=200, validation=40, test=1)
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for module in (preparation, records):
        monkeypatch.setattr(module, "REPO", folder)
    monkeypatch.setattr("training.experiments.scales.REPO", folder)


def tiny(family: str, system: str, initialization: str = "xavier", **changes) -> PlannedRun:
    """A run of the plan with one layer of width 16 and three updates."""
    run = architecture_run(SCALE, family, 1, initialization, system, seed=1)
    model = dict(item.split("=") for item in run.arguments["config_overrides"].split(","))
    model |= {name: value for name, value in TINY.items() if name in model}
    steps = {"max_steps": 3, "warmup_steps": 1, "eval_steps": 1, "logging_steps": 1, "save_steps": 1}
    files = {"train_file": "text/train", "validation_file": "text/validation", "vocab_size": 300}
    arguments = run.arguments | steps | files | {"per_device_train_batch_size": 4, "max_eval_blocks": 8} | changes
    arguments["config_overrides"] = ",".join(f"{name}={value}" for name, value in model.items())
    return replace(run, arguments=arguments)


def trained(run: PlannedRun) -> Record:
    prepare(run.arguments)
    assert stock_models.main(flags(run.arguments | FLAGS)) == 0
    record = collect(run)
    assert record is not None
    return record


@pytest.mark.parametrize("family", SHAPES)
def test_a_run_of_each_system(family):
    for system in ("post_ln", "pre_ln", "admin"):
        record = trained(tiny(family, system))
        assert not record.begun and record.blind_loss > 1 and record.seconds is not None
        assert record.arguments["model_type"] == (PRE_LN[family] if system == "pre_ln" else family)
        for curve in (record.eval_loss, record.train_loss):
            assert [update for update, _ in curve] == [1, 2, 3]
        assert record.eval_loss[-1][1] == pytest.approx(record.loss, abs=1e-4)
        assert len(record.omega) == (2 if system == "admin" else 0)
        assert all(omega >= 1 for omega in record.omega)

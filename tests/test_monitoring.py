"""What a run shows, against what the same batches and weights give when computed by hand; and early stopping."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PAD, padded_batch, randomize, tiny_config, tiny_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_batching import pairs
from test_optimization import inputs_of, logged, plain_model, tiny_trainer
from tiny_runs import run
from torch import nn
from torch.nn.functional import cross_entropy

from admin_hf import AdminForConditionalGeneration
from admin_hf.monitoring import ResidualMonitor
from admin_hf.residual import SYSTEMS, AdminConnection, PostLNConnection, ResidualSystem, residual_connections
from training.processes import end_process_group
from training.runs import finished_checkpoint
from training.trainer import EarlyStopping


RESIDUALS = {
    f"{stack}_{name}_{end}"
    for stack in ("encoder", "decoder")
    for name in ("omega", "variance_ratio")
    for end in ("min", "max")
}


# --- losses, tokens, speed ------------------------------------------------------------------------

STILL = {"learning_rate": 0.0, "optim": "sgd", "per_device_train_batch_size": 5}


def still_model() -> nn.Module:
    return randomize(plain_model(label_smoothing=0.1))


@pytest.mark.parametrize("accumulated", [1, 3])
def test_logs_are_means_over_updates_of_what_their_batches_give(tmp_path, accumulated):
    model = still_model()
    batches = inputs_of(model)
    options = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": accumulated}
    trainer = tiny_trainer(tmp_path, model, **STILL, **options)
    trainer.train()
    model.eval()
    nlls, pads = [], []
    for start in range(0, len(batches), 2 * accumulated):
        window = [batches[start + i : start + i + accumulated] for i in (0, accumulated)]
        nlls.append(sum(map(nll_by_hand, [model] * 2, window)) / 2)
        seen = [batch for update in window for batch in update]
        sides = [batch["input_ids"].eq(PAD) for batch in seen] + [batch["labels"].eq(-100) for batch in seen]
        pads.append(sum(int(side.sum()) for side in sides) / sum(side.numel() for side in sides))
    assert len(nlls) == 2 and nlls[0] != nlls[1]
    assert logged(trainer, "nll") == pytest.approx(nlls, rel=1e-5)
    assert logged(trainer, "perplexity") == pytest.approx([math.exp(nll) for nll in nlls], rel=1e-5)
    assert logged(trainer, "pad_fraction") == pytest.approx(pads, rel=1e-5)
    assert logged(trainer, "loss") != pytest.approx(nlls, rel=1e-3), "which is smoothed"
    assert not logged(trainer, "loss_scale")


def nll_by_hand(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Of the targets of an update, with stock code, in float64."""
    logits, labels = [], []
    with torch.no_grad():
        for batch in batches:
            real = batch["labels"] != -100
            inputs = {name: value for name, value in batch.items() if name != "num_items_in_batch"}
            logits.append(model(**inputs).logits.double()[real])
            labels.append(batch["labels"][real])
    return float(cross_entropy(torch.cat(logits), torch.cat(labels)))


def test_tokens_per_second_count_targets_and_leave_evaluation_out(tmp_path):
    model = still_model()
    batches = inputs_of(model)
    options = {"max_steps": 6, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    options["predict_with_generate"] = False
    trainer = tiny_trainer(tmp_path, model, eval_dataset=pairs(60), **STILL, **options)
    trainer.train()
    targets = sum(int(batch["labels"].ne(-100).sum()) for batch in batches)
    seconds = sum(targets / 2 / rate for rate in logged(trainer, "tokens_per_second"))
    evaluating = sum(logged(trainer, "eval_runtime"))
    assert 0 < seconds < 1.5 * (logged(trainer, "train_runtime")[0] - evaluating)


@pytest.mark.slow
def test_two_processes_log_as_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", __file__]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "two")], check=True, capture_output=True, env=environment, cwd=root)
    one = log_of_updates(tmp_path / "one", accumulated=2)
    two = json.loads((tmp_path / "two" / "log.json").read_text())
    for name in ("loss", "nll", "perplexity", "pad_fraction", "encoder_omega_max", "decoder_omega_min"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name


def log_of_updates(folder: Path, accumulated: int, late: bool = False) -> dict[str, float]:
    """In which one process sees the batches one after another that two see at a time.

    Args:
        late: read what they were as late as on a GPU.
    """
    model = still_model()
    options = {"max_steps": 2, "logging_steps": 2, "gradient_accumulation_steps": accumulated, "max_tokens": 100}
    options |= {"learning_rate": 0.0, "optim": "sgd"}
    trainer = tiny_trainer(folder, model, residuals=ResidualMonitor(model), **options)
    trainer.monitor.late = late
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "nll" in entry)


# --- residual connections -------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_variance_ratios_are_those_of_real_tokens(training):
    """Each connection's ratio by torch.var of selected tokens; more padding changes nothing."""
    model = randomize(plain_model()).train(training)
    for module in model.modules():
        if isinstance(module, AdminConnection):
            module.omega.data += torch.rand_like(module.omega)
    batch = padded_batch()
    ratios: dict[str, list[float]] = {"encoder": [], "decoder": []}
    reals = {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"] != -100}

    def measure(stack):
        def hook(connection, args):
            shortcut, branch = (x.detach().double()[reals[stack]] for x in args)
            omega = connection.omega.detach().double() if isinstance(connection, AdminConnection) else 1.0
            ratios[stack].append(float(branch.var(unbiased=False) / (shortcut * omega).var(unbiased=False)))

        return hook

    for stack in ratios:
        for _, connection in residual_connections(getattr(model.model, stack)):
            connection.register_forward_pre_hook(measure(stack))
    monitor = ResidualMonitor(model)
    assert RESIDUALS - monitor.metrics().keys() == {name for name in RESIDUALS if "ratio" in name}, "nothing measured"
    monitor.watch_next_pass()
    model(**batch)
    metrics = monitor.metrics()
    assert metrics.keys() == RESIDUALS
    assert [len(ratios[stack]) for stack in ratios] == [4, 6]
    for stack, values in ratios.items():
        assert metrics[f"{stack}_variance_ratio_min"] == pytest.approx(min(values), rel=1e-4)
        assert metrics[f"{stack}_variance_ratio_max"] == pytest.approx(max(values), rel=1e-4)
        stacked = getattr(model.model, stack).modules()
        omegas = [m.omega.detach() for m in stacked if isinstance(m, AdminConnection)]
        assert metrics[f"{stack}_omega_min"] == min(float(omega.min()) for omega in omegas)
        assert metrics[f"{stack}_omega_max"] == max(float(omega.max()) for omega in omegas)
    assert not any("ratio" in name for name in monitor.metrics()), "each pass is reported once"


@pytest.mark.parametrize("system", ["post_ln", "pre_ln"])
def test_without_omega_there_is_no_range_of_it(system):
    model = tiny_model(encoder_residual=system)
    monitor = ResidualMonitor(model)
    monitor.watch_next_pass()
    model(**padded_batch())
    assert monitor.metrics().keys() == {name for name in RESIDUALS if not name.startswith("encoder_omega")}


class HalfBranchConnection(PostLNConnection):
    branch_scale = 0.5

    def forward(self, shortcut, branch):
        return super().forward(shortcut, self.branch_scale * branch)


class HalfBranch(ResidualSystem):
    def connection(self, sublayer_idx):
        return HalfBranchConnection(self.config.d_model)


def test_a_scaled_branch_counts_as_it_is_added(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "half_branch", HalfBranch)
    ratios = []
    for system in ("half_branch", "post_ln"):
        torch.manual_seed(0)
        model = AdminForConditionalGeneration(tiny_config(encoder_residual=system, encoder_layers=1)).eval()
        model.model.encoder.layers[0].fc2.weight.data.zero_()  # so the largest ratio is that of the first sub-layer,
        monitor = ResidualMonitor(model)
        monitor.watch_next_pass()
        model(**padded_batch())
        ratios.append(monitor.metrics()["encoder_variance_ratio_max"])
    assert ratios[0] == pytest.approx(ratios[1] / 4, rel=1e-5), "which sees the same input in both"


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_watching_leaves_no_hooks(checkpointing):
    model, batch = tiny_model().train(), padded_batch()
    if checkpointing:
        model.gradient_checkpointing_enable()
    before, monitor = hooks_of(model), ResidualMonitor(model)
    monitor.watch_next_pass()
    monitor.watch_next_pass()
    loss = model(**batch).loss
    assert hooks_of(model) == before
    loss.backward()
    assert monitor.metrics().keys() == RESIDUALS

    monitor.watch_next_pass()
    broken = model.model.decoder.layers[1].fc2.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    broken.remove()
    assert hooks_of(model) == before, "nor after an exception"


def test_watching_changes_neither_losses_nor_weights(tmp_path):
    losses, weights = [], []
    for watched in (False, True):
        model = tiny_model(dropout=0.1)
        residuals = ResidualMonitor(model) if watched else None
        trainer = tiny_trainer(tmp_path, model, residuals=residuals, max_steps=4, logging_steps=1)
        trainer.train()
        losses.append(logged(trainer, "loss"))
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        assert len(logged(trainer, "decoder_variance_ratio_max")) == (4 if watched else 0)
    assert losses[0] == losses[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    "options, ratios",
    [
        ({"logging_steps": 2}, 3),
        ({"logging_steps": 0.5}, 2),
        ({"logging_strategy": "epoch", "logging_steps": 0, "per_device_train_batch_size": 20}, 2),
        ({"logging_strategy": "no"}, 0),
    ],
)
def test_every_way_to_log_works(tmp_path, options, ratios):
    model = tiny_model()
    trainer = tiny_trainer(tmp_path, model, residuals=ResidualMonitor(model), max_steps=6, **options)
    trainer.train()
    assert len(logged(trainer, "encoder_variance_ratio_min")) == len(logged(trainer, "nll")) == ratios


# --- where it is shown ----------------------------------------------------------------------------


def test_tensorboard_and_the_progress_bar_show_it(data, tmp_path, capsys):
    options = {"report_to": "tensorboard", "disable_tqdm": False, "label_smoothing_factor": 0.1, "max_steps": 6}
    assert run(data, tmp_path, **options, eval_strategy="steps", eval_steps=3, predict_with_generate=False) == 0
    bar = capsys.readouterr().err
    assert " tokens/s" in bar and "nan tokens/s" not in bar and "6/6" in bar

    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    (folder,) = {path.parent for path in tmp_path.glob("**/events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    names = {
        "loss",
        "nll",
        "perplexity",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "pad_fraction",
        *RESIDUALS,
    }
    assert {f"train/{name}" for name in names} <= tags
    assert {"eval/loss", "eval/perplexity"} <= tags and "train/loss_scale" not in tags
    for name in ("nll", "encoder_omega_max", "decoder_variance_ratio_min"):
        shown = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert shown == pytest.approx({e["step"]: e[name] for e in history if name in e}) and len(shown) == 3
    evaluated = [entry for entry in history if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert all(e["eval_perplexity"] == pytest.approx(math.exp(e["eval_loss"])) for e in evaluated)


# --- early stopping -------------------------------------------------------------------------------

WORSENING = {"optim": "adamw_torch", "learning_rate": 1.0, "lr_scheduler_type": "constant", "logging_steps": 1}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def stopping_trainer(folder: Path, patience: int, **options):
    options = WORSENING | EVALUATED | {"max_steps": 30, "predict_with_generate": False, "do_train": True} | options
    return tiny_trainer(
        folder,
        plain_model(),
        eval_dataset=pairs(8, seed=1),
        callbacks=[EarlyStopping(patience)],
        early_stopping_patience=patience,
        **options,
    )


def evaluations_until_stop(losses: list[float], patience: int) -> int:
    """By hand: the evaluation after which the best one is `patience` evaluations old."""
    for count in range(1, len(losses) + 1):
        if count - 1 - losses.index(min(losses[:count])) >= patience:
            return count
    raise AssertionError("never")


def test_stops_after_the_patience_and_keeps_the_best(tmp_path):
    trainer = stopping_trainer(tmp_path, 2, save_total_limit=1)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert len(losses) == evaluations_until_stop(losses, 2) == trainer.state.global_step < 30
    best = tmp_path / f"checkpoint-{1 + losses.index(min(losses))}"
    last = tmp_path / f"checkpoint-{len(losses)}"
    assert set(tmp_path.glob("checkpoint-*")) == {best, last}
    assert finished_checkpoint(trainer.args) == trainer.state.best_model_checkpoint == str(best)
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in trainer.model.state_dict().items() if name in saved)
    trainer.args.early_stopping_patience = 5
    assert finished_checkpoint(trainer.args) is None, "with more patience there is more to train"


def test_a_stop_between_checkpoints_is_one_itself(tmp_path):
    """Else the run, started again, would train on from the checkpoint before."""
    trainer = stopping_trainer(tmp_path, 2, save_steps=20, average_last=1)
    trainer.train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert finished_checkpoint(trainer.args) == str(checkpoint)
    assert checkpoint.name == f"checkpoint-{trainer.state.global_step}" != "checkpoint-20"


def test_a_resumed_run_goes_on_counting(tmp_path):
    whole = stopping_trainer(tmp_path / "whole", 3)
    whole.train()
    steps = whole.state.global_step
    stopping_trainer(tmp_path / "two", 3, max_steps=steps - 2).train()
    resumed = stopping_trainer(tmp_path / "two", 3)
    assert finished_checkpoint(resumed.args) is None
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / f"checkpoint-{steps - 2}"))
    assert logged(resumed, "eval_loss") == logged(whole, "eval_loss")


def test_the_script_stops_on_bleu_and_trains_nothing_when_it_is_repeated(data, tmp_path, caplog):
    options = EVALUATED | {"learning_rate": 0.0, "max_steps": 20, "metric_for_best_model": "bleu"}
    options |= {"early_stopping_patience": 2, "report_to": "none"}
    assert run(data, tmp_path, **options) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 3, "the first evaluation is the best, and two are no better"
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")
    before = (tmp_path / "model.safetensors").read_bytes()
    assert run(data, tmp_path, **options) == 0
    assert "Nothing is left to train" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_early_stopping_and_averaging_go_together(data, tmp_path):
    options = EVALUATED | WORSENING | {"max_steps": 20, "predict_with_generate": False, "report_to": "none"}
    assert run(data, tmp_path, **options, early_stopping_patience=2, average_last=2) == 0
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    last = evaluations_until_stop(losses, 2)
    assert len(losses) == last < 20
    one, two = (load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (last - 1, last))
    for name, mean in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(mean.double(), (one[name].double() + two[name].double()) / 2, rtol=1e-6, atol=1e-7)


if __name__ == "__main__":  # one of the processes of test_two_processes_log_as_one
    logs = log_of_updates(Path(sys.argv[1]), accumulated=1, late=True)
    if torch.distributed.get_rank() == 0:
        (Path(sys.argv[1]) / "log.json").write_text(json.dumps(logs))
    end_process_group()

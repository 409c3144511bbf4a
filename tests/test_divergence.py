"""Divergence is found, named and recorded, and does not touch what was saved before."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import VOCAB_SIZE, padded_batch, tiny_model
from safetensors.torch import load_file
from test_optimization import logged, plain_model, tiny_trainer
from tiny_runs import arguments, flags, run
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from admin_hf.run.folder import DIVERGENCE_NAME
from training.divergence import Divergence, first_non_finite
from training.monitor import MAX_START, START, WINDOW, UpdateMonitor


ROOT = Path(__file__).parents[1]
LAYER = "model.decoder.layers.1.fc1"


# --- where it begins ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, first",
    [
        ("model.encoder.layers.0.self_attn.v_proj", "model.encoder.layers.0.self_attn.v_proj"),
        ("model.encoder.layers.1.final_layer_norm", "model.encoder.layers.1.final_layer_norm"),
        (LAYER, LAYER),
        ("model.shared", "model.encoder.embed_tokens"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_first_module_with_a_non_finite_output_is_named(name, first, training):
    model = tiny_model().train(training)
    with torch.no_grad():
        weight = model.get_submodule(name).weight
        weight[(5,) if weight.ndim == 1 else (..., 5)] = math.inf
    assert first_non_finite(model, padded_batch()) in (first, name)


def test_a_gradient_is_named_where_all_outputs_are_finite():
    model, batch = tiny_model().train(), padded_batch()
    model(**batch).loss.backward()
    assert first_non_finite(model, batch) is None
    model.get_parameter(f"{LAYER}.bias").grad[3] = math.nan
    model.get_parameter("model.encoder.layers.1.final_layer_norm.omega").grad[0] = math.inf
    assert first_non_finite(model, batch) == f"{LAYER}.bias"


def test_looking_changes_nothing():
    model, batch = tiny_model(dropout=0.3).train(), padded_batch()
    model(**batch).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    random, hooks = torch.get_rng_state(), hooks_of(model)
    assert first_non_finite(model, batch) is None
    assert torch.equal(random, torch.get_rng_state()) and hooks_of(model) == hooks
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(gradients, after, strict=True))
    with pytest.raises(ValueError):
        first_non_finite(model, batch | {"labels": batch["labels"] + 1000})
    assert hooks_of(model) == hooks, "nor where the pass fails"


def hooks_of(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


# --- the rule -------------------------------------------------------------------------------------


class Losses:
    """Sends losses through the events of the Trainer's updates, until one of them is divergence.

    Args:
        late: read them as late as on a GPU.
    """

    def __init__(self, folder: Path, warmup_steps: int = 0, late: bool = False) -> None:
        self.args = TrainingArguments(str(folder), use_cpu=True, warmup_steps=warmup_steps, report_to="none")
        self.accelerator, self.model, self.batch = Accelerator(cpu=True), tiny_model().train(), padded_batch()
        self.late = late

    def diverged_at(self, losses: list[float]) -> int | None:
        """The update, counted from 1, whose loss showed divergence."""
        monitor, state = UpdateMonitor(self.accelerator, min_scale=0.1), TrainerState(max_steps=len(losses))
        monitor.late = self.late
        try:
            for loss in losses:
                monitor.add(torch.tensor(loss), torch.tensor(loss), self.batch)
                monitor.on_pre_optimizer_step(self.args, state, TrainerControl(), model=self.model)
                state.global_step += 1
            monitor.on_epoch_end(self.args, state, TrainerControl())
        except Divergence as divergence:
            assert state.global_step == divergence.record["step"] + self.late, "one update late, or at once"
            return divergence.record["step"] + 1
        return None


@pytest.mark.parametrize("noise", ["normal", "lognormal", "uniform", "autocorrelated"])
def test_a_loss_that_stays_where_it_is_is_no_divergence(tmp_path, noise):
    """As in fine-tuning: the losses of batches differ by a sixth. With windows of 5 and 10, one sequence is."""
    rng, losses = np.random.default_rng(0), Losses(tmp_path)
    for _ in range(12):
        normal = rng.normal(size=1000)
        if noise == "autocorrelated":
            normal = np.convolve(rng.normal(size=1002), [0.6, 0.6, 0.53], "valid")
        uniform = rng.uniform(-1, 1, 1000)
        sequence = {"lognormal": np.exp(normal / 6), "uniform": 1 + 0.3 * uniform}.get(noise, 1 + normal / 6)
        assert losses.diverged_at((6 * sequence).tolist()) is None


def test_a_loss_that_stays_above_its_start_is_divergence(tmp_path):
    start, losses = [6.0 + 0.1 * (i % 3) for i in range(START)], Losses(tmp_path)
    assert losses.diverged_at([*start, *[4.0] * 30, *[7.0] * 30]) == START + 30 + WINDOW
    assert losses.diverged_at([*start, *[4.0] * 30, *([7.0] * (WINDOW - 1) + [6.1]) * 4]) is None
    assert losses.diverged_at([*start, *[6.2] * 60]) is None, "as high as the start is not above it"


def test_a_trained_model_may_get_worse_than_it_started_but_not_than_a_uniform_guess(tmp_path):
    guess, losses = math.log(VOCAB_SIZE), Losses(tmp_path, warmup_steps=5)
    assert losses.diverged_at([*[1.0] * START, *[guess - 0.1] * 90]) is None
    assert losses.diverged_at([*[1.0] * START, *[guess + 0.1] * 90]) == START + WINDOW


def test_warm_up_may_be_above_the_start(tmp_path):
    losses = [*[6.0] * START, *[7.0] * 90]
    assert Losses(tmp_path, warmup_steps=50).diverged_at(losses) == 50 + WINDOW + 1
    assert Losses(tmp_path, warmup_steps=50).diverged_at([*losses[:60], *[3.0] * 60]) is None


def test_a_loss_that_explodes_at_once_does_not_raise_its_own_start(tmp_path):
    losses = [6.0, *np.random.default_rng(0).uniform(900, 3000, 50)]
    assert Losses(tmp_path).diverged_at(losses) == WINDOW + 1
    mild = [6.0, *[MAX_START * 6 - 1] * 60]
    assert Losses(tmp_path).diverged_at(mild) is None, "the start of a run may be noisy"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_divergence_at_once(tmp_path, loss):
    assert Losses(tmp_path, warmup_steps=100).diverged_at([6.0, 6.0, loss]) == 3


# --- in the Trainer -------------------------------------------------------------------------------


class Plant(TrainerCallback):
    """Makes a weight NaN after an update."""

    def __init__(self, model: nn.Module, after: int) -> None:
        self.weight, self.after = model.get_submodule(LAYER).weight, after

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.after:
            self.weight.data[0, 0] = math.nan


@pytest.mark.parametrize("accumulated", [1, 2])
def test_nothing_is_saved_after_weights_became_nan(tmp_path, accumulated):
    model = tiny_model()
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    options |= {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 4}
    trainer = tiny_trainer(tmp_path, model, callbacks=[Plant(model, after=5)], **options)
    with pytest.raises(Divergence, match="Training diverged: the loss of update 6 is nan") as caught:
        trainer.train()
    record = caught.value.record
    assert (record["step"], record["loss"], record["scale"]) == (5, "nan", None)
    assert record["first_non_finite"] == LAYER
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-4" / "model.safetensors").values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = tiny_model()
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainer(tmp_path, model, callbacks=[Plant(model, after=4)], **options)
    with pytest.raises(Divergence, match="weights are not finite after update 4") as caught:
        trainer.train()
    assert caught.value.record["first_non_finite"] == LAYER and math.isfinite(caught.value.record["loss"])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(tmp_path, max_norm):
    model = tiny_model()
    weight, calls = model.get_parameter(f"{LAYER}.weight"), []
    weight.register_hook(lambda gradient: calls.append(1) or gradient * (math.inf if len(calls) > 2 else 1))
    trainer = tiny_trainer(tmp_path, model, max_steps=9, max_grad_norm=max_norm)
    with pytest.raises(Divergence, match="the gradient norm of update 3 is (nan|inf)") as caught:
        trainer.train()
    assert caught.value.record["step"] == 2 and math.isfinite(caught.value.record["loss"])
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_resumed_run_remembers_the_losses_of_the_start(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    first = tiny_trainer(tmp_path, plain_model(), max_steps=4, **options)
    first.train()
    assert first.monitor.first_losses == pytest.approx(logged(first, "loss"))
    resumed = tiny_trainer(tmp_path, plain_model(), max_steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.monitor.first_losses[:4] == first.monitor.first_losses
    assert resumed.monitor.last_losses == pytest.approx(logged(resumed, "loss")), "of both sessions"


# --- the script -----------------------------------------------------------------------------------

DIVERGING = {"optim": "adamw_torch", "learning_rate": 50, "lr_scheduler_type": "constant", "max_steps": 60}
DIVERGING |= {"save_strategy": "steps", "save_steps": WINDOW - 5, "report_to": "none", "warmup_steps": 0}


def test_a_diverged_run_ends_with_a_sentence_a_record_and_its_checkpoints(data, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    assert run(data, tmp_path, **DIVERGING, disable_tqdm=False) == 3
    assert signal.getsignal(signal.SIGTERM) is handler, "given back"
    sentences = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Training diverged")]
    assert len(sentences) == 1 and f"{WINDOW} losses after warm-up are all above the" in sentences[0]
    record = json.loads((tmp_path / DIVERGENCE_NAME).read_text())
    checkpoint = tmp_path / f"checkpoint-{WINDOW - 5}"
    assert record.keys() == {"reason", "step", "loss", "scale", "first_non_finite", "last_checkpoint"}
    assert record["reason"] in sentences[0]
    assert record["step"] == WINDOW and record["loss"] > 100
    assert record["scale"] is None and record["first_non_finite"] is None
    assert record["last_checkpoint"] == str(checkpoint)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [checkpoint.name]
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == WINDOW and state["log_history"], "what was logged until then is kept"
    assert (tmp_path / "config.json").exists(), "and what diverged"
    saved = load_file(checkpoint / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "vanilla").exists()

    # A session of the same run that does not get as far
    assert run(data, tmp_path, **DIVERGING | {"max_steps": WINDOW - 3}) == 0
    assert not (tmp_path / DIVERGENCE_NAME).exists()
    again = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in saved.items())


@pytest.mark.slow
def test_two_processes_leave_together_and_write_one_record(data, tmp_path):
    """torchrun makes every exit code of a process a 1 of its own."""
    script = [str(ROOT / "run_translation.py"), *flags(arguments(data, tmp_path, **DIVERGING))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "exitcode  : 3" in done.stderr, "of the processes themselves"
    assert done.stderr.count(f"{WINDOW} losses after warm-up are all above the") == 1
    record = json.loads((tmp_path / DIVERGENCE_NAME).read_text())
    assert record["step"] == WINDOW and record["last_checkpoint"].endswith(f"checkpoint-{WINDOW - 5}")

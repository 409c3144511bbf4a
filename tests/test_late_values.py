"""On a GPU no update waits for what it computed: that is read one update late, and nothing is missed by it."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import padded_batch
from host_reads import HostReads
from safetensors.torch import load_file
from test_distributed import run_processes
from test_divergence import LAYER, Losses
from test_optimization import inputs_of, logged, plain_model, tiny_trainer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from training.divergence import Divergence
from training.late_values import LateValues
from training.monitor import START, WINDOW
from training.processes import end_process_group
from training.trainer import TranslationTrainer


FUSED = "adamw_torch_fused"


def late_trainer(folder: Path, *args, **options) -> TranslationTrainer:
    """A tiny trainer that reads as late as on a GPU."""
    trainer = tiny_trainer(folder, *args, **options)
    assert not trainer.monitor.late, "on a CPU"
    trainer.monitor.late = True
    return trainer


def test_values_come_out_in_order_and_as_they_were():
    late, value = LateValues(), torch.zeros(1)
    for number in range(5):
        late.push(number, value.fill_(10 * number))
    assert list(late.arrived(held_back=2)) == [(0, [0.0]), (1, [10.0]), (2, [20.0])]
    assert list(late.arrived(held_back=2)) == []
    assert list(late.arrived()) == [(3, [30.0]), (4, [40.0])]


# --- nothing is read ------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Watches every update from its first event to its last."""

    def __init__(self) -> None:
        self.reads = HostReads()

    def on_step_begin(self, *args, **kwargs) -> None:
        self.reads.__enter__()

    def on_step_end(self, *args, **kwargs) -> None:
        self.reads.__exit__(None, None, None)


@pytest.mark.parametrize("accumulated, precision", [(2, "float32"), (1, "float16")])
def test_an_update_reads_nothing(tmp_path, monkeypatch, accumulated, precision):
    """Of reads by the Trainer, accelerate and this project's own; those that the model makes on a CPU are left out."""
    watch = Watch()
    options = {"max_steps": 4, "logging_steps": 2, "optim": FUSED, "callbacks": [watch]}
    options |= {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 4}
    trainer = late_trainer(tmp_path, **options)
    if precision == "float16":
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
    trainer.train()
    assert watch.reads.found == [[]] * 4
    assert len(logged(trainer, "nll")) == 2

    trainer.monitor.late = False
    trainer.train()
    assert all(watch.reads.found[4:]), "which shows that reads are seen"


# --- nothing is missed ----------------------------------------------------------------------------


def test_divergence_is_of_the_same_update(tmp_path):
    start = [6.0] * START
    sequences = [
        [*start, *[4.0] * 30, *[7.0] * 30],
        [*start, *[4.0] * 30, *[7.0] * (WINDOW + 1)],
        [6.0, 6.0, math.nan, 6.0],
        [6.0, 6.0, 6.0, math.inf],
    ]
    found = [[Losses(tmp_path, late=late).diverged_at(losses) for losses in sequences] for late in (False, True)]
    assert found == [[START + 30 + WINDOW] * 2 + [3, 4]] * 2


def test_the_last_update_is_checked_before_weights_are_saved(tmp_path):
    """Though these are finite."""
    losses, trainer = Losses(tmp_path), late_trainer(tmp_path)
    trainer.monitor.add(torch.tensor(math.nan), torch.tensor(1.0), padded_batch())
    state = TrainerState(max_steps=9)
    trainer.monitor.on_pre_optimizer_step(losses.args, state, TrainerControl(), model=trainer.model)
    state.global_step += 1
    with pytest.raises(Divergence, match="the loss of update 1 is nan"):
        trainer.monitor.check_weights(state, trainer.model)


@pytest.mark.parametrize("options", [{"logging_steps": 2}, {"logging_strategy": "epoch"}, {"logging_strategy": "no"}])
def test_logs_and_checkpoints_have_all_updates(tmp_path, options):
    options = options | {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 20}
    logs, states = [], []
    for make in (tiny_trainer, late_trainer):
        trainer = make(tmp_path / make.__name__, plain_model(), **options)
        trainer.train()
        names = ("nll", "pad_fraction", "loss")
        logs.append([logged(trainer, name) for name in names] + [trainer.monitor.loss])
        paths = sorted((tmp_path / make.__name__).glob("checkpoint-*/trainer_state.json"))
        states.append([json.loads(path.read_text())["stateful_callbacks"]["UpdateMonitor"] for path in paths])
    assert logs[0] == logs[1] and states[0] == states[1]
    assert [len(state["attributes"]["last_losses"]) for state in states[1]] == [3, 5][: len(states[1])]
    assert len(states[1]) > 0


# --- what an update that is not finite leaves behind ----------------------------------------------


def explode(model: nn.Module, at: int) -> None:
    """Make the gradient of a weight infinite from a backward pass on."""
    calls = []
    weight = model.get_parameter(f"{LAYER}.weight")
    weight.register_hook(lambda gradient: calls.append(1) or gradient * (math.inf if len(calls) >= at else 1))


def tensors(trainer: TranslationTrainer) -> list[torch.Tensor]:
    """Weights, moments and the numbers of updates."""
    states = trainer.optimizer.state_dict()["state"].values()
    return [*trainer.model.parameters(), *[value for state in states for value in state.values()]]


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_fused_optimiser_skips_it(tmp_path, max_norm):
    options = {"optim": FUSED, "max_grad_norm": max_norm}
    before = tiny_trainer(tmp_path, plain_model(), max_steps=2, **options)
    before.train()
    model = plain_model()
    explode(model, at=3)
    trainer = late_trainer(tmp_path, model, max_steps=9, **options)
    with pytest.raises(Divergence, match="the gradient norm of update 3 is (nan|inf)") as caught:
        trainer.train()
    assert caught.value.record["step"] == 2 and math.isfinite(caught.value.record["loss"])
    assert trainer.state.global_step == 3, "found one update late"
    pairs = list(zip(tensors(trainer), tensors(before), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs) and any(one.numel() == 1 for one, _ in pairs)
    assert not hasattr(trainer.optimizer.optimizer, "found_inf")


def test_without_one_the_checkpoint_from_before_is_the_last(tmp_path):
    model = plain_model()
    explode(model, at=4)
    trainer = late_trainer(tmp_path, model, optim="radam", max_steps=9, save_strategy="steps", save_steps=2)
    with pytest.raises(Divergence, match="the gradient norm of update 4 is (nan|inf)"):
        trainer.train()
    assert not all(weight.isfinite().all() for weight in model.parameters()), "the comparison needs it"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-2" / "model.safetensors").values())


def test_a_late_report_looks_at_the_batch_of_its_update(tmp_path):
    """Which alone makes the module's output NaN."""
    model = plain_model()
    batches = inputs_of(model)

    def spoil(module, args, output):
        is_third = len(batches) > 2 and torch.equal(batches[-1]["input_ids"], batches[2]["input_ids"])
        return output * (math.nan if is_third else 1)

    model.get_submodule(LAYER).register_forward_hook(spoil)
    with pytest.raises(Divergence, match="the loss of update 3 is nan") as caught:
        late_trainer(tmp_path, model, optim=FUSED, max_steps=9).train()
    assert caught.value.record["first_non_finite"] == LAYER


@pytest.mark.slow
def test_processes_find_it_together(tmp_path):
    """In the gradient of one of them, whose average is that of all."""
    run_processes([__file__, str(tmp_path)], 2)
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one["reason"].startswith("Training diverged: the gradient norm of update 3 is ")
    assert one["finite"] and one["updates"] == 3


def diverge(folder: Path) -> None:
    """One of the processes of the test above."""
    model = plain_model()
    trainer = late_trainer(folder, model, optim=FUSED, max_steps=9, max_tokens=100)
    if trainer.args.process_index == 1:
        explode(model, at=3)
    try:
        trainer.train()
    except Divergence as divergence:
        record = divergence.record | {"updates": trainer.state.global_step}
        record["finite"] = all(bool(weight.isfinite().all()) for weight in model.parameters())
        (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    diverge(Path(sys.argv[1]))
    end_process_group()

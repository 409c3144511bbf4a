"""The paper's recipe against its formulas: RAdam, schedules, clipping, and the loss scale of float16."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_batching import collate, pairs
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback, get_scheduler

import run_translation
from admin_hf.residual import AdminConnection
from admin_hf.run.folder import ARGUMENTS_NAME
from training.arguments import TranslationTrainingArguments, parse_arguments
from training.divergence import MAX_OVERFLOWS, Divergence
from training.errors import InputError
from training.metrics import TranslationMetric
from training.optimization import LossScaleClamp, radam
from training.runs import check_output_dir, record_arguments
from training.trainer import TranslationTrainer


BETAS, EPS = (0.9, 0.98), 1e-8


def tiny_trainer(folder: Path, model: nn.Module | None = None, **options) -> TranslationTrainer:
    """A Trainer of a tiny model on 60 random pairs; what it does not take itself are training arguments."""
    given = {name: options.pop(name) for name in ("callbacks", "residuals", "eval_dataset") if name in options}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    run = {"save_strategy": "no", "max_steps": 1, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    return TranslationTrainer(
        metric=TranslationMetric(),
        model=tiny_model() if model is None else model,
        args=TranslationTrainingArguments(str(folder), **quiet | run | options),
        train_dataset=pairs(),
        data_collator=collate,
        **given,
    )


def plain_model(**changes) -> nn.Module:
    return tiny_model(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, **changes)


def inputs_of(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """A list that fills with what the model is called with in training."""
    seen: list[dict[str, torch.Tensor]] = []
    model.register_forward_pre_hook(
        lambda model, args, batch: seen.append(batch) if model.training else None, with_kwargs=True
    )
    return seen


def logged(trainer: TranslationTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- optimisers -----------------------------------------------------------------------------------


def test_radam_is_that_of_its_paper_with_decoupled_decay():
    """Algorithm 2 of Liu et al. (2020), "On the Variance of the Adaptive Learning Rate and Beyond", in float64."""
    (beta1, beta2), lr, decay = BETAS, 0.01, 0.1
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, dtype=torch.float64))
    expected, m, v = weight.detach().clone(), torch.zeros(5), torch.zeros(5)
    optimizer_class, options = radam(lr, BETAS, EPS)
    optimizer = optimizer_class([weight], weight_decay=decay, **options)
    longest = 2 / (1 - beta2) - 1
    rectified = []
    for t in range(1, 13):
        weight.grad = torch.randn(5, dtype=torch.float64)
        m, v = beta1 * m + (1 - beta1) * weight.grad, beta2 * v + (1 - beta2) * weight.grad**2
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        step = m / (1 - beta1**t)
        if length > 5:
            variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step = step * math.sqrt(variance) * math.sqrt(1 - beta2**t) / (v.sqrt() + EPS)
        rectified.append(length > 5)
        expected = expected * (1 - lr * decay) - lr * step
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-14)
    assert rectified[0] is False and rectified[-1] is True, "both branches are compared"


def test_the_trainer_makes_the_updates_of_radam_by_hand(tmp_path):
    trained = plain_model()
    by_hand, batches = copy.deepcopy(trained).train(), inputs_of(trained)
    options = {"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_epsilon": EPS, "weight_decay": 0.1}
    tiny_trainer(tmp_path, trained, optim="radam", max_steps=8, max_grad_norm=0, **options).train()
    # Biases and vectors (norms, ω) are not decayed: all weights with two dimensions are
    matrices, vectors = (
        [p for p in by_hand.parameters() if p.requires_grad and (p.ndim > 1) is m] for m in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.RAdam(groups, lr=0.01, betas=BETAS, eps=EPS, decoupled_weight_decay=True)
    for batch in batches:
        optimizer.zero_grad()
        by_hand(**batch).loss.backward()
        optimizer.step()
    assert len(batches) == 8
    for (name, one), other in zip(trained.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("optim", ["radam", "adamw_torch"])
def test_only_matrices_are_decayed(tmp_path, optim):
    trainer = tiny_trainer(tmp_path, optim=optim, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"] == 0.1}
    spared = {id(p) for group in groups for p in group["params"] if group["weight_decay"] == 0.0}
    modules = list(trainer.model.modules())
    omegas = [m.omega for m in modules if isinstance(m, AdminConnection)]
    norms = [p for m in modules if isinstance(m, nn.LayerNorm) for p in (m.weight, m.bias)]
    linears = [m for m in modules if isinstance(m, nn.Linear)]
    biases = [m.bias for m in linears if m.bias is not None]
    matrices = [m.weight for m in modules if isinstance(m, (nn.Linear, nn.Embedding)) and m.weight.requires_grad]
    assert len(omegas) == 3 + 5, "all sub-layers but the first of each stack"
    assert spared == {id(p) for p in omegas + norms + biases}
    assert decayed == {id(p) for p in matrices}


@pytest.mark.parametrize(
    "optim", ["radam", "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
)
def test_every_optimiser_makes_an_update(tmp_path, optim):
    model = plain_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    tiny_trainer(tmp_path, model, optim=optim, weight_decay=0.01).train()
    for name, parameter in model.named_parameters():
        if name in before and "k_proj.bias" not in name:  # whose gradient is zero
            assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name


def test_a_resumed_run_has_radams_state_and_the_next_learning_rate(tmp_path):
    options = {"optim": "radam", "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 4, "warmup_init_lr": 1e-3}
    options |= {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    whole = tiny_trainer(tmp_path / "whole", plain_model(), max_steps=8, **options)
    whole.train()
    tiny_trainer(tmp_path / "two", plain_model(), max_steps=4, **options).train()
    resumed = tiny_trainer(tmp_path / "two", plain_model(seed=9), max_steps=8, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-4"))
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")
    one, other = (
        torch.load(tmp_path / name / "checkpoint-8" / "optimizer.pt", weights_only=True) for name in ("whole", "two")
    )
    assert one["state"].keys() == other["state"].keys()
    for index, state in one["state"].items():
        assert state["step"] == 8
        for name, value in state.items():
            assert torch.equal(value, other["state"][index][name]), (index, name)


def translation_arguments(folder: Path, *more: str) -> list[str]:
    given = ["--do_train", "--train_file", "train", "--source_lang", "en", "--target_lang", "de"]
    return [*given, "--output_dir", str(folder), "--use_cpu", "True", *more]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--optim", "radamm"], "radamm is not a valid OptimizerNames"),
        (
            ["--learning_rate", "1e-4", "--warmup_init_lr", "2e-4"],
            "--warmup_init_lr 0.0002 must be at least 0 and at most",
        ),
        (["--warmup_init_lr=-1e-9"], "--warmup_init_lr -1e-09 must be at least 0"),
        (["--fp16_min_scale", "0"], "--fp16_min_scale 0.0 must be above 0"),
        (["--fp16_scale_window", "0"], "--fp16_scale_window 0 must be at least 1"),
        (["--max_tokens", "0"], "--max_tokens 0 must be at least 1"),
        (["--average_last", "0"], "--average_last 0 must be at least 1"),
        (["--average_last", "2", "--save_strategy", "no"], "--average_last 2 needs checkpoints"),
        (["--average_last", "3", "--save_total_limit", "2"], "needs more checkpoints than --save_total_limit 2 keeps"),
        (["--early_stopping_patience", "0"], "--early_stopping_patience 0 must be at least 1"),
        (
            ["--early_stopping_patience", "2", "--average_last", "2"],
            "--early_stopping_patience 2 needs --eval_strategy",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused_in_a_sentence(tmp_path, capsys, flags, message):
    assert run_translation.main(translation_arguments(tmp_path / "run", *flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_recorded_and_recognised(tmp_path):
    recipe = ["--optim", "radam", "--warmup_init_lr", "1e-7", "--max_tokens", "4096", "--fp16_scale_window", "128"]
    given = parse_arguments(translation_arguments(tmp_path, *recipe))
    assert given.training.optim == "radam" and copy.copy(given.training).to_dict()["optim"] == "radam"
    record_arguments(given)
    recorded = json.loads((tmp_path / ARGUMENTS_NAME).read_text())
    expected = {"optim": "radam", "warmup_init_lr": 1e-7, "max_tokens": 4096, "fp16_scale_window": 128}
    assert {name: recorded[name] for name in expected} == expected
    check_output_dir(parse_arguments(translation_arguments(tmp_path, *recipe)))
    with pytest.raises(InputError, match="optim: 'radam' then, 'sgd' now"):
        check_output_dir(parse_arguments(translation_arguments(tmp_path, *recipe, "--optim", "sgd")))


def test_a_run_with_trainers_filter_of_losses_can_go_on_without_it(tmp_path):
    """Which was on by default: a run from then says so in its record."""
    given = parse_arguments(translation_arguments(tmp_path))
    assert given.training.logging_nan_inf_filter is False
    record_arguments(given)
    recorded = json.loads((tmp_path / ARGUMENTS_NAME).read_text())
    (tmp_path / ARGUMENTS_NAME).write_text(json.dumps(recorded | {"logging_nan_inf_filter": True}))
    check_output_dir(given)


# --- schedules ------------------------------------------------------------------------------------

PEAK, INITIAL, WARMUP, UPDATES = 7e-4, 1e-7, 6, 20


def learning_rates(folder: Path, **options) -> list[float]:
    """What each update of a real run is made with."""
    options = {"learning_rate": PEAK, "max_steps": UPDATES, "logging_steps": 1} | options
    trainer = tiny_trainer(folder, **options)
    trainer.train()
    return logged(trainer, "learning_rate")


def test_inverse_sqrt_from_a_warm_up_start_is_fairseqs(tmp_path):
    """fairseq's update k is made with t = k − 1: the first with the initial rate, the peak is that of t = W."""
    rates = learning_rates(tmp_path, lr_scheduler_type="inverse_sqrt", warmup_steps=WARMUP, warmup_init_lr=INITIAL)
    expected = [INITIAL + t * (PEAK - INITIAL) / WARMUP for t in range(WARMUP)]
    expected += [PEAK * math.sqrt(WARMUP / t) for t in range(WARMUP, UPDATES)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[WARMUP] == PEAK


@pytest.mark.parametrize("name", ["inverse_sqrt", "linear", "cosine", "constant_with_warmup", "polynomial"])
def test_a_warm_up_start_changes_nothing_but_the_warm_up(tmp_path, name):
    def rates(initial: float) -> list[float]:
        trainer = tiny_trainer(
            tmp_path, learning_rate=PEAK, lr_scheduler_type=name, warmup_steps=WARMUP, warmup_init_lr=initial
        )
        trainer.create_optimizer()
        return rates_of(trainer.optimizer, trainer.create_scheduler(UPDATES))

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    stock = rates_of(optimizer, get_scheduler(name, optimizer, WARMUP, UPDATES))
    raised = rates(INITIAL)
    assert rates(0.0) == stock, "bit for bit"
    assert raised[WARMUP:] == stock[WARMUP:]
    assert raised[:WARMUP] == pytest.approx([INITIAL + (1 - INITIAL / PEAK) * rate for rate in stock[:WARMUP]])
    assert raised[0] == pytest.approx(INITIAL) and stock[0] == 0


def rates_of(optimizer, scheduler) -> list[float]:
    rates = []
    for _ in range(UPDATES):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_linear_decay_without_warm_up(tmp_path):
    rates = learning_rates(tmp_path, lr_scheduler_type="linear", warmup_steps=0)
    assert rates == pytest.approx([PEAK * (1 - t / UPDATES) for t in range(UPDATES)], rel=1e-12)


def test_a_schedule_without_warm_up_has_no_start(tmp_path):
    options = {"learning_rate": PEAK, "warmup_init_lr": INITIAL, "warmup_steps": WARMUP}
    plateau = tiny_trainer(
        tmp_path, eval_dataset=pairs(4), eval_strategy="steps", lr_scheduler_type="reduce_lr_on_plateau", **options
    )
    plateau.create_optimizer()
    assert type(plateau.create_scheduler(UPDATES)) is ReduceLROnPlateau
    assert plateau.optimizer.param_groups[0]["lr"] == PEAK
    assert learning_rates(tmp_path, lr_scheduler_type="constant", **options) == [PEAK] * UPDATES


# --- smoothing and clipping -----------------------------------------------------------------------


def test_the_model_smooths_labels_and_the_trainer_does_not(tmp_path):
    model = plain_model(label_smoothing=0.1)
    batches = inputs_of(model)
    trainer = tiny_trainer(
        tmp_path, model, label_smoothing_factor=0.1, learning_rate=0.0, optim="sgd", logging_steps=1
    )
    trainer.train()
    batch = {name: value for name, value in batches[0].items() if name != "num_items_in_batch"}
    with torch.no_grad():
        logits = model.eval()(**batch).logits.double()[batch["labels"] != -100]
    labels, real = batch["labels"][batch["labels"] != -100], logits.shape[1] - 1  # padding is the last entry
    share = torch.full_like(logits, 0.1 / real).scatter(1, labels[:, None], 0.9 + 0.1 / real)
    share[:, -1] = 0
    expected = -(share * logits.log_softmax(1)).sum(1).mean()
    # The pad entry's logit of −1e4 has no probability, and must have no weight either
    assert logged(trainer, "loss") == pytest.approx([float(expected)], rel=1e-5)
    assert trainer.label_smoother is None


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_gradients_are_clipped_only_where_asked(tmp_path, max_norm):
    model, lr = plain_model(), 1e-3
    weight = model.model.encoder.layers[0].fc1.weight
    weight.register_hook(lambda gradient: gradient * 1e6)
    before = [p.detach().double() for p in model.parameters()]
    trainer = tiny_trainer(tmp_path, model, optim="sgd", learning_rate=lr, max_grad_norm=max_norm, logging_steps=1)
    trainer.train()
    changes = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    change = sum(float(value.square().sum()) for value in changes)
    norm = logged(trainer, "grad_norm")[0]
    assert norm > 1e3, "logged as it was"
    assert math.sqrt(change) == pytest.approx(lr * (max_norm or norm), rel=1e-3)


# --- the loss scale of float16 --------------------------------------------------------------------


class ScaledLoop:
    """A weight that is trained with a real GradScaler and the clamp, as AcceleratedOptimizer does it."""

    def __init__(self, scale: float, min_scale: float, window: int = 1000) -> None:
        self.weight = nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=window)
        self.clamp = LossScaleClamp(min_scale)

    def update(self, gradient: float) -> tuple[float, int]:
        """One update; returns the scale after it and the overflows in a row at the clamp."""
        before, weight = self.clamp.scale(self.scaler), float(self.weight.detach())
        self.optimizer.zero_grad()
        self.scaler.scale((self.weight * gradient).sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        assert (float(self.weight.detach()) == weight) is math.isinf(gradient), "an overflow skips the update"
        overflows = self.clamp.update(self.scaler, before)
        return self.scaler.get_scale(), int(overflows)


def test_overflows_halve_the_scale_down_to_the_smallest():
    loop = ScaledLoop(scale=0.25, min_scale=0.03125)
    assert [loop.update(math.inf) for _ in range(6)] == [
        (0.125, 0),
        (0.0625, 0),
        (0.03125, 0),
        (0.03125, 1),
        (0.03125, 2),
        (0.03125, 3),
    ], "only overflows at the smallest scale count"
    assert loop.update(1.0) == (0.03125, 0), "an update without one begins anew"
    assert [loop.update(math.inf)[1] for _ in range(MAX_OVERFLOWS)] == list(range(1, MAX_OVERFLOWS + 1))


def test_a_smallest_scale_that_is_no_power_of_two_is_met_exactly():
    loop = ScaledLoop(scale=1.0, min_scale=0.3)
    assert [loop.update(math.inf) for _ in range(4)] == [(0.5, 0), (pytest.approx(0.3), 0)] + [
        (pytest.approx(0.3), count) for count in (1, 2)
    ]


def test_a_window_without_overflow_doubles_the_scale():
    loop = ScaledLoop(scale=1.0, min_scale=0.5, window=3)
    assert [loop.update(1.0)[0] for _ in range(6)] == [1, 1, 2, 2, 2, 4]
    assert [loop.update(gradient)[0] for gradient in (1.0, 1.0, math.inf, 1.0, 1.0, 1.0)] == [4, 4, 2, 2, 2, 4]


def test_the_window_reaches_the_accelerator(tmp_path):
    assert tiny_trainer(tmp_path).accelerator.scaler_handler.growth_interval == 256
    assert tiny_trainer(tmp_path, fp16_scale_window=9).accelerator.scaler_handler.growth_interval == 9


class Overflow(TrainerCallback):
    """Makes gradients overflow from an update on."""

    def __init__(self, weight: nn.Parameter, update: int) -> None:
        self.weights: list[torch.Tensor] = []
        self.weight, self.update = weight, update
        weight.register_hook(lambda gradient: gradient * (math.inf if self.overflows else 1))
        self.overflows = False

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.overflows = state.global_step + 1 >= self.update
        self.weights.append(self.weight.detach().clone())


@pytest.mark.parametrize(
    "optim, late, logging_steps",
    [("adamw_torch_fused", False, 1), ("radam", False, 1), ("radam", True, 1), ("adamw_torch_fused", True, 100)],
)
def test_a_run_whose_gradients_overflow_at_the_smallest_scale_has_diverged(
    tmp_path, monkeypatch, optim, late, logging_steps
):
    """The Trainer's own loop, with the scaler that accelerate makes on a GPU. Fused optimisers skip by themselves."""
    model = plain_model()
    name = "model.decoder.layers.1.fc1.weight"
    overflow = Overflow(model.get_parameter(name), update=4)
    trainer = tiny_trainer(
        tmp_path,
        model,
        max_steps=20,
        logging_steps=logging_steps,
        fp16_min_scale=0.25,
        optim=optim,
        callbacks=[overflow],
    )
    trainer.monitor.late = late
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
    with pytest.raises(Divergence, match="10 updates in a row overflowed at the smallest loss scale, 0.25") as caught:
        trainer.train()
    record = caught.value.record
    assert record["step"] == 3 + 2 + MAX_OVERFLOWS - 1, "three good updates, two that halve the scale, and ten"
    assert record["scale"] == 0.25 and math.isfinite(record["loss"])
    assert record["first_non_finite"] == name
    assert logging_steps > 1 or logged(trainer, "loss_scale")[:6] == [1, 1, 1, 1, 0.5, 0.25], "of each update"
    assert not torch.equal(overflow.weights[0], overflow.weights[3])
    assert all(torch.equal(overflow.weights[3], later) for later in overflow.weights[4:]), "no update was made"

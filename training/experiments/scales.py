"""Runs, and the scales that they come in.

A run is a set of arguments of run_translation.py: the recipe of its scale and data set, and what the run changes.
Equal runs have equal names, so that experiments share them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


REPO = Path(__file__).parents[2]
RUNS = "runs/experiments"  # in REPO, where run_translation.py is started

# Which arguments a reader compares, in this order
SHOWN = ("max_steps", "num_train_epochs", "max_tokens", "gradient_accumulation_steps", "optim", "adam_beta2")
SHOWN += ("learning_rate", "lr_scheduler_type", "warmup_steps", "label_smoothing_factor", "vocab_size")
SHOWN += ("per_device_train_batch_size", "block_size", "masked")
SHOWN += ("bpe_dropout", "ema_decay", "early_stopping_patience", "average_last", "num_beams", "bf16", "seed")


@dataclass(frozen=True)
class PlannedRun:
    """A training, and its place in the table of an experiment.

    Attributes:
        name: of its folder below `runs/experiments`.
        row: of the table; a line of the figure.
        column: of the table; a panel of the figure.
        arguments: all that run_translation.py is given, but for what does not change its result.
        seconds: how long it is expected to take.
        scoring: the arguments of a second process, which translates with the trained model; none, if nothing is
            translated.
        order: of the runs that are asked for, those of a lower order start first.
        program: the module that trains, instead of run_translation.
    """

    name: str
    row: str
    column: str
    arguments: dict[str, Any]
    seconds: float
    scoring: dict[str, Any] = field(default_factory=dict)
    order: int = 0
    program: str = "run_translation"

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return REPO / self.arguments["output_dir"]


# --- scales ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Where experiments run: data sets, recipes and sizes.

    Attributes:
        large: the data set of Tables 1 and 2 and of section 5.2.
        small: the data set of Table 3 and Figure 10.
        recipe: the arguments for a data set and a number of layers in each stack; `config_overrides` as a dict.
        seconds: expected for a data set, a number of layers and the arguments of a run.
        grid_layers, learning_rates, no_warmup: of the grid, and the arguments that take the warm-up away.
        batches: the changes for a small and a large batch.
        deep: the changes for more layers than anybody trains, by their number.
    """

    name: str
    recipe: Callable[[str, int], dict[str, Any]]
    seconds: Callable[[str, int, Mapping[str, Any]], float]
    seeds: tuple[int, ...] = (1111, 2222, 3333)
    large: str = "multi30k"
    small: str = "multi30k"
    grid_layers: int = 0
    learning_rates: Sequence[float] = ()
    no_warmup: Mapping[str, Any] = field(default_factory=dict)
    batches: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    deep: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


def cpu_recipe(data_set: str, layers: int) -> dict[str, Any]:
    """Multi30k at width 64, for which a core needs minutes. Schedule, betas and loss are the paper's.

    The optimiser is Adam: RAdam has a warm-up of its own, of about 2 / (1 − β₂) updates, which is a fiftieth of the
    paper's runs but more than the whole of these.
    """
    model = {"encoder_layers": layers, "decoder_layers": layers, "d_model": 64, "encoder_ffn_dim": 128}
    model |= {"decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model |= {"dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return {
        "config_overrides": model,
        "source_lang": "en",
        "target_lang": "de",
        "train_file": f"runs/data/{data_set}/train",
        "validation_file": f"runs/data/{data_set}/val",
        "vocab_size": 4000,
        "lowercase": True,
        "do_train": True,
        "do_eval": True,
        "max_eval_samples": 500,
        "per_device_eval_batch_size": 50,
        "predict_with_generate": False,  # BLEU says nothing after a few hundred updates
        "prediction_loss_only": True,
        "max_steps": 500,
        "max_tokens": 1024,
        "optim": "adamw_torch",  # without weight decay, Adam
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "learning_rate": 0.002,
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": 100,
        "max_grad_norm": 0.0,
        "label_smoothing_factor": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 50,
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 1,
        "logging_steps": 25,
    }


def cpu_seconds(data_set: str, layers: int, arguments: Mapping[str, Any]) -> float:
    """As measured on one core: start-up, updates, evaluations."""
    update = 0.03 * layers * max(arguments["max_tokens"] / 1024, 0.4)
    evaluations = arguments["max_steps"] // arguments["eval_steps"] + 1
    return 15 + arguments["max_steps"] * update + evaluations * 0.15 * layers


def small_recipe(data_set: str, layers: int) -> dict[str, Any]:
    """That of [`cpu_recipe`] at width 128, for long enough to translate: some 20 epochs of Multi30k."""
    recipe = cpu_recipe(data_set, layers)
    recipe["config_overrides"] |= {"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    longer = {"max_steps": 5000, "max_tokens": 2048, "warmup_steps": 400, "eval_steps": 250, "save_steps": 250}
    return recipe | longer | {"max_eval_samples": None, "logging_steps": 50, "num_beams": 5}


def small_seconds(data_set: str, layers: int, arguments: Mapping[str, Any]) -> float:
    """As estimated from 60 updates with 2-2 layers on one busy core; start-up and translation are three minutes."""
    return 180 + arguments["max_steps"] * 0.095 * layers


def tiny_recipe(data_set: str, layers: int) -> dict[str, Any]:
    """The recipe of hub_configs at width 128, stopped by the validation loss, with nothing translated on the way.

    The loss is read, and a checkpoint saved, after each epoch. The run ends when ten epochs in a row bring no lower
    loss, which is the patience of Wu et al. (2021), or after 50 epochs.
    """
    path = REPO / "hub_configs" / f"{data_set}-{layers}-{layers}-tiny" / "recipe.json"
    recipe = json.loads(path.read_text(encoding="utf-8"))
    del recipe["eval_steps"]
    return recipe | {
        "config_overrides": {},
        "do_predict": False,
        "predict_with_generate": False,
        "prediction_loss_only": True,
        "num_train_epochs": 50,
        "eval_strategy": "epoch",
        "early_stopping_patience": 10,
    }


def tiny_seconds(data_set: str, layers: int, arguments: Mapping[str, Any]) -> float:
    """As measured on one busy core, for all epochs: 0.6 and 1.5 seconds an update with 4-4 and 12-12 layers."""
    updates = 114 * arguments["num_train_epochs"]
    return updates * (0.15 + 0.1125 * layers)


def paper_recipe(data_set: str, layers: int) -> dict[str, Any]:
    """The recipe of hub_configs, whose folders for one data set and depth differ in the residual system alone."""
    folder = REPO / "hub_configs" / f"{data_set}-{layers}-{layers}-admin"
    return json.loads((folder / "recipe.json").read_text(encoding="utf-8")) | {"config_overrides": {}}


def paper_seconds(data_set: str, layers: int, arguments: Mapping[str, Any]) -> float:
    """As the paper's appendix D says: days on four GPUs for WMT'14, a few hours on one for IWSLT'14."""
    hours = 4 if data_set.startswith("iwslt14") else 4 * 24 * layers / 6
    return hours * 3600


def stock_recipe(data_set: str, layers: int, updates: int = 600) -> dict[str, Any]:
    """Stock models at width 64 on blocks of text or on sentence pairs; the optimiser is that of [`cpu_recipe`]."""
    is_text = data_set == "tatoeba"
    return {
        "source_lang": "en",
        "target_lang": "en" if is_text else "de",
        "train_file": f"runs/data/{data_set}/train",
        "validation_file": f"runs/data/{data_set}/val",
        "vocab_size": 10_000,
        "lowercase": True,
        "block_size": 32,
        "max_eval_blocks": 256,
        "use_cpu": True,
        "prediction_loss_only": True,
        "max_steps": updates,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "learning_rate": 0.001,
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": updates // 5,
        "max_grad_norm": 0.0,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": updates // 10,
        "logging_steps": updates // 10,
        "save_strategy": "steps",
        "save_steps": 60,
        "save_total_limit": 1,
    }


def stock_seconds(data_set: str, layers: int, arguments: Mapping[str, Any]) -> float:
    """As measured on one core: start-up, updates, and evaluations, which take a tenth of what these do."""
    stacks = 1 if data_set == "tatoeba" else 2.5
    return 30 + 1.1 * arguments["max_steps"] * (0.1 + 0.0095 * layers * stacks)


SCALES = {
    "cpu": Scale(
        "cpu",
        cpu_recipe,
        cpu_seconds,
        grid_layers=18,
        learning_rates=(1e-3, 2e-3, 3e-3, 4e-3, 5e-3),
        no_warmup={"warmup_steps": 0, "lr_scheduler_type": "linear", "max_steps": 150},
        batches={"256 tokens": {"max_tokens": 256}, "4,096 tokens": {"max_tokens": 4096, "max_steps": 200}},
        deep={layers: {"max_tokens": 512, "max_steps": 300} for layers in (100, 500)},
    ),
    "small": Scale("small", small_recipe, small_seconds),
    "tiny": Scale("tiny", tiny_recipe, tiny_seconds),
    **{
        name: Scale(name, partial(stock_recipe, updates=updates), stock_seconds, large="tatoeba")
        for name, updates in (("architectures", 600), ("architectures-long", 2000))
    },
    "paper": Scale(
        "paper",
        paper_recipe,
        paper_seconds,
        seeds=(1111, 2222, 3333, 4444, 5555),
        large="wmt14-en-de",
        small="iwslt14-de-en",
        grid_layers=6,
        learning_rates=(1e-4, 2e-4, 3e-4, 4e-4, 5e-4),
        no_warmup={"warmup_steps": 0, "lr_scheduler_type": "linear"},
        batches={
            f"{pieces} × 4,096 tokens": {"max_tokens": 4096, "gradient_accumulation_steps": pieces}
            for pieces in (8, 128)
        },
        deep={100: {}},
    ),
}


def make_run(
    scale: Scale,
    data_set: str,
    layers: int,
    residual: str | tuple[str, str],
    seed: int,
    row: str,
    column: str = "",
    tag: str = "",
    overrides: Mapping[str, Any] | None = None,
    scoring: Mapping[str, Any] | None = None,
    order: int = 0,
    program: str = "run_translation",
    **changes: Any,
) -> PlannedRun:
    """A run of a scale.

    Args:
        layers: in each stack.
        residual: the system, or those of encoder and decoder.
        column: of the [`PlannedRun`]; the layers of both stacks where unset.
        tag: what else tells the run from others, for its name.
        overrides: what differs in the model's configuration.
        scoring, order, program: of the [`PlannedRun`].
        changes: arguments that differ from the recipe's.
    """
    encoder, decoder = (residual, residual) if isinstance(residual, str) else residual
    system = encoder if encoder == decoder else f"{encoder}-{decoder}"
    depth = f"{layers}-{layers}"
    name = "-".join(filter(None, (data_set, depth, system, tag, f"seed{seed}")))
    recipe = scale.recipe(data_set, layers)
    systems = {"encoder_residual": encoder, "decoder_residual": decoder}
    model = recipe["config_overrides"] | systems | dict(overrides or {})
    arguments = recipe | changes
    arguments |= {
        "config_overrides": ",".join(f"{key}={value}" for key, value in model.items()),
        "tokenizer_name": f"{RUNS}/{scale.name}/tokenizer-{data_set}",
        "output_dir": f"{RUNS}/{scale.name}/{name}",
        "seed": seed,
    }
    seconds = scale.seconds(data_set, layers, arguments)
    place = f"{scale.name}/{name}", row, column or depth
    return PlannedRun(*place, arguments, seconds, dict(scoring or {}), order, program)


def settings(runs: Sequence[PlannedRun]) -> str:
    """What a reader compares of the runs' arguments: one value, or all that there are."""
    parts = []
    models = [_model(run) for run in runs]
    shown = [(name, [run.arguments for run in runs]) for name in SHOWN]
    shown += [
        (name, models)
        for name in ("d_model", "hidden_size", "encoder_ffn_dim", "ffn_dim", "intermediate_size", "dropout")
    ]
    for name, settings_of_runs in shown:
        if values := dict.fromkeys(str(there[name]) for there in settings_of_runs if name in there):
            parts.append(f"{name} {', '.join(values)}")
    return f"Settings: {'; '.join(parts)}."


def _model(run: PlannedRun) -> dict[str, Any]:
    model = dict(item.split("=") for item in run.arguments["config_overrides"].split(","))
    if config := run.arguments.get("config_name"):
        model = json.loads((REPO / config / "config.json").read_text(encoding="utf-8")) | model
    return model

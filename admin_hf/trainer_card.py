"""The model card of a Trainer's model: arguments, scores, seed, hardware and time, for admin_hf.card."""

import copy
import functools
import inspect
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from transformers import TrainerState, TrainingArguments

from .adapters import bare_model
from .card import Card, training_section
from .paths import published


# Arguments about the place of a run, not about the run itself
PRIVATE = ("output_dir", "logging_", "hub_", "push_to_hub", "cache_dir", "resume_from_checkpoint", "project", "do_")
PRIVATE += ("run_name", "report_to", "trackio", "use_cpu", "disable_tqdm", "local_rank", "save_")  # type: ignore[assignment]

# The names of scores, as `compute_metrics` returns them, and their usual names
METRICS = {"bleu": "BLEU", "sacrebleu": "BLEU", "chrf": "chrF2", "ter": "TER"}


def card_of_training(
    model: Any, args: TrainingArguments, state: TrainerState, data: ModelCardData | None = None
) -> Card:
    """The card of a model that a Trainer has trained, with its last scores if they are of these weights.

    Args:
        model: the model with its ω.
        data: metadata from the user.
    """
    card = Card.of(model, data)
    # Not those of a new object, which would set up the process's devices again; arguments that are filled in are left
    # out
    defaults = {each.name: each.default for each in fields(args)}
    given = {name: x for name, x in args.to_dict().items() if (x or defaults.get(name)) and not isinstance(x, dict)}
    changed = changed_arguments(given, defaults)
    facts = training_facts(args, state.log_history, state.global_step)
    step = (args.load_best_model_at_end and state.best_global_step) or state.global_step
    entries = [e for e in state.log_history if e.get("step") == step and any(k.startswith("eval_") for k in e)]
    scores = {name.removeprefix("eval_"): value for name, value in entries[-1].items()} if entries else {}
    card.data = _with_results(card.data, scores)
    training = training_section(bare_model(model).config.to_dict(), facts, changed, type(args).__name__)
    card.sections = {"Scores": _score_section(scores), "Training": training}
    return card


@functools.cache
def use_our_card(write_card: Callable[[Any, Mapping[str, Any]], bool]) -> None:
    """Let a Trainer write our card instead of its own. It has no event for this.

    Args:
        write_card: writes the card of a Trainer, with the arguments of `create_model_card`, or returns False.
    """
    from transformers import Trainer

    stock = Trainer.create_model_card

    @functools.wraps(stock)
    def create_model_card(trainer: Any, *args: Any, **kwargs: Any) -> None:
        if not write_card(trainer, inspect.signature(stock).bind(trainer, *args, **kwargs).arguments):
            stock(trainer, *args, **kwargs)

    setattr(Trainer, "create_model_card", create_model_card)  # noqa: B010  (mypy)


def given_data(data: ModelCardData, given: Mapping[str, Any]) -> ModelCardData:
    """Metadata together with the arguments of `trainer.push_to_hub`, whose names are Trainer's own."""
    data = copy.copy(data)
    names = {"language": "language", "license": "license", "base_model": "finetuned_from"}
    for field, name in (names | {"tags": "tags", "datasets": "dataset_tags"}).items():
        if (value := given.get(name)) is not None:
            data[field] = [value] if isinstance(value, str) and field in ("tags", "datasets") else value
    return data


# --- how it was trained ---------------------------------------------------------------------------


def training_facts(args: TrainingArguments, log: Iterable[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Seed, hardware, time and versions of a training.

    Args:
        log: `log_history` of its [`~transformers.TrainerState`].
        steps: the number of its updates.
    """
    facts: dict[str, Any] = {"seed": args.seed, "updates": steps}
    devices = args.world_size * max(args.n_gpu, 1) if args.device.type != "cpu" else args.world_size
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else processor_name()
    facts["hardware"] = f"{devices} × {name}" if devices > 1 else name
    for entry in log:
        if "train_runtime" in entry:
            seconds = float(entry["train_runtime"])
            is_whole = seconds * float(entry.get("train_steps_per_second", 0)) > 0.99 * steps - 1
            session = "" if is_whole else ", of the last session"
            facts["wall time"] = f"{timedelta(seconds=round(seconds))} (h:mm:ss{session})"
    return facts


def processor_name() -> str:
    """The processor's name, from the system."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def changed_arguments(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that differ from their defaults; of files, only the names."""
    changed = {
        name: value
        for name, value in arguments.items()
        if value is not None and value != defaults.get(name) and not name.startswith(PRIVATE)
    }
    return dict(published(changed))


# --- scores ---------------------------------------------------------------------------------------


def _measured(scores: Mapping[str, Any]) -> dict[str, float]:
    """What an evaluation measured of a model, without what it measured of the machine."""
    of_machine = ("runtime", "_per_second", "_time", "epoch", "step", "model_preparation")
    numbers = {name: x for name, x in scores.items() if isinstance(x, int | float) and not isinstance(x, bool)}
    return {name: float(x) for name, x in numbers.items() if not name.endswith(of_machine) and math.isfinite(x)}


def _with_results(data: ModelCardData, scores: Mapping[str, Any]) -> ModelCardData:
    """Metadata with the scores that the Hub can show, where the data set is given to which they belong."""
    datasets = [data.datasets] if isinstance(data.datasets, str) else data.datasets
    known = {name: METRICS[name] for name in _measured(scores) if name in METRICS}
    if data.eval_results or not datasets or not known:
        return data
    data = copy.deepcopy(data)
    data.metrics = data.metrics or [*known]
    data.eval_results = [
        EvalResult(
            task_type="translation",
            dataset_type=datasets[0],
            dataset_name=datasets[0],
            metric_type=name,
            metric_name=" ".join(filter(None, (shown, scores.get(f"{name}_signature")))),
            metric_value=round(float(scores[name]), 2),
        )
        for name, shown in known.items()
    ]
    return data


def _score_section(scores: Mapping[str, Any]) -> str:
    signatures = {name: scores.get(f"{name}_signature") for name in _measured(scores)}
    rows = [
        [METRICS.get(name, name), f"{value:.4g}", f"`{signatures[name]}`" if signatures[name] else ""]
        for name, value in _measured(scores).items()
    ]
    return score_table(["evaluation, before folding", "score", "signature"], rows) if rows else ""


def table_cell(text: str) -> str:
    """Text for a cell of a Markdown table, with bars escaped."""
    return text.replace("|", "\\|")


def score_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [[*map(table_cell, row)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells))

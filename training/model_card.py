"""The model card of a run: what admin_hf.card knows of any model, and what this script recorded beside it."""

import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from admin_hf.analysis.drawing import add_omega, new_figure, plain_axes, save_figure
from admin_hf.analysis.omega import StackOmega, trained_omega
from admin_hf.card import Card, training_section
from admin_hf.checkpoints import has_weights
from admin_hf.paths import is_hub_id, published
from admin_hf.run.folder import METRICS, SPLITS, VANILLA_NAME, Run
from admin_hf.trainer_card import changed_arguments, score_table

from .arguments import Arguments, DataTrainingArguments, ModelArguments, TranslationTrainingArguments
from .runs import recorded


FIGURE_NAME = "omega.png"
SHOWN_METRICS = ("bleu", "chrf", "ter")

FIGURE = f"""![ω by sub-layer]({FIGURE_NAME})

*ω by sub-layer: {{profiled}}the mean and range of its entries after training.*
"""

PROFILED = "the value that was profiled on the first batch (dashed), and "


def write_run_card(
    run: Path, repo_id: str, arguments: dict[str, Any], scores: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write README.md, and omega.png where the model has ω, beside the vanilla model of a run.

    Args:
        run: output folder of run_translation.py.
        repo_id: what the model is loaded by: its name on the Hub, or a name to be replaced.
        arguments: all arguments that the scores were computed with.
        scores: what this model scored, before folding (`"test_bleu"`) and after (`"vanilla_test_bleu"`).
        facts: of the training, if it was in this session.
    """
    found, vanilla = Run(run), run / VANILLA_NAME
    omega = trained_omega(run, found.profile) if has_weights(run) else {}
    has_omega = any(stack.names for stack in omega.values())
    is_profiled = found.is_profiled is not False if has_omega else None
    training = training_section(found.config, facts, _changed(arguments), "run_translation.py")
    if has_omega:
        _draw(omega, vanilla / FIGURE_NAME)
        training += "\n\n" + FIGURE.format(profiled=PROFILED if found.profile else "")
    sentence = "A dog runs." if arguments["source_lang"].startswith("en") else "…"
    data = _data_arguments(arguments)
    card = Card(
        _metadata(arguments, scores, repo_id),
        is_profiled,
        base_model=arguments["model_name_or_path"],
        sections={"Scores": _scores(scores, data.tags), "Data": _data(arguments), "Training": training},
        example=(next(iter(data.by_target().values())).source_prefix or "") + sentence,
    )
    card.write(vanilla, repo_id)


def _data_arguments(arguments: dict[str, Any]) -> DataTrainingArguments:
    return DataTrainingArguments(**{name: arguments.get(name) for name in ("target_lang", "source_prefix")})


def _dataset(arguments: dict[str, Any], split: str) -> str:
    if arguments["dataset_name"]:
        name = published(arguments["dataset_name"])
        return " ".join(filter(None, (name, arguments["dataset_config_name"])))
    return published(arguments[f"{SPLITS[split]}_file"], "_file") or split


def _metadata(arguments: dict[str, Any], scores: dict[str, Any], repo_id: str) -> ModelCardData:
    languages = [arguments["source_lang"], *_data_arguments(arguments).by_target()]
    # The Hub knows a language without its country or script: zh-CN is zh
    codes = [match[0] for language in languages if (match := re.match("[a-z]{2,3}(?=[-_]|$)", language))]
    dataset = arguments["dataset_name"]
    datasets = [dataset] if dataset and is_hub_id(dataset) else None
    results = [
        EvalResult(
            task_type="translation",
            dataset_type=datasets[0] if datasets else "text",
            dataset_name=_dataset(arguments, split),
            dataset_split=SPLITS[split],
            metric_type=metric,
            metric_name=f"{METRICS[metric]} ({scores.get(f'{split}_{metric}_signature', '')})",
            metric_value=round(scores[f"vanilla_{split}_{metric}"], 2),
        )
        for split in SPLITS
        for metric in SHOWN_METRICS
        if f"vanilla_{split}_{metric}" in scores
    ]
    return ModelCardData(
        language=list(dict.fromkeys(codes)) if len(codes) == len(languages) else None,
        datasets=datasets,
        metrics=list(SHOWN_METRICS) if results else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=results or None,
    )


def _scores(scores: dict[str, Any], languages: Iterable[str]) -> str:
    rows = []
    for (split, name), language in product(SPLITS.items(), ["", *languages]):
        for metric in SHOWN_METRICS:
            key = "_".join(filter(None, (split, language, metric)))
            if f"vanilla_{key}" in scores:
                both = (f"{scores[name]:.2f}" for name in (f"vanilla_{key}", key))
                rows.append([f"{name} {language}".strip(), METRICS[metric], *both, f"`{scores[f'{key}_signature']}`"])
    if not rows:
        return "This model was not evaluated."
    return score_table(["set", "metric", "this model", "before folding", "sacreBLEU signature"], rows)


def _data(arguments: dict[str, Any]) -> str:
    lines = []
    for split in ("train", "validation", "test"):
        if name := arguments["dataset_name"] or arguments[f"{split}_file"]:
            lines.append(f"- {split}: {published(name, '' if arguments['dataset_name'] else '_file')}")
    if tags := _data_arguments(arguments).tags:
        lines.append(f"- the target language is chosen by a tag before the source: {', '.join(tags.values())}")
    case = "Text is lower-cased." if arguments["lowercase"] else "Text keeps its case."
    return "\n".join([*lines, "", case])


def _changed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that were not left at their defaults, files by their names alone."""
    training = TranslationTrainingArguments(output_dir="-", use_cpu=True)
    defaults = recorded(Arguments(ModelArguments(), DataTrainingArguments(), training))
    return changed_arguments(arguments, defaults)


def _draw(omega: dict[str, StackOmega], path: Path) -> None:
    figure = new_figure(8, 3)
    panels = figure.subplots(1, len(omega), sharey=True)
    for axes, (name, stack) in zip(panels, omega.items(), strict=True):
        add_omega(axes, stack, "profiled", "after training")
        plain_axes(axes, title=name, xlabel="sub-layer")
    panels[0].set_ylabel("ω")
    panels[0].legend(frameon=False)
    save_figure(figure, path)

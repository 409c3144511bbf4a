"""The model card of a run: README.md and a figure of ω beside the vanilla model, from what the run recorded."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from admin_hf.analysis.drawing import STYLES, new_figure, save_figure
from admin_hf.architecture import STACKS
from admin_hf.checkpoints import has_weights, says_profiled, weight_files, write_whole
from admin_hf.run.folder import PROFILE_NAME, VANILLA_NAME

from .arguments import (
    DataTrainingArguments,
    ModelArguments,
    TranslationTrainingArguments,
)
from .paths import is_hub_id, published
from .results import table_cell
from .runs import recorded


FIGURE_NAME = "omega.png"
PAPER = "https://aclanthology.org/2020.emnlp-main.463"
SPLITS = {"eval": ("validation", "validation_file"), "test": ("test", "test_file")}
METRICS = {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER"}
# What says where a run was, not what it was
PRIVATE = ("output_dir", "logging_dir", "hub_", "push_to_hub", "cache_dir", "resume_from_checkpoint", "project")
PRIVATE += ("run_name", "report_to", "trackio", "use_cpu", "disable_tqdm", "local_rank", "do_", "logging_", "save_")

TEMPLATE = """---
{metadata}
---

# {title}

Translates **{source} → {target}**. A Transformer with {depth} layers, width {width} and {parameters:.1f} M parameters.
{admin}This is a plain {architecture} checkpoint: it needs nothing but 🤗 Transformers.

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoModelForSeq2SeqLM.from_pretrained("{repo_id}")

source = tokenizer([{example}], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**source), skip_special_tokens=True))
```

CTranslate2 takes it as well: `ct2-transformers-converter --model {repo_id} --output_dir ct2 --quantization int8`.

## Scores

{scores}

## Data

{data}

## Training

Residual connections: `{encoder_residual}` in the encoder, `{decoder_residual}` in the decoder. Arguments of
`run_translation.py` that differ from its defaults:

```json
{arguments}
```
{figure}"""

ADMIN = f"""It was trained with [Admin]({PAPER}) (Adaptive Model Initialization), whose shortcut
scales ω are folded into the weights. """

UNPROFILED = """Its shortcut scales ω were not profiled, so it is not an Admin model; they are folded into
the weights. """

FIGURE = f"""
![ω by sub-layer]({FIGURE_NAME})

*ω by sub-layer: {{profiled}}the mean and range of its entries after training.*
"""

PROFILED = "the value that was profiled on the first batch (dashed), and "


def write_card(run: Path, repo_id: str, arguments: dict[str, Any], scores: dict[str, Any]) -> None:
    """Write README.md, and omega.png where the model has ω, beside the vanilla model of a run.

    Args:
        run: output folder of run_translation.py.
        repo_id: what the model is loaded by: its name on the Hub, or a name to be replaced.
        arguments: all arguments that the scores were computed with.
        scores: what this model scored, before folding (`"test_bleu"`) and after (`"vanilla_test_bleu"`).
    """
    vanilla = run / VANILLA_NAME
    config, profile = _read(run / "config.json"), _read(run / PROFILE_NAME)
    omegas = {stack: trained_omegas(run, stack) for stack in STACKS}
    if has_omega := any(omegas.values()):
        _draw(omegas, profile, vanilla / FIGURE_NAME)
    is_admin = has_omega and says_profiled(run) is not False
    text = TEMPLATE.format(
        metadata=_metadata(arguments, scores, repo_id, is_admin).to_yaml(),
        title=repo_id.rpartition("/")[2],
        source=arguments["source_lang"],
        target=arguments["target_lang"],
        depth=f"{config['encoder_layers']}+{config['decoder_layers']}",
        width=config["d_model"],
        parameters=_parameters(vanilla) / 1e6,
        admin=ADMIN if is_admin else UNPROFILED if has_omega else "",
        architecture=_read(vanilla / "config.json")["model_type"].capitalize(),
        repo_id=repo_id,
        example=_literal((arguments["source_prefix"] or "") + _sentence(arguments["source_lang"])),
        scores=_scores(scores),
        data=_data(arguments),
        encoder_residual=config["encoder_residual"],
        decoder_residual=config["decoder_residual"],
        arguments=json.dumps(_changed(arguments), indent=1, ensure_ascii=False),
        figure=FIGURE.format(profiled=PROFILED if profile else "") if has_omega else "",
    )
    write_whole(vanilla / "README.md", str(ModelCard(text)))


def trained_omegas(run: Path, stack: str) -> dict[str, np.ndarray]:
    """The trained ω of a stack by the name of its sub-layer, in execution order."""
    found = {}
    for file in weight_files(run) if has_weights(run) else []:
        with safe_open(file, framework="np") as weights:
            for name in weights.keys():
                if match := re.fullmatch(rf"model\.{stack}\.(layers\.\d+\.\w+)\.omega", name):
                    found[match[1]] = weights.get_tensor(name).astype(np.float32)
    return {name: found[name] for name in sorted(found, key=STACKS[stack].index)}


def _sentence(language: str) -> str:
    return "A dog runs." if language.startswith("en") else "…"


def _literal(text: str) -> str:
    """The text as Python writes it, in one line whatever it holds."""
    return json.dumps(text, ensure_ascii=False)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _parameters(vanilla: Path) -> int:
    count = 0
    for file in weight_files(vanilla):
        with safe_open(file, framework="np") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}
            count += sum(int(np.prod(shape)) for name, shape in shapes.items() if name != "final_logits_bias")
    return count


def _dataset(arguments: dict[str, Any], split: str) -> str:
    if arguments["dataset_name"]:
        name = published(arguments["dataset_name"])
        return " ".join(filter(None, (name, arguments["dataset_config_name"])))
    return published(arguments[SPLITS[split][1]], "_file") or split


def _metadata(arguments: dict[str, Any], scores: dict[str, Any], repo_id: str, is_admin: bool) -> ModelCardData:
    languages = [arguments["source_lang"], arguments["target_lang"]]
    dataset = arguments["dataset_name"]
    datasets = [dataset] if dataset and is_hub_id(dataset) else None
    results = [
        EvalResult(
            task_type="translation",
            dataset_type=datasets[0] if datasets else "text",
            dataset_name=_dataset(arguments, split),
            dataset_split=SPLITS[split][0],
            metric_type="bleu",
            metric_name=f"BLEU ({scores.get(f'{split}_bleu_signature', '')})",
            metric_value=round(scores[f"vanilla_{split}_bleu"], 2),
        )
        for split in SPLITS
        if f"vanilla_{split}_bleu" in scores
    ]
    return ModelCardData(
        language=languages if all(re.fullmatch("[a-z]{2,3}", language) for language in languages) else None,
        library_name="transformers",
        pipeline_tag="translation",
        tags=["translation", "admin"] if is_admin else ["translation"],
        datasets=datasets,
        metrics=["bleu", "chrf", "ter"] if results else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=results or None,
    )


def _scores(scores: dict[str, Any]) -> str:
    rows = []
    for split, (name, _) in SPLITS.items():
        for metric, label in METRICS.items():
            if f"vanilla_{split}_{metric}" in scores:
                both = (f"{scores[key]:.2f}" for key in (f"vanilla_{split}_{metric}", f"{split}_{metric}"))
                signature = table_cell(scores[f"{split}_{metric}_signature"])
                rows.append(f"| {name} | {label} | {' | '.join(both)} | `{signature}` |")
    if not rows:
        return "This model was not evaluated."
    head = ["| set | metric | this model | before folding | sacreBLEU signature |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(head + rows)


def _data(arguments: dict[str, Any]) -> str:
    lines = []
    for split in ("train", "validation", "test"):
        if arguments["dataset_name"] or arguments[f"{split}_file"]:
            name = arguments["dataset_name"] or arguments[f"{split}_file"]
            lines.append(f"- {split}: {published(name, '' if arguments['dataset_name'] else '_file')}")
    case = "Text is lower-cased." if arguments["lowercase"] else "Text keeps its case."
    return "\n".join([*lines, "", case])


def _changed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that were not left at their defaults, files by their names alone."""
    training = TranslationTrainingArguments(output_dir="-", use_cpu=True)
    defaults = recorded((ModelArguments(), DataTrainingArguments(), training))
    changed = {
        name: value
        for name, value in arguments.items()
        if value is not None and value != defaults.get(name) and not name.startswith(PRIVATE)
    }
    return published(changed)


def _draw(omegas: dict[str, dict[str, np.ndarray]], profile: dict[str, Any], path: Path) -> None:
    (after, _), (before, dashed), *_ = STYLES
    figure = new_figure(8, 3)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (stack, values) in zip(axes, omegas.items(), strict=True):
        names = profile.get(stack, {}).get("names", list(values))
        where = [index for index, name in enumerate(names, start=1) if name in values]
        trained = [values[names[index - 1]] for index in where]
        axis.fill_between(where, [v.min() for v in trained], [v.max() for v in trained], color=after, alpha=0.2)
        axis.plot(where, [v.mean() for v in trained], "o-", color=after, markersize=3, label="after training")
        if profile:
            start = [profile[stack]["omega"][index - 1] for index in where]
            axis.plot(where, start, dashed, color=before, label="profiled")
        axis.set(title=stack, xlabel="sub-layer")
    axes[0].set_ylabel("ω")
    axes[0].legend(frameon=False)
    save_figure(figure, path)

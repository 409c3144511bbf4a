"""The model card of a run: README.md and a figure of ω beside the vanilla model, from what the run recorded."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from admin_hf.analysis import read_tensors
from admin_hf.analysis.drawing import add_omega, new_figure, plain_axes, save_figure
from admin_hf.analysis.omega import StackOmega, trained_omega
from admin_hf.checkpoints import has_weights, write_whole
from admin_hf.run.folder import METRICS, SPLITS, VANILLA_NAME, Run

from .arguments import Arguments, DataTrainingArguments, ModelArguments, TranslationTrainingArguments
from .paths import is_hub_id, published
from .results import table_cell
from .runs import recorded


FIGURE_NAME = "omega.png"
PAPER = "https://aclanthology.org/2020.emnlp-main.463"
SHOWN_METRICS = ("bleu", "chrf", "ter")
# What says where a run was, not what it was
PRIVATE = ("output_dir", "logging_dir", "hub_", "push_to_hub", "cache_dir", "resume_from_checkpoint", "project")
PRIVATE += ("run_name", "report_to", "trackio", "use_cpu", "disable_tqdm", "local_rank", "do_", "logging_", "save_")

TEMPLATE = """---
{metadata}
---

# {title}

Translates **{source} → {target}**. A Transformer with {depth} layers, width {width} and {parameters:.1f} M parameters.
{admin}This is a vanilla {architecture} checkpoint: it needs nothing but 🤗 Transformers.

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
    found, vanilla = Run(run), run / VANILLA_NAME
    config = found.config
    omega = trained_omega(run, found.profile) if has_weights(run) else {}
    if has_omega := any(stack.names for stack in omega.values()):
        _draw(omega, vanilla / FIGURE_NAME)
    weights = read_tensors(vanilla, lambda name: name != "final_logits_bias")
    is_admin = has_omega and found.is_profiled is not False
    sentence = "A dog runs." if arguments["source_lang"].startswith("en") else "…"
    text = TEMPLATE.format(
        metadata=_metadata(arguments, scores, repo_id, is_admin).to_yaml(),
        title=repo_id.rpartition("/")[2],
        source=arguments["source_lang"],
        target=arguments["target_lang"],
        depth=f"{config['encoder_layers']}+{config['decoder_layers']}",
        width=config["d_model"],
        parameters=sum(tensor.numel() for _, tensor in weights) / 1e6,
        admin=ADMIN if is_admin else UNPROFILED if has_omega else "",
        architecture=Run(vanilla).config["model_type"].capitalize(),
        repo_id=repo_id,
        example=json.dumps((arguments["source_prefix"] or "") + sentence, ensure_ascii=False),  # as Python writes it
        scores=_scores(scores),
        data=_data(arguments),
        encoder_residual=config["encoder_residual"],
        decoder_residual=config["decoder_residual"],
        arguments=json.dumps(_changed(arguments), indent=1, ensure_ascii=False),
        figure=FIGURE.format(profiled=PROFILED if found.profile else "") if has_omega else "",
    )
    write_whole(vanilla / "README.md", str(ModelCard(text)))


def _dataset(arguments: dict[str, Any], split: str) -> str:
    if arguments["dataset_name"]:
        name = published(arguments["dataset_name"])
        return " ".join(filter(None, (name, arguments["dataset_config_name"])))
    return published(arguments[f"{SPLITS[split]}_file"], "_file") or split


def _metadata(arguments: dict[str, Any], scores: dict[str, Any], repo_id: str, is_admin: bool) -> ModelCardData:
    languages = [arguments["source_lang"], arguments["target_lang"]]
    dataset = arguments["dataset_name"]
    datasets = [dataset] if dataset and is_hub_id(dataset) else None
    results = [
        EvalResult(
            task_type="translation",
            dataset_type=datasets[0] if datasets else "text",
            dataset_name=_dataset(arguments, split),
            dataset_split=SPLITS[split],
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
        metrics=list(SHOWN_METRICS) if results else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=results or None,
    )


def _scores(scores: dict[str, Any]) -> str:
    rows = []
    for split, name in SPLITS.items():
        for metric in SHOWN_METRICS:
            if f"vanilla_{split}_{metric}" in scores:
                both = (f"{scores[key]:.2f}" for key in (f"vanilla_{split}_{metric}", f"{split}_{metric}"))
                signature = table_cell(scores[f"{split}_{metric}_signature"])
                rows.append(f"| {name} | {METRICS[metric]} | {' | '.join(both)} | `{signature}` |")
    if not rows:
        return "This model was not evaluated."
    head = ["| set | metric | this model | before folding | sacreBLEU signature |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(head + rows)


def _data(arguments: dict[str, Any]) -> str:
    lines = []
    for split in ("train", "validation", "test"):
        if name := arguments["dataset_name"] or arguments[f"{split}_file"]:
            lines.append(f"- {split}: {published(name, '' if arguments['dataset_name'] else '_file')}")
    case = "Text is lower-cased." if arguments["lowercase"] else "Text keeps its case."
    return "\n".join([*lines, "", case])


def _changed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that were not left at their defaults, files by their names alone."""
    training = TranslationTrainingArguments(output_dir="-", use_cpu=True)
    defaults = recorded(Arguments(ModelArguments(), DataTrainingArguments(), training))
    changed = {
        name: value
        for name, value in arguments.items()
        if value is not None and value != defaults.get(name) and not name.startswith(PRIVATE)
    }
    return published(changed)


def _draw(omega: dict[str, StackOmega], path: Path) -> None:
    figure = new_figure(8, 3)
    panels = figure.subplots(1, len(omega), sharey=True)
    for axes, (name, stack) in zip(panels, omega.items(), strict=True):
        add_omega(axes, stack, "profiled", "after training")
        plain_axes(axes, title=name, xlabel="sub-layer")
    panels[0].set_ylabel("ω")
    panels[0].legend(frameon=False)
    save_figure(figure, path)

"""Makes docs/results.md and its figures from the runs' own JSON.

python -m training.results RUN ...     keep what the runs recorded in docs/results/, then make the page
python -m training.results             make the page again from docs/results/
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from admin_hf.analysis.drawing import add_lines, by_sublayer, draw_lines, new_figure, plain_axes, save_figure
from admin_hf.architecture import STACKS
from admin_hf.checkpoints import write_whole
from admin_hf.report.page import without_folders
from admin_hf.run.folder import ARGUMENTS_NAME, DECODES_NAME, PROFILE_NAME, SPLITS, STATE_NAME, Run, curve
from admin_hf.trainer_card import table_cell

from .errors import InputError


DOCS = Path(__file__).parents[1] / "docs"

# Which arguments tell one run from another, for the table
SHOWN = ("optim", "learning_rate", "warmup_steps", "max_tokens", "per_device_train_batch_size", "average_last")
SHOWN += ("num_beams", "label_smoothing_factor", "bf16", "seed")
OTHER_ARGUMENTS = ("config_name", "config_overrides", "output_dir", "target_lang")


def collect(run: Path) -> dict[str, Any]:
    """What a run recorded: arguments, scores, curves and profile.

    Raises:
        InputError: the folder holds no run of run_translation.py.
    """
    found = Run(run)
    for name, content in {ARGUMENTS_NAME: found.arguments, CONFIG_NAME: found.config, STATE_NAME: found.log}.items():
        if not content:
            raise InputError(
                f"{run} contains no run of run_translation.py with a checkpoint: {name} is missing or damaged."
            )
    decodes = run / DECODES_NAME
    shape = ("encoder_residual", "decoder_residual", "encoder_layers", "decoder_layers", "d_model", "encoder_ffn_dim")
    return {
        "name": run.name if run.parent.name == "runs" else f"{run.parent.name}-{run.name}",
        # not `published`, for commands with paths in a clone are made of them
        "arguments": {name: without_folders(found.arguments.get(name)) for name in (*SHOWN, *OTHER_ARGUMENTS)},
        "model": {name: found.config[name] for name in (*shape, "encoder_attention_heads", "dropout", "vocab_size")},
        "weights": found.scored,
        "scores": found.scores,
        "test_decodes": len(decodes.read_text(encoding="utf-8").splitlines()) if decodes.exists() else None,
        "profile": found.read(PROFILE_NAME),
        "curves": [{k: v for k, v in entry.items() if k != "total_flos"} for entry in found.log],
    }


# --- the page -----------------------------------------------------------------------------------------


def page(results: list[dict[str, Any]]) -> str:
    """The text of docs/results.md."""
    lines = [(DOCS / "results_intro.md").read_text(encoding="utf-8").rstrip(), "", "## Scores", ""]
    lines += _scores(results)
    for result in results:
        lines += ["", f"## {result['name']}", "", _description(result), ""]
        lines += [f"![Loss curves](figures/{result['name']}.png)", "", *_evaluations(result)]
    lines += ["", "## The deepest runs", "", *_comparison(results), "", "![Training loss](figures/depth.png)"]
    lines += ["", "## ω after profiling", "", "![ω by sub-layer](figures/omega.png)", ""]
    return "\n".join(lines)


def _scores(results: list[dict[str, Any]]) -> list[str]:
    header = "| run | split | tokenised BLEU | BLEU | vanilla | chrF2 | TER | loss | signatures |"
    rows = [header, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    for result in results:
        scores, languages = result["scores"], (result["arguments"].get("target_lang") or "").split(",")
        of_all, each = SPLITS.items(), languages if len(languages) > 1 else []
        rows_of = [*of_all, *((f"{prefix}_{name}", f"{split} {name}") for prefix, split in of_all for name in each)]
        for prefix, split in rows_of:
            if scores.keys() & {f"{prefix}_loss", f"{prefix}_bleu"}:
                names = [f"{prefix}_{name}" for name in ("moses_bleu", "bleu", "chrf", "ter", "loss")]
                names.insert(2, f"vanilla_{prefix}_bleu")
                values = [_number(scores.get(name)) for name in names]
                signatures = (scores.get(f"{prefix}_{name}_signature") for name in ("moses_bleu", "bleu"))
                cell = " ".join(f"`{table_cell(signature)}`" for signature in signatures if signature)
                rows.append(f"| {result['name']} | {split} | {' | '.join(values)} | {cell} |")
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _description(result: dict[str, Any]) -> str:
    model, arguments = result["model"], result["arguments"]
    weights, decodes = result.get("weights", []), result.get("test_decodes")
    steps = max(entry["step"] for entry in result["curves"])
    overrides = arguments["config_overrides"]
    command = f"python run_translation.py {arguments['config_name']}/recipe.json"
    command += f" --config_overrides {overrides}" if overrides else ""
    command += f" --output_dir {arguments['output_dir']}"
    settings = ", ".join(
        f"{name} {value}"
        for name in SHOWN
        if (value := arguments.get(name)) is not None
        and not (name == "per_device_train_batch_size" and arguments.get("max_tokens"))
    )
    return (
        f"`{command}`\n\n"
        f"{model['encoder_layers']}+{model['decoder_layers']} layers, encoder `{model['encoder_residual']}`, "
        f"decoder `{model['decoder_residual']}`, D {model['d_model']}, FFN {model['encoder_ffn_dim']}, "
        f"{model['encoder_attention_heads']} heads, dropout {model['dropout']}, vocabulary "
        f"{model['vocab_size']:,}. {steps:,} updates; {settings}."
        + (f" Scored: the mean of {', '.join(weights)}." if len(weights) > 1 else "")
        + (f" Decodings of the test set: {decodes}." if decodes else "")
    )


def _evaluations(result: dict[str, Any]) -> list[str]:
    log = result["curves"]
    names = [name for name in ("eval_loss", "eval_bleu") if curve(log, name)[0]]
    if not names:
        return []
    rows = [f"| update | {' | '.join(names)} |", f"| ---: |{' ---: |' * len(names)}"]
    for entry in (entry for entry in log if names[0] in entry):
        rows.append(f"| {entry['step']:,} | {' | '.join(_number(entry.get(name)) for name in names)} |")
    return rows


def _comparison(results: list[dict[str, Any]]) -> list[str]:
    rows = ["| run | first training loss | last training loss | last validation loss (nll) |"]
    rows.append("| --- | ---: | ---: | ---: |")
    for result in _deep(results):
        loss, evaluated = (curve(result["curves"], name)[1] for name in ("loss", "eval_loss"))
        ends = (loss[0], loss[-1], evaluated[-1] if evaluated else None)
        rows.append(f"| {result['name']} | {' | '.join(map(_number, ends))} |")
    return rows


def _deep(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    deepest = max(result["model"]["encoder_layers"] for result in results)
    return [result for result in results if result["model"]["encoder_layers"] == deepest]


# --- the figures --------------------------------------------------------------------------------------


def draw(results: list[dict[str, Any]], folder: Path) -> None:
    """Draw the curves of every run, the deep ones together, and ω by sub-layer."""
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        labels = {"training, smoothed labels": "loss", "validation, nll": "eval_loss"}
        series = {label: curve(result["curves"], name) for label, name in labels.items()}
        draw_lines(folder / f"{result['name']}.png", result["name"], "updates", "loss per target token", series)
    deep = {result["model"]["encoder_residual"]: curve(result["curves"], "loss") for result in _deep(results)}
    title = "The deepest runs: same seed, data and learning rate"
    draw_lines(folder / "depth.png", title, "updates", "training loss", deep)
    draw_omega(results, folder / "omega.png")


def draw_omega(results: list[dict[str, Any]], path: Path) -> None:
    """ω by sub-layer, encoders and decoders side by side, with a line for each run."""
    profiled = [result for result in results if result["profile"]]
    figure = new_figure(10, 4.4)
    for axes, stack in zip(figure.subplots(1, 2, sharey=True), STACKS, strict=True):
        omega = {result["name"]: result["profile"][stack]["omega"] for result in profiled}
        add_lines(axes, by_sublayer(omega))
        plain_axes(axes, title=f"ω that profiling found, {stack}", xlabel="sub-layer", ylabel="ω")
        axes.legend(frameon=False)
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make docs/results.md and its figures from the runs' own JSON.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="finished runs to add or renew")
    for run in parser.parse_args(argv).runs:
        result = collect(run)
        path = DOCS / "results" / f"{result['name']}.json"
        write_whole(path, json.dumps(result, indent=1) + "\n")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((DOCS / "results").glob("*.json"))]
    draw(results, DOCS / "figures")
    write_whole(DOCS / "results.md", page(results))
    print(f"{DOCS / 'results.md'}: {len(results)} runs")


if __name__ == "__main__":
    main()

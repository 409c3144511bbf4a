"""The sections of the page, and those from a run's own records: its progress, its scores, its arguments."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Seq2SeqTrainingArguments
from transformers.utils import CONFIG_NAME

from ..architecture import STACKS
from ..monitoring import perplexity
from ..run.folder import ARGUMENTS_NAME, METRICS, SPLITS, Run, is_number
from .figures import Picture
from .text import Sample


class Fact(NamedTuple):
    """A number for the top of the page."""

    name: str
    value: str
    detail: str = ""


class Table(NamedTuple):
    """Cells as text; a table with a `summary` is folded under it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: str = ""


@dataclass
class Section:
    """A part of the page: `text` says what is shown, `notes` what is missing and why, `findings` what it means."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    findings: list[tuple[str, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    alarm: bool = False


# --- how far it is --------------------------------------------------------------------------------


def status(run: Run) -> str:
    """The outcome or the progress of the run, as a sentence."""
    if run.divergence:
        return f"Diverged at update {_text(run.divergence.get('step'))}."
    if not run.state:
        return "Its folder contains no training state yet."
    if run.finished:
        return f"Finished after {run.step:,} updates."
    of = f" of {run.max_steps:,} ({run.step / run.max_steps:.0%})" if run.max_steps > 0 else ""
    return f"Not finished: update {run.step:,}{of} when it was last saved."


def model_line(run: Run) -> str:
    """A description of the model, as a sentence."""
    config = run.config
    if not config:
        return f"No {CONFIG_NAME}, which comes with the first checkpoint, says what the model is."
    names = ("encoder_layers", "decoder_layers", "d_model", "encoder_ffn_dim", "encoder_attention_heads")
    sizes = {name: _text(config.get(name)) for name in (*names, "dropout", "vocab_size")}
    systems = [str(config.get(f"{stack}_residual", config.get("model_type"))) for stack in STACKS]
    system = systems[0] if systems[0] == systems[1] else f"{systems[0]} encoder, {systems[1]} decoder"
    if run.is_profiled is False:
        system += " (ω not profiled)"
    return (
        f"{system}, {sizes['encoder_layers']}+{sizes['decoder_layers']} layers, width {sizes['d_model']}, "
        f"{sizes['encoder_ffn_dim']} in feed-forward, {sizes['encoder_attention_heads']} heads, "
        f"dropout {sizes['dropout']}, vocabulary {sizes['vocab_size']}"
    )


def facts(run: Run) -> list[Fact]:
    """The scores and sizes at the top of the page."""
    found = []
    for prefix, split in reversed(SPLITS.items()):
        if is_number(score := run.scores.get(f"{prefix}_bleu")):
            found.append(Fact(f"BLEU, {split}", f"{score:.2f}"))
    steps, bleu = run.curve("eval_bleu")
    if not found and bleu:
        found.append(Fact("BLEU, validation", f"{bleu[-1]:.2f}", f"at update {steps[-1]:,}"))
    steps, loss = run.curve("eval_loss")
    if loss:
        found.append(Fact("validation loss", f"{loss[-1]:.3f}", f"perplexity {perplexity(loss[-1]):.2f}"))
    steps, loss = run.curve("loss")
    if loss:
        found.append(Fact("training loss", f"{loss[-1]:.3f}", f"at update {steps[-1]:,}"))
    if is_number(parameters := run.results.get("parameters")):
        found.append(Fact("parameters", f"{parameters / 1e6:.2f} M"))
    if run.state:
        epoch = run.state.get("epoch")
        found.append(Fact("updates", f"{run.step:,}", f"{epoch:.1f} epochs" if is_number(epoch) else ""))
    _, speed = run.curve("tokens_per_second")
    if speed:
        found.append(Fact("speed", f"{sorted(speed)[len(speed) // 2]:,.0f}", "target tokens/s, median"))
    return found


def divergence(run: Run) -> Section:
    """The record of a run that stopped by itself."""
    record = run.divergence
    layer, checkpoint = record.get("first_non_finite"), Path(str(record.get("last_checkpoint") or "")).name
    kept = f"The weights of {checkpoint} are from before it." if checkpoint else "There is no checkpoint."
    advice = "More updates would not bring it back: try a smaller learning rate, a longer warm-up or another residual "
    text = [_text(record.get("reason")), f"{advice}system. {kept}"]
    rows = [
        ("updates done before", _text(record.get("step"))),
        ("loss of the update", _text(record.get("loss"))),
        ("loss scale of float16", _text(record.get("scale"))),
        ("first that is not finite", _text(layer) if layer else "nothing: all outputs are finite"),
    ]
    return Section("divergence", "Divergence", text, tables=[Table(("record", "value"), rows)], alarm=True)


# --- scores ---------------------------------------------------------------------------------------


def scores(run: Run) -> Section:
    """The final scores with their signatures, and the evaluations on the way."""
    section = Section("scores", "Scores")
    rows: list[Sequence[str]] = []
    for prefix, split in SPLITS.items():
        for metric, label in METRICS.items():
            name = f"{prefix}_{metric}"
            if is_number(score := run.scores.get(name)):
                vanilla = run.scores.get(f"vanilla_{name}")
                signature = run.scores.get(f"{name}_signature", "")
                rows.append((f"{label}, {split}", f"{score:.2f}", _score(vanilla), str(signature)))
    if rows:
        if len(names := run.scored) > 1:
            section.text.append(f"Scored: the mean of {len(names)} checkpoints, {names[0]} to {names[-1]}.")
        head = ("score", "model", "vanilla", "signature of sacreBLEU")
        filled = [k for k in range(len(head)) if any(row[k] for row in rows)]
        section.tables.append(Table([head[k] for k in filled], [[row[k] for k in filled] for row in rows]))
    elif run.divergence:
        section.notes.append("A run that has diverged is not scored.")
    elif run.finished:
        section.notes.append("The run was not evaluated at its end: this needs --do_eval or --do_predict.")
    else:
        section.notes.append("Final scores come when training has ended.")
    names = [name for name in METRICS if run.curve(f"eval_{name}")[0]]
    evaluations = [entry for entry in run.log if any(is_number(entry.get(f"eval_{name}")) for name in names)]
    if evaluations:
        columns = ("update", *(METRICS[name] for name in names))
        lines = [[f"{e['step']:,}", *(_score(e.get(f"eval_{name}")) for name in names)] for e in evaluations]
        summary = f"{len(lines)} evaluations on the validation set" if rows or len(lines) > 12 else ""
        section.tables.append(Table(columns, lines, summary))
    return section


# --- arguments ------------------------------------------------------------------------------------


def arguments(run: Run) -> Section:
    """The arguments of run_translation.py, the informative ones first. Secrets are left out."""
    section = Section("arguments", "Arguments")
    if not run.arguments:
        section.notes.append(f"{run.lacks(ARGUMENTS_NAME)} run_translation.py writes it; other scripts do not.")
        return section
    shown = {name: value for name, value in sorted(run.arguments.items()) if not _is_secret(name)}
    defaults = json.loads(json.dumps(Seq2SeqTrainingArguments(output_dir="-", use_cpu=True).to_dict()))
    rest = {
        name
        for name, value in shown.items()
        if (value == defaults[name] if name in defaults else value is None or value is False)
    }
    rows = [(name, str(value)) for name, value in shown.items()]
    section.text.append("Arguments that differ from Trainer's defaults, and those of the script.")
    section.tables = [
        Table(("argument", "value"), [row for row in rows if row[0] not in rest]),
        Table(("argument", "value"), [row for row in rows if row[0] in rest], f"{len(rest)} others"),
    ]
    return section


def _is_secret(name: str) -> bool:
    return re.search(r"(^|_)(token|key|secret|password)$", name, re.IGNORECASE) is not None


# --- text -----------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A readable value."""
    if not is_number(value):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _score(value: Any) -> str:
    return f"{value:.2f}" if is_number(value) else ""

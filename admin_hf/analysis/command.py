"""The command `python -m admin_hf analyze WHAT SOURCE…`: measures, and writes WHAT.png and WHAT.json."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints import write_whole
from ..profiling import ResidualProfile
from ..run.folder import PROFILE_NAME
from . import drawing
from .dependency import LayerDependency, layer_dependency
from .gradients import GradientNorms, gradient_norms
from .inputs import find_tokenizer, load_config, load_model, random_batch, run_checkpoints, text_batch
from .omega import OmegaHistory, omega_history
from .output_change import SUBLAYERS, OutputChange, output_change
from .updates import UpdateNorms, update_norms


# Pairs from the start of a text
TEXT_ROWS = 16


# --- what can be measured -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Analysis:
    """One WHAT of the command line; the arguments of `measure` are a source and the command's arguments."""

    result: Any
    measure: Callable[[str, argparse.Namespace], Any]
    draw: Callable[[Any], Any]
    help: str
    sources: str
    options: tuple[str, ...]
    joint: bool = False  # whether several sources share a figure


def _of_model(analysis: Callable[..., Any]) -> Callable[[str, argparse.Namespace], Any]:
    """Measures a model on a text, or on random tokens."""

    def measure(source: str, arguments: argparse.Namespace) -> Any:
        batch = _text(source, arguments.text) if arguments.text else None
        model = load_model(source, arguments.seed, batch)
        return analysis(model, batch or random_batch(model.config, seed=arguments.seed))

    return measure


def _output_change(source: str, arguments: argparse.Namespace) -> OutputChange:
    config, seed = load_config(source), arguments.seed
    batch = _text(source, arguments.text) if arguments.text else random_batch(config, rows=4, seed=seed)
    options = {"sublayers": arguments.sublayers, "repeats": arguments.repeats, "seed": seed}
    return output_change(config, batch, **options)


def _updates(source: str, arguments: argparse.Namespace) -> UpdateNorms:
    checkpoints = run_checkpoints(source)
    if arguments.text:
        return update_norms(checkpoints, _text(str(checkpoints[-1]), arguments.text))
    return update_norms(checkpoints, random_batch(load_config(checkpoints[-1]), seed=arguments.seed))


def _omega(source: str, arguments: argparse.Namespace) -> OmegaHistory:
    start = Path(source) / PROFILE_NAME
    history = omega_history(run_checkpoints(source), ResidualProfile.load(start) if start.exists() else None)
    if not (history.encoder.names or history.decoder.names):
        raise ValueError(f"{source} has no ω: expected a run with the residual system admin or admin_uniform.")
    return history


_MODEL = "folder or Hub id of a checkpoint, or a configuration; its model is then initialised and profiled"
_RUN = "output folder of a training run, with its checkpoints"

ANALYSES = {
    "dependency": _Analysis(
        LayerDependency,
        _of_model(layer_dependency),
        drawing.draw_dependency,
        "layer dependency: how much each branch contributes to a sub-layer's output",
        _MODEL,
        ("text", "seed"),
    ),
    "gradients": _Analysis(
        GradientNorms,
        _of_model(gradient_norms),
        drawing.draw_gradients,
        "gradient norms by sub-layer; several sources are compared in one figure",
        _MODEL,
        ("text", "seed"),
        joint=True,
    ),
    "output-change": _Analysis(
        OutputChange,
        _output_change,
        drawing.draw_output_change,
        "how much a small change of the weights changes the output, by depth",
        "configuration; the encoder's depth and the residual systems are varied",
        ("text", "seed", "sublayers", "repeats"),
    ),
    "updates": _Analysis(
        UpdateNorms,
        _updates,
        drawing.draw_updates,
        "norms of gradients and of updates, from checkpoint to checkpoint",
        _RUN,
        ("text", "seed"),
    ),
    "omega": _Analysis(OmegaHistory, _omega, drawing.draw_omega, "ω by sub-layer over training", _RUN, ()),
}

_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {
        "nargs": 2,
        "metavar": ("SRC", "TGT"),
        "help": f"files of sentences, one a line, of which the first {TEXT_ROWS} are used, with the tokenizer of "
        "SOURCE; default: random tokens",
    },
    "seed": {"type": int, "default": 0, "help": "seed of fresh weights and of random tokens; default: 0"},
    "repeats": {"type": int, "default": 5, "metavar": "N", "help": "number of models of each kind; default: 5"},
    "sublayers": {
        "type": int,
        "nargs": "+",
        "default": SUBLAYERS,
        "metavar": "N",
        "help": f"depths of the encoder, even numbers; default: {' '.join(map(str, SUBLAYERS))}",
    },
}


# --- the command line -----------------------------------------------------------------------------


def add_command(commands: Any) -> None:
    """Add `analyze` to the subparsers of a command line."""
    command = commands.add_parser(
        "analyze",
        help="measure and draw what the paper measures",
        description="Measure what the paper measures, for a fresh or a trained model. Each analysis writes a figure "
        "and its numbers as JSON, and prints its finding. No data is needed.",
        epilog="example: python -m admin_hf analyze dependency runs/en-de",
    )
    kinds = command.add_subparsers(required=True, metavar="WHAT")
    for what, analysis in ANALYSES.items():
        description = (
            f"{analysis.help[0].upper()}{analysis.help[1:]}. The paper expects: {analysis.result.EXPECTATION}"
        )
        parser = kinds.add_parser(what, help=analysis.help, description=description.replace("%", "%%"))
        parser.add_argument("sources", metavar="SOURCE", nargs="+", help=analysis.sources)
        parser.add_argument(
            "--output",
            metavar="DIR",
            type=Path,
            default=Path("analysis"),
            help=f"folder to write {what}.png and {what}.json to; default: %(default)s",
        )
        for option in analysis.options:
            parser.add_argument(f"--{option}", **_OPTIONS[option])
        parser.set_defaults(run=analyze, what=what)


def analyze(arguments: argparse.Namespace) -> None:
    """Measure every source, write figures and numbers, and print what was found.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: a source cannot be read or measured, or a file cannot be written. Files that were written
            before are complete.
    """
    drawing.new_figure()  # raises an error if matplotlib is missing
    _check_output(arguments.output)
    what, analysis, labels = arguments.what, ANALYSES[arguments.what], _labels(arguments.sources)
    if analysis.sources is not _RUN:
        for source in labels.values():
            load_config(source)
    results = {}
    for label, source in labels.items():
        results[label] = analysis.measure(source, arguments)
        print(f"{source}: {results[label].verdict()}", flush=True)
        if not analysis.joint:
            name, result = (what if len(labels) == 1 else f"{what}-{label}"), results.pop(label)
            _write(arguments.output / name, analysis.draw(result), _data(result))
    if analysis.joint:
        data = {label: _data(result) for label, result in results.items()}
        _write(arguments.output / what, analysis.draw(results), data)


def _check_output(output: Path) -> None:
    """Refuse what cannot become a folder, before anything is measured."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; name a folder to write to.")


def _labels(sources: Sequence[str]) -> dict[str, str]:
    """The sources by short names: the last parts of their paths that tell them apart."""
    paths = [Path(os.path.abspath(source)) for source in sources]  # absolute, because "." has no parts
    paths = [path.parent if path.name.endswith("config.json") else path for path in paths]
    if len(set(paths)) < len(paths):
        raise ValueError(f"A source is named twice among {', '.join(sources)}: name each once.")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["-".join(path.parts[-count:]).replace("/", "") for path in paths]
        if len(set(labels)) == len(labels):
            break
    return dict(zip(labels, sources, strict=True))


def _data(result: Any) -> dict[str, Any]:
    values = asdict(result)
    return {"expectation": result.EXPECTATION, "verdict": result.verdict(), **values.pop("stacks", {}), **values}


def _write(path: Path, figure: Any, data: Any) -> None:
    """Write the figure and the numbers, each whole or not at all; neither where one cannot be made."""
    numbers = json.dumps(data, ensure_ascii=False, allow_nan=False)
    drawing.save_figure(figure, path.with_name(f"{path.name}.png"))
    write_whole(path.with_name(f"{path.name}.json"), f"{numbers}\n")
    print(f"{path}.png, {path}.json")


# --- what is measured on --------------------------------------------------------------------------


def _text(source: str, files: Sequence[str]) -> dict[str, Tensor]:
    """The first pairs of two text files, by the tokenizer of `source`."""
    if (tokenizer := find_tokenizer(source)) is None:
        raise ValueError(f"{source} has no tokenizer that can be loaded: leave out --text.")
    sources, targets = (_first_lines(path) for path in files)
    length = min(128, load_config(source).max_position_embeddings)
    return text_batch(tokenizer, sources, targets, length)


def _first_lines(path: str) -> list[str]:
    with open(path, encoding="utf-8") as lines:
        try:
            return [line.rstrip("\n") for line in islice(lines, TEXT_ROWS)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}.") from error

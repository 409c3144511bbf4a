"""Command line of the library: `admin-hf --help`, or `python -m admin_hf --help`."""

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from . import AdminConfig, AdminForConditionalGeneration, AdminModel, check_tokenizer
from .analysis.command import add_command as add_analyze
from .analysis.inputs import find_tokenizer
from .architecture import ARCHITECTURES
from .checkpoints import check_source, explained_errors, one_line, replaced_model
from .fairseq.command import add_command as add_import
from .pretrained import load_complete
from .publishing import write_vanilla
from .report import add_command as add_report
from .run import average_checkpoints, is_checkpoint_name, last_checkpoints, saved_checkpoints
from .run.folder import read_object
from .terminal import spell_out
from .translation.command import STDIN
from .translation.command import add_command as add_translate


# Entry in the header of averaged weights: the checkpoints. A file that has it may be replaced by another average.
AVERAGED = "averaged_checkpoints"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 an input cannot be used, above 128 after a signal."""
    spell_out()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`, which has read enough; Python would report it again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Also finds FILE… after options, which argparse does by itself from Python 3.12.7 on."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if hasattr(found, "files") and not any(text.startswith("-") and text != STDIN for text in rest):
            found.files, rest = [*found.files, *rest], []
        return found, rest


def build_parser() -> argparse.ArgumentParser:
    # As it was called, so that a line of its help can be copied
    name = "admin-hf" if Path(sys.argv[0]).stem == "admin-hf" else "python -m admin_hf"
    parser: argparse.ArgumentParser = _Parser(prog=name, description="Tools for trained Admin models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "export",
        help="write the vanilla model of a trained model",
        description="Fold ω into the weights and write a vanilla Marian (or, for Pre-LN, Pegasus) checkpoint with its "
        "tokenizer. Transformers and CTranslate2 load it without this project. Before it is written, it is compared "
        "with the model. After an error, OUT is unchanged.",
        epilog="example: python -m admin_hf export runs/en-de/checkpoint-8000 en-de",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a saved model, or its id on the Hub")
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write; a vanilla model in it is replaced")
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of the vanilla weights; default: the checkpoint's",
    )
    command.set_defaults(run=export)

    command = commands.add_parser(
        "average",
        help="write the mean of a run's last checkpoints as a model",
        description="Write the mean of the weights of a run's last complete checkpoints, with configuration and "
        "tokenizer, as a model. It can be loaded, exported or trained further like any checkpoint, and usually "
        "translates better than the last checkpoint alone. This works for Trainer's checkpoints of every model. After "
        "an error, OUT is unchanged.",
        epilog="example: python -m admin_hf average runs/en-de en-de-average --last 10, and then "
        "python -m admin_hf export en-de-average en-de-vanilla",
    )
    command.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of a training run")
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write; an earlier average in it is replaced")
    command.add_argument(
        "--last", metavar="N", type=int, default=10, help="number of checkpoints, the newest ones; default: 10"
    )
    command.set_defaults(run=average)

    add_import(commands)
    add_analyze(commands)
    add_report(commands)
    add_translate(commands)
    return parser


def export(arguments: argparse.Namespace) -> None:
    """Write the vanilla checkpoint of a saved model.

    Raises:
        OSError, ValueError, RuntimeError: the checkpoint cannot be read or folded, or OUT cannot be written.
        ImportError: a package that the tokenizer needs is not installed.
    """
    checkpoint, out = arguments.checkpoint, arguments.out
    check_source(checkpoint)
    _check_out(Path(checkpoint), out)
    with explained_errors(checkpoint):
        config = AdminConfig.from_pretrained(checkpoint)
    is_base = config.architectures in (["AdminModel"], ["MarianModel"], ["PegasusModel"])
    model_class = AdminModel if is_base else AdminForConditionalGeneration
    tokenizer, problem = find_tokenizer(checkpoint), ""
    model = load_complete(model_class, checkpoint, config)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if tokenizer is not None:
        try:
            check_tokenizer(model, tokenizer)
        except ValueError as error:
            problem = str(error)
    with replaced_model(out) as folder:
        vanilla = write_vanilla(model, folder, tokenizer if not problem else None, dtype)
        if tokenizer is not None and problem:
            tokenizer.save_pretrained(folder)
    size, kind = vanilla.num_parameters(only_trainable=True) / 1e6, str(vanilla.dtype).removeprefix("torch.")
    print(f"{out}: {type(vanilla).__name__}, {size:.2f} M parameters in {kind}, verified against {checkpoint}")
    if tokenizer is None:
        print(f"{checkpoint} has no tokenizer that can be loaded: save one to {out} before you publish it.")
    if problem:
        print(f"Warning: {problem}")


def _check_out(checkpoint: Path, out: Path) -> None:
    """Refuse to replace the checkpoint itself, or a model that is not a vanilla one."""
    if out.resolve() == checkpoint.resolve():
        raise ValueError(f"{out} is the checkpoint itself: name another folder.")
    model_type = read_object(config := out / "config.json").get("model_type")
    if config.exists() and model_type not in ARCHITECTURES:
        raise ValueError(f"{out} contains a {model_type!r} model, which would be replaced: name another folder.")


def average(arguments: argparse.Namespace) -> None:
    """Write the mean of a run's last checkpoints.

    Raises:
        OSError, ValueError: there are too few checkpoints, they cannot be read or do not fit together, or OUT cannot
            be written.
        ImportError: a package that the tokenizer needs is not installed.
    """
    run, out = arguments.run_folder, arguments.out
    checkpoints = last_checkpoints(run, arguments.last)
    _check_average_out(run, out)
    tokenizer = find_tokenizer(checkpoints[-1], run)
    names = ", ".join(checkpoint.name for checkpoint in checkpoints)
    with replaced_model(out) as folder:
        weights = average_checkpoints(checkpoints)
        save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt", AVERAGED: names})
        for pattern in ("config.json", "generation_config.json", "*.py"):  # *.py: code that is saved with a model
            for path in checkpoints[-1].glob(pattern):
                shutil.copyfile(path, folder / path.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    size = sum(tensor.numel() for tensor in weights.values()) / 1e6
    print(f"{out}: the mean of {names}, {size:.2f} M weights")
    if tokenizer is None:
        print(f"{run} has no tokenizer that can be loaded: save one to {out} before you translate with it.")


def _check_average_out(run: Path, out: Path) -> None:
    """Refuse to write into a run or a checkpoint of it, and to replace anything but an earlier average."""
    if out.is_dir() and saved_checkpoints(out):
        raise ValueError(f"{out} is the folder of a run, with its checkpoints: name another folder.")
    place = out.resolve()
    if place.is_relative_to(run.resolve()) and any(map(is_checkpoint_name, place.relative_to(run.resolve()).parts)):
        raise ValueError(f"{out} is the place of a checkpoint of the run: name another folder.")
    if any((out / name).exists() for name in ("config.json", SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        try:
            with safe_open(out / SAFE_WEIGHTS_NAME, framework="pt") as weights:
                is_average = AVERAGED in (weights.metadata() or {})
        except (OSError, SafetensorError):
            is_average = False
        if not is_average:
            raise ValueError(f"{out} contains a model that is not an average of checkpoints: name another folder.")


if __name__ == "__main__":
    sys.exit(main())

"""Command line of the library: `python -m admin_hf --help`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from . import AdminConfig, AdminForConditionalGeneration, AdminModel, reparameterize
from .checkpoints import explained_errors, one_line, replaced_model
from .configuration_admin import STOCK_CONFIGS


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 an input cannot be used."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m admin_hf", description="Tools for trained Admin models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "export",
        help="make a trained model a stock Transformers checkpoint",
        description="Fold ω away and write a stock Marian (or, for Pre-LN, Pegasus) checkpoint with its tokenizer, "
        "which Transformers and CTranslate2 load without this project. It is verified against the model before it is "
        "written; an error leaves OUT as it was.",
        epilog="example: python -m admin_hf export runs/en-de/checkpoint-8000 en-de-vanilla --dtype float16",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a saved model, or its id on the Hub")
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write; an earlier export in it is replaced")
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the exported weights; default: the checkpoint's",
    )
    command.set_defaults(run=export)
    return parser


def export(arguments: argparse.Namespace) -> None:
    """Write the vanilla checkpoint of a saved model.

    Raises:
        OSError, ValueError, RuntimeError: the checkpoint cannot be read or folded, or OUT not be written.
    """
    checkpoint, out = arguments.checkpoint, arguments.out
    if not Path(checkpoint).is_dir() and (checkpoint.count("/") > 1 or checkpoint.startswith((".", "/"))):
        raise NotADirectoryError(f"There is no folder {checkpoint}.")
    _check_out(Path(checkpoint), out)
    with explained_errors(checkpoint):
        config = AdminConfig.from_pretrained(checkpoint)
    is_base = config.architectures in (["AdminModel"], ["MarianModel"], ["PegasusModel"])
    model_class = AdminModel if is_base else AdminForConditionalGeneration
    model, info = model_class.from_pretrained(checkpoint, config=config, output_loading_info=True)
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        kind = "lacks" if info["missing_keys"] else "has no place for"
        raise ValueError(f"{checkpoint} {kind} {min(wrong)}: config.json and weights do not belong together.")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    folded = reparameterize(model, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception:  # there is none, or a stranger's
        tokenizer = None
    with replaced_model(out) as folder:
        folded.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    size, kind = folded.num_parameters(only_trainable=True) / 1e6, str(folded.dtype).removeprefix("torch.")
    print(f"{out}: {type(folded).__name__}, {size:.2f} M parameters in {kind}, verified against {checkpoint}")
    if tokenizer is None:
        print(f"{checkpoint} has no tokenizer that can be loaded: save one to {out} before you publish it.")


def _check_out(checkpoint: Path, out: Path) -> None:
    """Refuse to replace anything but an earlier export."""
    if out.resolve() == checkpoint.resolve():
        raise ValueError(f"{out} is the checkpoint itself: name another folder.")
    if not (there := out / "config.json").exists():
        return
    try:
        model_type = json.loads(there.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError):
        model_type = None
    if model_type not in STOCK_CONFIGS:
        raise ValueError(f"{out} holds a {model_type!r} model, which the export would replace: name another folder.")


if __name__ == "__main__":
    sys.exit(main())

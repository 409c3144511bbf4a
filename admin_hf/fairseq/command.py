"""The command `python -m admin_hf import CHECKPOINT OUT --dict DICT`: converts a fairseq checkpoint."""

import argparse
from pathlib import Path

import torch
from transformers.models.marian.modeling_marian import MarianMTModel

from ..checkpoints import has_weights, replaced_model
from ..publishing import write_vanilla
from .conversion import LACKING_BIAS, convert
from .reading import FairseqCheckpoint, read_checkpoint
from .vocabulary import read_codes, read_dictionary


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "import",
        help="convert a checkpoint of fairseq or Transformer-Clinic to an Admin or vanilla model",
        description="Convert a translation model of fairseq or of Transformer-Clinic, the code of Admin's authors. "
        "The result is an Admin model, to train further, translate with or export. With --vanilla it is a model that "
        "stock Transformers and CTranslate2 load. It computes the same. fairseq is not needed, and no code of the "
        "file runs. After an error, OUT is unchanged.",
        epilog="example: python -m admin_hf import checkpoint_best.pt en-de --dict dict.en.txt --bpe-codes code",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint file written by fairseq")
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not contain a model")
    command.add_argument(
        "--dict",
        dest="dictionaries",
        metavar="DICT",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        help="dict.xx.txt of fairseq-preprocess: one, or the source's and then the target's",
    )
    command.add_argument(
        "--bpe-codes",
        metavar="CODES",
        type=Path,
        help="codes of subword-nmt, version 0.2: the tokenizer's input is then words; without them it is text that is "
        "already split into sub@@ words",
    )
    command.add_argument(
        "--vanilla", action="store_true", help="fold ω into the weights: write a model for stock Transformers"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the model of a checkpoint.

    Raises:
        OSError, ValueError, RuntimeError: a file cannot be read, the model cannot be converted, or OUT cannot be
            written.
    """
    out: Path = arguments.out
    if (out / "config.json").exists() or has_weights(out):
        raise ValueError(f"{out} already contains a model: name another folder.")
    if len(arguments.dictionaries) > 2:
        raise ValueError(f"--dict names {len(arguments.dictionaries)} files; expected the source's and the target's.")
    dictionaries = [read_dictionary(path) for path in arguments.dictionaries]
    merges = read_codes(arguments.bpe_codes) if arguments.bpe_codes else None
    checkpoint = read_checkpoint(arguments.checkpoint)
    _check_order(checkpoint, arguments.dictionaries)
    model, tokenizer = convert(checkpoint, dictionaries[0], dictionaries[-1], merges)
    config = model.config
    if arguments.vanilla:
        written = write_vanilla(model, out, tokenizer, torch.float32)
    else:
        written = model.float()
        with replaced_model(out) as folder:
            written.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    print(
        f"{out}: {type(written).__name__}, {config.encoder_layers} encoder layers ({config.encoder_residual}) and "
        f"{config.decoder_layers} decoder layers ({config.decoder_residual}), {config.vocab_size:,} entries, "
        f"{written.num_parameters(only_trainable=True) / 1e6:.2f} M parameters in float32, from {arguments.checkpoint}"
    )
    print("Not converted: the optimiser's state and what fairseq logged.")
    if lacking := int(model.final_logits_bias.eq(LACKING_BIAS).sum()):
        print(f"{lacking} of the entries are not in the target's dictionary: they are almost never predicted.")
    if isinstance(written, MarianMTModel):
        print(
            "Its positions are fairseq's, in the file of its weights. Stock Transformers and CTranslate2 read them, "
            "but a stock MarianMTModel that is saved again loses them without a warning: copy the folder instead."
        )


def _check_order(checkpoint: FairseqCheckpoint, dictionaries: list[Path]) -> None:
    """Refuse two dictionaries whose names say that they are in the wrong order."""
    names = [f"dict.{checkpoint.option(f'{side}_lang', '')}.txt" for side in ("source", "target")]
    if [path.name for path in dictionaries] == names[::-1] and names[0] != names[1]:
        raise ValueError(f"The checkpoint goes from {names[0]} to {names[1]}: name the source's dictionary first.")

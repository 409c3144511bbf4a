"""The command `python -m admin_hf translate MODEL [FILE…]`."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checkpoints import whole_file
from ..parallel_text import decoded_lines, read_lines
from .lines import BATCH_SIZE, BEAMS, LineTranslator, Translation
from .loading import load_engine


# Number of batches that are read and sorted by length together
WINDOW = 100

STDIN = "-"


def add_command(commands: Any) -> None:
    """Add `translate` to the subparsers of a command line."""
    command = commands.add_parser(
        "translate",
        help="translate text, line by line",
        description="Translate files, or standard input, line by line. Line n of the output is the translation of "
        "line n of the input, and a blank line stays blank. Names of special tokens in the text are read as text, "
        "except for a language code of the model at the start of a line, such as >>de<<. Lines that are too long for "
        "the model are cut; standard error says which.",
        epilog="example: python -m admin_hf translate runs/en-de test.en --output test.de",
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a Transformers model (with ω or vanilla), of a CTranslate2 model, or of a run (then its "
        "vanilla model is used); or an id on the Hub",
    )
    command.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help=f"text in UTF-8, one sentence per line; default: standard input, {STDIN}",
    )
    command.add_argument("--output", metavar="FILE", type=Path, help="default: standard output")
    command.add_argument(
        "--ensemble",
        metavar="MODEL",
        action="append",
        default=[],
        help="another model with the same vocabulary that translates together with MODEL: the next token is chosen by "
        "the mean of their probabilities; can be given several times",
    )
    command.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="folder or Hub id of the tokenizer, and for CTranslate2 also of the limits and generation settings; "
        "default: MODEL",
    )
    command.add_argument(
        "--beams",
        metavar="N",
        type=int,
        help=f"number of beams; 1 is greedy search; default: the model's generation settings, else {BEAMS}",
    )
    command.add_argument(
        "--length_penalty",
        metavar="X",
        type=float,
        help="the search ranks by log-probability / tokens^X; default: the model's generation settings, else 1",
    )
    command.add_argument(
        "--nbest",
        metavar="N",
        type=int,
        help="write N lines for each input line, the best first: its number, score and translation, separated by "
        "tabs. The score is log p / tokens^length_penalty. With a length penalty of 1 it is the mean of the natural "
        "logarithms of the tokens' probabilities, with 0 their sum. The end of the sentence counts as a token, those "
        "of --prefix do not",
    )
    command.add_argument("--prefix", metavar="TEXT", default="", help="forced beginning of every translation")
    command.add_argument(
        "--source_prefix",
        metavar="TEXT",
        default="",
        help="text to put before every line; control tokens in it, such as >>de<<, are read as control tokens",
    )
    command.add_argument(
        "--max_length",
        metavar="N",
        type=int,
        help="tokens of the longest translation, including the decoder's start token; default: the model's generation "
        "settings, else the longest that it accepts",
    )
    command.add_argument(
        "--batch_size",
        metavar="N",
        type=int,
        default=BATCH_SIZE,
        help="number of lines in a batch; batches are sorted by length; default: %(default)s",
    )
    command.add_argument("--device", help="such as cpu or cuda:1; default: a GPU if there is one")
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "int8"),
        help="dtype of the computation; int8 only for CTranslate2; default: that of the stored weights",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Translate all lines and write them, some thousands at a time.

    Raises:
        OSError, ValueError, RuntimeError, ImportError: a model cannot be loaded, a file cannot be read or is not text,
            or the output cannot be written. `--output` is then unchanged.
    """
    files, output = arguments.files or [STDIN], arguments.output
    if output is not None and output.exists() and not output.is_file():
        raise ValueError(f"{output} is not a file: name one to write to.")
    total = _count(files)
    engine, tokenizer = load_engine(
        [arguments.model, *arguments.ensemble], arguments.tokenizer, arguments.device, arguments.dtype
    )
    options = ("beams", "length_penalty", "nbest", "prefix", "source_prefix", "max_length", "batch_size")
    translator = LineTranslator(engine, tokenizer, **{name: getattr(arguments, name) for name in options})
    is_typed = files == [STDIN] and sys.stdin.isatty()  # then each line waits for its translation
    window = 1 if is_typed else WINDOW * arguments.batch_size
    lines = chain.from_iterable(map(_lines, files))
    with ExitStack() as stack:
        # Bytes, since a translation is UTF-8 whatever the terminal's encoding is
        file = sys.stdout.buffer if output is None else stack.enter_context(whole_file(output))
        # None disables it unless it is on a terminal
        bar = stack.enter_context(tqdm(total=total, unit=" lines", disable=is_typed or None))
        while some := list(islice(lines, window)):
            first = translator.count + 1
            for number, found in enumerate(translator(some, bar.update), first):
                file.write("".join(_output(number, found, arguments.nbest)).encode())
            file.flush()


def _output(number: int, found: list[Translation], nbest: int | None) -> Iterator[str]:
    for text, score in found:
        yield f"{text}\n" if nbest is None else f"{number}\t{score:.6f}\t{text}\n"


def _count(files: list[str]) -> int | None:
    """The number of all lines, which are read to see that they are text; None where they can be read only once."""
    for file in files:
        if file != STDIN and not os.path.exists(file):
            raise FileNotFoundError(f"There is no file {file}.")
        if os.path.isdir(file):
            raise IsADirectoryError(f"{file} is a folder: name text files after the model.")
    if not all(map(os.path.isfile, files)):
        return None
    return sum(1 for file in files for _ in read_lines(Path(file)))


def _lines(file: str) -> Iterator[str]:
    return decoded_lines(sys.stdin.buffer, "standard input") if file == STDIN else read_lines(Path(file))

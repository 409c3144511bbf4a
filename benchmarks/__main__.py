"""Runs the benchmarks, each into docs/performance/NAME.json, and makes docs/performance.md.

python -m benchmarks                      all that can run here
python -m benchmarks omega --rounds 15    one of them
python -m benchmarks gpu --parts check    what is measured on a GPU, of that the checks
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from admin_hf.terminal import spell_out

from . import BENCHMARKS, load, page
from .record import Missing, Settings, write
from .systems import quiet


def build_parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument(
        "--threads", type=int, default=defaults.threads, help="threads of every system (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=defaults.rounds, help="turns of each system (default: %(default)s)"
    )
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR"}
    parser.add_argument("--data", default=defaults.data, **folder, help="Multi30k (default: %(default)s)")
    parser.add_argument(
        "--checkpoint", default=defaults.checkpoint, **folder, help="model to decode with (default: %(default)s)"
    )
    parser.add_argument("--output", **folder, help="write NAME.json to DIR, and no page (default: docs/performance)")
    parser.add_argument(
        "--seconds", type=float, default=defaults.seconds, help="time limit of `gpu` (default: %(default)s)"
    )
    parser.add_argument(
        "--parts", nargs="+", default=(), metavar="TEXT", help="measure the parts of `gpu` whose names contain TEXT"
    )
    return parser


def main(argv: Sequence[str] | None = None, docs: Path = page.DOCS) -> int:
    """Run benchmarks, write to `docs`, and return the exit code, not 0 if one cannot run that was asked for."""
    spell_out()
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in BENCHMARKS:
            parser.error(f"{name!r} is no benchmark; expected one of {', '.join(BENCHMARKS)}.")
    for option in ("threads", "rounds"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option} {getattr(arguments, option)} must be at least 1.")
    given = {name: value for name, value in vars(arguments).items() if name != "names"}
    settings = Settings(**given | {"output": arguments.output or docs / "performance"})
    quiet()
    code = 0
    for name in arguments.names or BENCHMARKS:
        try:
            results = load(name).measure(settings)
            for each in results if isinstance(results, Iterator) else [results]:
                write(settings.output / f"{name}.json", each)  # what is there when it is killed, is kept
        except Missing as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            code = max(code, error.code)
    if arguments.output is None:
        try:
            page.main(docs)
        except ImportError as error:  # a machine with a GPU need not have all that the others measure
            print(f"The page is left as it is: {error}. Make it by `python -m benchmarks.page`.", file=sys.stderr)
    return code if arguments.names else 0


if __name__ == "__main__":
    sys.exit(main())

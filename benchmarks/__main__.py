"""Runs the benchmarks, each into docs/performance/NAME.json, and makes docs/performance.md.

python -m benchmarks                      all that can run here
python -m benchmarks omega --rounds 15    one of them
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import BENCHMARKS, load, report
from .record import Missing, Settings, write
from .systems import quiet


def build_parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--threads", type=int, default=defaults.threads, help="of every system (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="turns of each (default: %(default)s)")
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR"}
    parser.add_argument("--data", default=defaults.data, **folder, help="Multi30k (default: %(default)s)")
    parser.add_argument(
        "--checkpoint", default=defaults.checkpoint, **folder, help="model to decode with (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None, docs: Path = report.DOCS) -> int:
    """Run benchmarks, write to `docs`, and return the exit code: 1 if one that was asked for cannot run."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in BENCHMARKS:
            parser.error(f"{name!r} is no benchmark; expected one of {', '.join(BENCHMARKS)}.")
    for option in ("threads", "rounds"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option} {getattr(arguments, option)} must be at least 1.")
    settings = Settings(arguments.threads, arguments.rounds, arguments.data, arguments.checkpoint)
    quiet()
    missing = False
    for name in arguments.names or BENCHMARKS:
        try:
            results = load(name).measure(settings)
        except Missing as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            missing = True
            continue
        write(docs / "performance" / f"{name}.json", results)
    report.main(docs)
    return int(missing and bool(arguments.names))


if __name__ == "__main__":
    sys.exit(main())

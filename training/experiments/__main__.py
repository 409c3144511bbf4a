"""Runs the paper's tables and grids: `python -m training.experiments --help`."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import TextIOWrapper

from ..errors import InputError
from .plan import EXPERIMENTS, planned
from .records import kept, state
from .runner import TO_DO, Runner
from .scales import SCALES, PlannedRun, Scale, settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run experiments; returns 0, 1 if a run ended in an error, 2 for unusable input, 130 or 143 if stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # admin_hf.terminal spells better, but takes seconds to load
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    arguments = parse(argv)
    runs = plan(arguments)
    for name, scale in arguments.scales.items():
        print(announce(name, scale, planned(name, scale, arguments.seeds)), flush=True)
    left = [run for run in runs.values() if state_of(run) in TO_DO]
    hours = sum(run.seconds for run in left) / 3600 / arguments.jobs
    if runs:
        print(f"To run: {len(left)} of {len(runs)}, {arguments.jobs} at a time; expected wall time {duration(hours)}.")
    if arguments.list:
        print("\n".join(f"{state_of(run):>9}  {run.name}" for run in runs.values()))
        return 0
    return run_all(arguments, runs, left)


def plan(arguments: argparse.Namespace) -> dict[str, PlannedRun]:
    """The runs in the order in which they start. Those of `converged` are known when `dropout` is done."""
    runs: dict[str, PlannedRun] = {}
    for name, scale in arguments.scales.items():
        before = kept(*EXPERIMENTS[name].shares_with, name) if arguments.missing else {}
        done = {run for run, record in before.items() if not record.begun}
        runs |= {run.name: run for run in planned(name, scale, arguments.seeds) if run.name not in done}
    return dict(sorted(runs.items(), key=lambda item: item[1].order))


def run_all(arguments: argparse.Namespace, runs: dict[str, PlannedRun], left: Sequence[PlannedRun]) -> int:
    """Do what is `left` and make the page; returns what `main` does."""
    # Transformers and matplotlib take seconds to load
    from .dropout_losses import measure_dropout_losses
    from .page import update
    from .preparation import prepare

    seeds = arguments.seeds or ()

    def after(run: PlannedRun) -> Iterable[PlannedRun]:
        measure_dropout_losses(run)
        update(seeds)
        return plan(arguments).values()

    runner = Runner(arguments.jobs, after)
    try:
        for run in {run.arguments["tokenizer_name"]: run for run in left}.values():
            prepare(run.arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runner.run(runs.values())
    update(seeds)
    if runner.failures:
        print(f"Failed with an error: {', '.join(runner.failures)}.", file=sys.stderr)
    if runner.stopped is not None:
        print("Stopped. The same command continues from there.")
        return 128 + runner.stopped
    return 1 if runner.failures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.experiments",
        description="Run the named experiments, or none, and make docs/experiments.md from all records. A finished "
        "run is not repeated, and a stopped one is resumed. Runs are in runs/experiments/.",
        epilog="experiments: " + "; ".join(f"{name}: {item.title}" for name, item in EXPERIMENTS.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        help="default: the first of each experiment: tiny, Multi30k at width 128, for dropout and converged; "
        "small, the same with 2-2 layers, for recipes; cpu, Multi30k at width 64, for the others",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: those of each experiment")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of parallel runs; default: 1")
    parser.add_argument(
        "--missing", action="store_true", help="leave out runs that docs/experiments/ already records as ended"
    )
    parser.add_argument(
        "--list", "--dry-run", action="store_true", help="only list what would run, and how far each run is"
    )
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.names) - set(EXPERIMENTS):
        parser.error(f"There is no experiment {min(unknown)!r}; choose from {', '.join(EXPERIMENTS)}.")
    for name in arguments.names:
        if arguments.scale and arguments.scale not in (scales := EXPERIMENTS[name].scales):
            parser.error(f"{name} is not planned at scale {arguments.scale}; choose from {', '.join(scales)}.")
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs} must be at least 1.")
    arguments.scales = {name: SCALES[arguments.scale or EXPERIMENTS[name].scales[0]] for name in arguments.names}
    return arguments


def announce(name: str, scale: Scale, runs: Sequence[PlannedRun]) -> str:
    """What an experiment is, in two lines: runs, sizes and expected time, done or not."""
    if not runs:
        return f"{name} ({EXPERIMENTS[name].title}), scale {scale.name}: its runs are known when dropout is chosen"
    states = [state_of(run) for run in runs]
    done = sum(state in ("finished", "diverged") for state in states)
    hours = sum(run.seconds for run in runs) / 3600
    return "\n".join(
        [
            f"{name} ({EXPERIMENTS[name].title}), scale {scale.name}: {len(runs)} runs, {done} of them done, "
            f"{duration(hours)} of one processor in all",
            f"  {settings(runs)}",
        ]
    )


def state_of(run: PlannedRun) -> str:
    """The state of a run; "other" where its folder holds a run of other arguments."""
    try:
        return state(run)
    except InputError:
        return "other"


def duration(hours: float) -> str:
    """Hours in the unit that fits.

    >>> duration(0.5), duration(7.25), duration(288)
    ('30 min', '7.2 h', '12.0 days')
    """
    if hours < 2:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


if __name__ == "__main__":
    sys.exit(main())

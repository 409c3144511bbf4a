"""One page about a training run: `python -m admin_hf report RUN` writes it. It can be opened without a network.

It is made from the run's own files, which are not trusted: all text is escaped, secrets are left out, no code of a
checkpoint runs, and the page refers to nothing outside itself.
"""

import argparse
import os
from pathlib import Path

from ..checkpoints import write_whole


PAGE_NAME = "report.html"


def write_report(run: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Write the page of a run that is still training, has finished or has diverged.

    If the run lacks the data for a part of the page, the part says so. The run's folder is only read.

    Args:
        run: output folder of run_translation.py, or of any Trainer.
        output: the file to write; default: `report.html` in the run's folder.

    Returns:
        The file, which is written completely or not at all.

    Raises:
        NotADirectoryError: there is no such folder.
        IsADirectoryError: `output` is a folder.
        ValueError: the folder contains no files of a run.
        ImportError: matplotlib or Jinja2 is not installed.

    Example:

    ```python
    write_report("runs/en-de")  # runs/en-de/report.html
    ```
    """
    from ..run.folder import Run

    folder = Path(run)
    path = Path(output) if output is not None else folder / PAGE_NAME
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {folder}.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write the page to.")
    found = Run(folder)
    if not (found.arguments or found.state or found.config or found.scores or found.divergence):
        raise ValueError(
            f"{folder} contains no run: expected a Trainer's output folder, with checkpoints such as checkpoint-500."
        )
    try:
        from .page import render
    except ImportError as error:
        raise ImportError(f"A report needs matplotlib and Jinja2 ({error}): install admin-hf[analysis].") from error
    write_whole(path, render(found))
    return path


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `report` to the command line."""
    command = commands.add_parser(
        "report",
        help="make one page about a training run",
        description="Write a page about a run that is still training, has finished or has diverged: scores, curves, "
        "translations, ω, layer dependency, gradients and variances by sub-layer, arguments. It is one HTML file that "
        "needs no network and can be shown to others.",
        epilog="example: python -m admin_hf report runs/en-de",
    )
    command.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of a training run")
    command.add_argument(
        "--output", metavar="FILE", type=Path, help=f"the file to write; default: {PAGE_NAME} in the run's folder"
    )
    command.set_defaults(run=report)


def report(arguments: argparse.Namespace) -> None:
    """Write the page of a run.

    Raises:
        OSError, ValueError, ImportError: as [`write_report`].
    """
    path = write_report(arguments.run_folder, arguments.output)
    print(f"{path}: {path.stat().st_size / 1e3:,.0f} kB")

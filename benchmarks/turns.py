"""Systems in processes of their own that take turns, A B A B …, so that what else the machine does meets all of them.

A system is a function of one argument, its [`Turns`]. It builds what it measures, warms up, and calls `turns.next()`
whenever a turn is over, which returns when it has the next one. All others wait meanwhile.
"""

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm


System = Callable[["Turns"], None]  # can be pickled, such as a `functools.partial` of a module's function
Measured = dict[str, Any]

STATUS = Path("/proc/self/status")


class Turns:
    """A system's side of the turns."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._imports = resident_bytes()
        self._start: float | None = None

    def next(self, **facts: Any) -> None:
        """End the turn under way, wait for the next one and begin it. Before the first, this says "ready".

        Args:
            facts: what the turn computed, or what is to be known before the first one: plain data.
        """
        seconds = None if self._start is None else time.perf_counter() - self._start
        memory = {"peak_bytes": peak_bytes(), "import_bytes": self._imports}
        self._pipe.send({"seconds": seconds, "memory": memory, "facts": facts})
        if not self._pipe.recv():
            raise Over
        self._start = time.perf_counter()


class WorkerError(RuntimeError):
    """A system's process failed; the message is its traceback."""


class Over(Exception):
    """There are no more turns."""


def take_turns(
    systems: Mapping[str, System],
    rounds: int,
    threads: int,
    title: str = "",
    check: Callable[[dict[str, Any]], None] = lambda ready: None,
    variables: Mapping[str, dict[str, str]] | None = None,
) -> dict[str, Measured]:
    """Run the systems, each in a fresh process with `threads` threads, for `rounds` rounds of a turn each.

    Args:
        title: of the progress bar.
        check: is called before the first turn with what every system says then, and may raise.
        variables: of the environment, which the process of a system has besides this one's.

    Returns:
        For each system: `seconds`, a list with an entry for each round; `peak_bytes`, the process's largest resident
        memory, and `import_bytes`, what it had before the system was built; `ready`, the facts before the first turn;
        and a list for each fact that turns have.

    Raises:
        WorkerError: a process failed. None is left then.
    """
    measured: dict[str, Measured] = {}
    with _started(systems, threads, variables or {}) as workers:
        for name, worker in workers.items():
            measured[name] = {"ready": _receive(*worker)["facts"], "seconds": []}
        check({name: values["ready"] for name, values in measured.items()})
        for name in tqdm([*systems] * rounds, desc=title, unit="turn"):
            process, pipe = workers[name]
            with contextlib.suppress(OSError):  # a process that is gone is reported by what it does not answer
                pipe.send(True)
            result = _receive(process, pipe)
            measured[name]["seconds"].append(result["seconds"])
            measured[name] |= result["memory"]
            for fact, value in result["facts"].items():
                measured[name].setdefault(fact, []).append(value)
    return measured


@contextlib.contextmanager
def _started(
    systems: Mapping[str, System], threads: int, variables: Mapping[str, dict[str, str]]
) -> Iterator[dict[str, tuple[Any, Connection]]]:
    """The process of each system and the pipe to it; within this they live."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    try:
        for name, system in systems.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, threads, system), name=name)
            with patch.dict(os.environ, variables.get(name, {})):
                process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            workers[name] = process, ours
        yield workers
        for process, pipe in workers.values():
            with contextlib.suppress(OSError):
                pipe.send(False)
            process.join(timeout=10)
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.kill()  # a trainer would save a checkpoint when it is terminated
            process.join()


def _receive(process: Any, pipe: Connection) -> dict[str, Any]:
    try:
        message = pipe.recv()
    except (EOFError, OSError):
        process.join()
        raise WorkerError(f"The process of {process.name!r} died with exit code {process.exitcode}.") from None
    if isinstance(message, str):
        raise WorkerError(f"The process of {process.name!r} failed:\n{message}")
    return message


def _work(pipe: Connection, threads: int, system: System) -> None:
    multiprocessing.set_start_method(None, force=True)  # of DataLoader's workers: as in a command, not spawned too
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # what a training run prints
        try:
            system(Turns(pipe))
        except (Over, EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
            pass  # the turns are over, or whoever gave them is gone
        except BaseException:
            pipe.send(traceback.format_exc())


def peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    if STATUS.exists():
        return _status("VmHWM")
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def resident_bytes() -> int:
    """The resident memory of this process; its peak so far where the system does not say it."""
    return _status("VmRSS") if STATUS.exists() else peak_bytes()


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])

"""Runs as separate processes of run_translation.py, some at a time, which go on where they were stopped."""

import fcntl
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import IO, Any

from ..errors import InputError
from .records import SESSIONS_NAME, state
from .scales import REPO, PlannedRun


# What does not change a result. A second `--tokenizer_name` would; these say how to run and what to show.
FLAGS = {"report_to": "none", "disable_tqdm": True}
LOG_LINES = 12
TO_DO = ("new", "begun", "trained")
CODE = ("admin_hf", "training", "hub_configs", "run_translation.py")


class Runner:
    """Runs what is not done.

    Args:
        jobs: runs at a time. Each gets its share of the cores, or OMP_NUM_THREADS, and one GPU where there are GPUs.
        after: is called when a run is done; returns the runs that are to be done now, to which it may have added.

    Attributes:
        failures: names of runs that ended in an error, with the last lines of their logs. Divergence is none.
        stopped: the signal that ended it all, if one did.
    """

    def __init__(self, jobs: int = 1, after: Callable[[PlannedRun], Iterable[PlannedRun]] = lambda run: ()) -> None:
        self.jobs = jobs
        self.after = after
        self.failures: dict[str, str] = {}
        self.stopped: signal.Signals | None = None
        self._waiting: list[PlannedRun] = []
        self._queued: set[tuple[str, bool]] = set()  # names, and whether to translate too
        self._running: dict[int, tuple[subprocess.Popen, PlannedRun, str]] = {}  # by slot, with the state before
        self._gpus = _gpus()

    def run(self, runs: Iterable[PlannedRun]) -> None:
        """Start the runs in their order and wait for them; a signal goes on to them, and they save checkpoints."""
        self._queue(runs)
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._running or (self._waiting and self.stopped is None):
                free = [slot for slot in range(self.jobs) if slot not in self._running]
                if self._waiting and free and self.stopped is None:
                    self._start(self._waiting.pop(0), free[0])
                else:
                    time.sleep(0.2)
                    self._collect()
        finally:
            for process, *_ in self._running.values():  # only after an error of ours
                process.terminate()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _queue(self, runs: Iterable[PlannedRun]) -> None:
        new = [run for run in runs if (run.name, bool(run.scoring)) not in self._queued]
        self._queued |= {(run.name, bool(run.scoring)) for run in new}
        self._waiting += filter(self._is_to_do, new)
        self._waiting.sort(key=lambda run: run.order)

    def _is_to_do(self, run: PlannedRun) -> bool:
        try:
            return state(run) in TO_DO
        except InputError as error:
            self._fail(run, str(error))
            return False

    def _start(self, run: PlannedRun, slot: int) -> None:
        log = _locked(log_path(run))
        if log is None:
            self._fail(run, "another process is at it")
            return
        with log:  # the child inherits it, and with it the lock
            if not self._is_to_do(run):  # another process has done it meanwhile
                return
            what = {"new": "starts", "begun": "goes on", "trained": "translates"}[how := state(run)]
            print(f"{_clock()} {run.name} {what}", flush=True)
            environment = self._environment(slot)
            _note_session(run, environment)
            changes = run.scoring if how == "trained" else {}
            process = subprocess.Popen(
                [sys.executable, "-m", run.program, *flags(run.arguments | changes | FLAGS)],
                cwd=REPO,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C comes from us: a second signal would end it without a checkpoint
            )
        self._running[slot] = process, run, how
        if self.stopped is not None:  # while it was started
            process.send_signal(self.stopped)

    def _environment(self, slot: int) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": str(max(1, cores // self.jobs)), **os.environ}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return environment

    def _collect(self) -> None:
        for slot, (process, run, before) in list(self._running.items()):
            if (code := process.poll()) is None:
                continue
            del self._running[slot]
            if code in (0, 3) and (how := state(run)) in ("finished", "diverged"):
                print(f"{_clock()} {run.name} {how}", flush=True)
                self._queue(self.after(run))
            elif code == 0 and how == "trained" and before != "trained":
                self._waiting.insert(0, run)  # to translate
            elif self.stopped is not None:
                print(f"{_clock()} {run.name} stopped", flush=True)
            else:
                lines = log_path(run).read_text(encoding="utf-8", errors="replace").splitlines()
                self._fail(run, "\n".join([f"exit code {code}; {log_path(run)} ends:", *lines[-LOG_LINES:]]))

    def _fail(self, run: PlannedRun, why: str) -> None:
        self.failures[run.name] = why
        print(f"{_clock()} {run.name} failed: {why}", file=sys.stderr, flush=True)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.Signals(number)
        print(f"{self.stopped.name} received: the runs under way save a checkpoint.", file=sys.stderr, flush=True)
        for process, *_ in self._running.values():
            process.send_signal(number)


def flags(arguments: dict[str, Any]) -> list[str]:
    """Arguments as run_translation.py takes them."""
    return [text for name, value in arguments.items() if value is not None for text in (f"--{name}", str(value))]


def log_path(run: PlannedRun) -> Path:
    """What a run prints, all its sessions, beside its folder."""
    return run.folder.parent / f"{run.folder.name}.log"


def _note_session(run: PlannedRun, environment: dict[str, str]) -> None:
    """Add what computes a session of a run to its folder: commit, processor, threads, PyTorch."""
    from admin_hf.trainer_card import processor_name  # its package takes seconds, and only running needs it

    session = {
        "commit": _commit(),
        "processor": processor_name(),
        "threads": int(environment["OMP_NUM_THREADS"]),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / SESSIONS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(session) + "\n")


def _commit() -> str | None:
    """The commit of the code, marked where the code has changed since; None outside of a clone."""
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", *CODE],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changed else commit


def _locked(path: Path) -> IO[str] | None:
    """The file, to append to, locked as long as this or a child process has it open; None if another one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _gpus() -> list[str]:
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    import torch  # takes seconds, and only running needs it

    return [str(i) for i in range(torch.cuda.device_count())]


def _clock() -> str:
    return time.strftime("%H:%M:%S")

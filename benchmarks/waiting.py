"""How long OpenMP's threads spin before they sleep."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from . import systems
from .record import Settings, conditions, cost
from .systems import DTYPES, SHAPES, Shape
from .turns import take_turns


TITLE = "Waiting threads"
ABOUT = (
    "Between two loops OpenMP's threads spin (stay busy) for a while, so that the next loop starts at once, and then "
    "sleep. If other work runs on the same cores, threads that spin take time from those that they wait for. The page "
    "gives a training step of the tiny shape where they spin for fewer turns (`GOMP_SPINCOUNT`; run_translation.py "
    "sets 10,000), or sleep at once (`OMP_WAIT_POLICY=PASSIVE`). It is in units of a step with the defaults of GNU's "
    "OpenMP, both alone and next to as many busy processes as threads:"
)
# Ends with this process, however that ends
SPIN = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
DEFAULT = "as it is"
POLICIES: dict[str, dict[str, str]] = {
    "10,000 turns": {"GOMP_SPINCOUNT": "10000"},
    "1,000 turns": {"GOMP_SPINCOUNT": "1000"},
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    DEFAULT: {},
}
QUIET = 1.03  # target of what run_translation.py takes


def measure(
    settings: Settings,
    shape: Shape = SHAPES["tiny"],
    dtypes: Sequence[str] = DTYPES,
    policies: Mapping[str, dict[str, str]] = POLICIES,
) -> dict[str, Any]:
    figures, measured = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for machine, busy in (("quiet", 0), ("busy", settings.threads)):
            measured[machine] = {}
            for dtype in dtypes:
                step = partial(systems.ours, shape=shape, dtype=dtype, folder=Path(folder))
                variables = {f"{policy}, {dtype}": values for policy, values in policies.items()}
                title = f"waiting, {machine}, {dtype}"
                with busy_processes(busy), no_policy():
                    turns = take_turns(
                        dict.fromkeys(variables, step), settings.rounds, settings.threads, title, variables=variables
                    )
                *others, default = variables
                for name in others:
                    target = {"at_most": QUIET} if name == others[0] and not busy else {}
                    figures.append(cost(machine, turns, name, default, "updates", **target))
                measured[machine] |= turns
    return conditions(settings) | {"shape": asdict(shape), "measured": measured, "figures": figures}


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """So many processes that do nothing, as fast as they can."""
    with ExitStack() as stack:
        for _ in range(number):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", SPIN]))
            stack.callback(process.kill)
        yield


@contextmanager
def no_policy() -> Iterator[None]:
    """Without what the environment of this process says about waiting."""
    with patch.dict(os.environ):
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            os.environ.pop(name, None)
        yield

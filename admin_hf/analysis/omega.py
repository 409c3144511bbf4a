"""ω by sub-layer over a training run, from its checkpoints."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from statistics import geometric_mean, median
from typing import ClassVar

from transformers.utils import CONFIG_NAME

from ..architecture import STACKS, Stack
from ..families import FAMILIES
from ..profiling import ResidualProfile
from ..run.folder import STATE_NAME, saved_step
from .inputs import read_tensors


@dataclass(frozen=True)
class StackOmega:
    """ω of one stack: one row per update, with one number per sub-layer that has an ω.

    Attributes:
        names: the names of the residual connections with ω below the stack, in execution order.
        mean, min, max: over the entries of each ω.
        first: the place in the stack, counted from 1, of the first sub-layer with an ω.
    """

    names: list[str]
    mean: list[list[float]]
    min: list[list[float]]
    max: list[list[float]]
    first: int = 2

    def places(self) -> range:
        """The places in the stack, counted from 1, of the sub-layers with an ω."""
        return range(self.first, self.first + len(self.names))

    def growth(self) -> list[float]:
        """The last mean of each sub-layer's ω, divided by its first."""
        return [last / first if first else inf for first, last in zip(self.mean[0], self.mean[-1], strict=True)]

    def verdict(self) -> str:
        if not self.names:
            return "has no ω."
        growth = self.growth()
        fallen, entries = sum(g < 1 for g in growth), (min(self.min[-1]), max(self.max[-1]))
        middle = geometric_mean(growth) if min(growth) > 0 else median(growth)  # a mean can fall below 0
        return (
            f"ω fell in {fallen} of {len(growth)} sub-layers and changed by a factor of {middle:.2f} "
            f"({min(growth):.2f} to {max(growth):.2f}); its entries end between {entries[0]:.2f} and {entries[1]:.2f}."
        )


@dataclass(frozen=True)
class OmegaHistory:
    """The result of [`omega_history`]: `updates` gives the number of updates of each row, in ascending order."""

    EXPECTATION: ClassVar[str] = (
        "Admin starts each ω_i at the sqrt of the variances before it, so that it grows with depth, and training may "
        "lower it where a sub-layer should depend more on its branch (section 4.3)."
    )

    updates: list[int]
    encoder: StackOmega
    decoder: StackOmega

    def verdict(self) -> str:
        """One sentence on each stack."""
        when = f"From update {self.updates[0]:,} to {self.updates[-1]:,}: "
        return f"{when}encoder: {self.encoder.verdict()} Decoder: {self.decoder.verdict()}"


def omega_history(checkpoints: Sequence[str | os.PathLike], profile: ResidualProfile | None = None) -> OmegaHistory:
    """Read ω from the checkpoints of one run; of each, only the tensors of ω are read.

    Args:
        checkpoints: folders as Trainer saves them, in any order.
        profile: the run's residual profile, which is ω at update 0.

    Raises:
        OSError: a checkpoint does not exist, or its weights are damaged or a pickle.
        ValueError: no checkpoints, a folder whose update is unknown, checkpoints of different models, or an ω with NaN
            or infinite entries.

    Example:

    ```python
    history = omega_history(run_checkpoints("runs/en-de"), ResidualProfile.load("runs/en-de/residual_profile.json"))
    history.encoder.mean[-1]  # of each sub-layer with ω, after history.updates[-1] updates
    ```
    """
    if not checkpoints:
        raise ValueError("There are no checkpoints to read ω from: name at least one.")
    saved = {update: _omegas(folder) for update, folder in sorted((_update(Path(f)), Path(f)) for f in checkpoints)}
    first = next(iter(saved.values()))
    if profile is not None:
        saved = {0: _profiled(profile, first)} | saved
    for update, omegas in saved.items():
        if wrong := sorted(first.keys() ^ omegas.keys()):
            raise ValueError(f"Not all have the same sub-layers: see {'.'.join(wrong[0])} after {update} updates.")
    return OmegaHistory(list(saved), **_stacks(*saved.values()))


def trained_omega(folder: str | os.PathLike, profile: ResidualProfile | None = None) -> dict[str, StackOmega]:
    """Read ω of one model by stack. It is the last row; if there is a `profile`, that is the first row.

    Raises:
        OSError, ValueError: its weights, as for [`omega_history`].
    """
    trained = _omegas(Path(folder))
    start = _profiled(profile, trained) if profile is not None else {}
    return _stacks(start, trained) if start.keys() == trained.keys() else _stacks(trained)


# Mean, minimum and maximum of each ω and its place in the stack, counted from 1; by stack and name such as
# layers.0.final_layer_norm in execution order.
_Omegas = dict[tuple[str, str], tuple[float, float, float, int]]


def _stacks(*rows: _Omegas) -> dict[str, StackOmega]:
    stacks = {}
    for stack in STACKS:
        keys = [key for key in rows[-1] if key[0] == stack]
        mean, low, high = ([[omegas[key][k] for key in keys] for omegas in rows] for k in range(3))
        first = rows[-1][keys[0]][3] if keys else 2
        stacks[stack] = StackOmega([name for _, name in keys], mean, low, high, first)
    return stacks


def _profiled(profile: ResidualProfile, omegas: _Omegas) -> _Omegas:
    """ω of the profile where the model has one."""
    return {
        (stack, name): (value, value, value, omegas[stack, name][3])
        for stack, measured in profile.stacks.items()
        for name, value in zip(measured.names, measured.omega, strict=True)
        if (stack, name) in omegas
    }


def _omegas(folder: Path) -> _Omegas:
    found: _Omegas = {}
    read = dict(read_tensors(folder, lambda name: name.endswith(".omega")))
    for stack in _descriptions(folder):
        path = re.compile(rf"(?:^|\.){re.escape(stack.path)}\.(\d+\..+)\.omega$")
        names = {f"{stack.layers}.{match[1]}": name for name in read if (match := path.search(name))}
        for connection in sorted(names, key=stack.index):
            omega, name = read[names[connection]].float(), names[connection]
            values = (float(omega.mean()), float(omega.min()), float(omega.max()), stack.index(connection) + 1)
            if not all(map(isfinite, values)):
                raise ValueError(f"{folder} has NaN or infinite entries in {name}.")
            found[stack.name, connection] = values
    return found


def _descriptions(folder: Path) -> Iterable[Stack]:
    """The stacks of the checkpoint's model: of an Admin model, or of a stock one with an injected ω."""
    try:
        model_type = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        model_type = None
    return FAMILIES.get(model_type, STACKS.values())


def _update(folder: Path) -> int:
    if (step := saved_step(folder)) is None:
        raise ValueError(
            f"{folder} does not say after how many updates it was saved: expected a name such as checkpoint-500, or "
            f"a {STATE_NAME} in it."
        )
    return step


__all__ = ["OmegaHistory", "StackOmega", "omega_history", "trained_omega"]

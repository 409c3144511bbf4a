"""The profiling pass of Admin: measure the branches' variances once, and scale the shortcuts by them.

Section 4.3 of the paper: run the freshly initialised model on one batch, record Var[f_i] of every sub-layer i, and set

    ω_i = sqrt(Σ_{j<i} Var[f_j])

in all entries. Each stack has a sum of its own. Its first sub-layer has no ω (see [`~admin_hf.residual.Admin`]), and
stacks of other systems are measured without changes. Two things follow the authors' code. j = 0 is the stack's
embedding, which the paper does not mention. And ω is applied in the same pass that measures it, where the paper
measures with ω = 1. Unlike in that code, padding is left out of the variances.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .adapters import bare_model
from .checkpoints import write_whole
from .observation import (
    Places,
    connections_of,
    modes_restored,
    observed_connections,
    run_stacks,
    stack_inputs,
    variance,
)
from .omega_state import omega_state
from .special_tokens import check_padding


# The paper profiles on at most this many tokens, counted as rows times the longer side.
MAX_PROFILE_TOKENS = 8192


@dataclass
class StackProfile:
    """The profile of one stack: lists with one entry per sub-layer, in execution order.

    Attributes:
        names: the residual connections' names below the stack, such as `layers.0.self_attn_layer_norm`.
        branch_variances: Var[f_i], the variance over all entries of the branch output at real tokens.
        shortcut_variances: Var[x_{i-1}] of the same tokens, before ω: the variance of the embeddings for the first
            sub-layer, and 1 for the others, which follow a LayerNorm.
        omega: the shortcut scales ω_i to write, or the mean of those that are not profiled; 1 for a sub-layer without
            an ω.
    """

    names: list[str] = field(default_factory=list)
    branch_variances: list[float] = field(default_factory=list)
    shortcut_variances: list[float] = field(default_factory=list)
    omega: list[float] = field(default_factory=list)

    def next_omega(self, first: int = 0) -> float:
        """ω_i = sqrt(Var[x_0] + Σ_{0<j<i} Var[f_j]) of the sub-layer that follows those profiled so far.

        Args:
            first: the sub-layer, counted from 0, at whose shortcut the sum starts.
        """
        return (self.shortcut_variances[first] + sum(self.branch_variances[first:])) ** 0.5


@dataclass
class ResidualProfile:
    """The result of [`profile_residuals`], by stack. It is plain data that seeds and ranks can share as JSON.

    Attributes:
        stacks: by name, such as `"encoder"`, in execution order.
    """

    stacks: dict[str, StackProfile] = field(default_factory=dict)

    @property
    def encoder(self) -> StackProfile:
        return self.stacks["encoder"]

    @property
    def decoder(self) -> StackProfile:
        return self.stacks["decoder"]

    def save(self, path: str | os.PathLike) -> None:
        """Write the profile as JSON, completely or not at all."""
        write_whole(path, json.dumps(asdict(self)["stacks"], indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ResidualProfile":
        """Read a profile.

        Raises:
            ValueError: the file is not a profile.
        """
        try:
            stacks = json.loads(Path(path).read_text(encoding="utf-8"))
            profile = cls({name: StackProfile(**stack) for name, stack in stacks.items()})
            if missing := {
                column for stack in stacks.values() for column in asdict(StackProfile()).keys() - stack.keys()
            }:
                raise TypeError(f"it lacks {', '.join(sorted(missing))}")
        except (TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not a residual profile as ResidualProfile.save writes it: {error}."
            ) from error
        for name, stack in profile.stacks.items():
            if not _is_sound(stack):
                raise ValueError(
                    f"{path} is damaged: its {name} must contain lists of names and of numbers, all of the same "
                    "length."
                )
        return profile

    def table(self, rows: int = 6) -> str:
        """A short, readable table of ω: at most `rows` sub-layers of each stack, including the first and the last."""
        lines = [f"{'sub-layer':<46}{'Var[f]':>10}{'ω':>10}"]
        for name, stack in self.stacks.items():
            count = len(stack.names)
            shown = (
                sorted({round(k * (count - 1) / (rows - 1)) for k in range(rows)}) if count > rows else range(count)
            )
            lines += [
                f"{f'{name}.{stack.names[i]}':<46}{stack.branch_variances[i]:>10.4f}{stack.omega[i]:>10.4f}"
                for i in shown
            ]
        return "\n".join(lines)


def _is_sound(stack: StackProfile) -> bool:
    columns = asdict(stack)
    if not all(isinstance(column, list) and len(column) == len(stack.names) for column in columns.values()):
        return False
    names = columns.pop("names")
    numbers = [value for column in columns.values() for value in column]
    return all(isinstance(name, str) for name in names) and all(isinstance(n, int | float) for n in numbers)


def profile_residuals(model: Any, batch: Mapping[str, Any]) -> ResidualProfile:
    """Measure the branch variances of `model` on one batch, and the ω that follow from them.

    It is one forward pass in train mode (dropout is part of a branch) without gradients. It does not change weights,
    buffers, modes and random states: nothing is initialised until [`initialize_omega`] is called.

    Args:
        model: an [`AdminModel`] or [`AdminForConditionalGeneration`], freshly initialised, with any residual systems;
            or a model with an ω from [`inject`]. It may be inside wrappers of distributed training or of PEFT. With an
            injected ω, the sum of variances starts after the stack's first LayerNorm. So no ω starts below 1, except
            for the LayerNorm's ε.
        batch: the arguments of the model's forward, as tensors; they are moved to the model's device. If a batch has
            more than 8,192 tokens (rows times the longer side), only its first rows are used. Padding is left out, as
            [`~admin_hf.observation.stack_inputs`] finds it.

    Returns:
        The profile: per stack the names, branch variances, shortcut variances and ω of its sub-layers.

    Raises:
        ValueError: the batch lacks the input of a stack, or is padded so that training would go wrong (labels with the
            padding id, sources on the left); or a variance is not finite.

    Example:

    ```python
    >>> import torch
    >>> from admin_hf import AdminConfig, AdminForConditionalGeneration, profile_residuals

    >>> config = AdminConfig(vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2)
    >>> model = AdminForConditionalGeneration(config)
    >>> batch = {"input_ids": torch.randint(2, 99, (4, 10)), "labels": torch.randint(2, 99, (4, 12))}
    >>> profile = profile_residuals(model, batch)
    >>> len(profile.encoder.omega), len(profile.decoder.omega)
    (4, 6)

    ```
    """
    model = bare_model(model)
    state = omega_state(model)
    if state is model:
        check_padding(batch, cast(Any, model).config.pad_token_id)
    inputs, tokens = stack_inputs(model, batch, MAX_PROFILE_TOKENS)
    connections = connections_of(model)
    profile = ResidualProfile({name: StackProfile() for name in connections})
    observers = {}
    for name, stack in connections.items():
        first = next((place for place, (_, connection) in enumerate(stack) if connection.is_in_chain), 0)
        observers[name] = partial(_observe, profile.stacks[name], tokens[name], first)
    with torch.no_grad(), _restored_state(model), observed_connections(model, observers, before=True):
        run_stacks(model, inputs)
    for which, measured in profile.stacks.items():
        for name, _ in connections[which]:
            if name not in measured.names:
                raise ValueError(
                    f"{which}.{name} took no part in the pass, because an adapter replaces it (modules_to_save of "
                    "PEFT): call `initialize_omega(model, profile_residuals(model, batch))` before `get_peft_model`."
                )
    return profile


def initialize_omega(model: Any, profile: ResidualProfile) -> None:
    """Write the profile's ω into all entries of the model's shortcut scales; nothing else changes.

    Raises:
        ValueError: the profile belongs to another model (other sub-layers), or an ω in it is not finite and
            positive. Then nothing is written.
    """
    model = bare_model(model)
    state = omega_state(model)
    stacks = [(name, stack, profile.stacks.get(name, StackProfile())) for name, stack in connections_of(model).items()]
    for stack, connections, measured in stacks:
        if [name for name, _ in connections] != measured.names:
            raise ValueError(
                f"The profile has {len(measured.names)} sub-layers in its {stack}, the model has {len(connections)}, "
                "or their names differ: use a profile of a model with the same layers."
            )
        for name, omega in zip(measured.names, measured.omega, strict=True):
            if not 0 < omega < float("inf"):
                raise ValueError(f"The profile's ω of {stack}.{name} is {omega}; expected a finite positive number.")
    for _, connections, measured in stacks:
        for (_, connection), omega in zip(connections, measured.omega, strict=True):
            if getattr(connection, "profiled", False):
                connection.omega.data.fill_(omega)
                connection.initialized = True
    state.set_profiled(True)


@contextlib.contextmanager
def _restored_state(model: Any) -> Iterator[None]:
    """Train mode without LayerDrop; afterwards ω, modes, LayerDrop and random states are as they were."""
    layerdrop = [(module, module.layerdrop) for module in model.modules() if hasattr(module, "layerdrop")]
    connections = [connection for stack in connections_of(model).values() for _, connection in stack]
    omegas = [(c.omega, c.omega.detach().clone()) for c in connections if hasattr(c, "omega")]
    masks = np.random.get_state()  # which speech models draw
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # such as running means
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    device_type = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices, device_type=device_type), modes_restored(model):
        try:
            model.train()
            for stack, _ in layerdrop:
                stack.layerdrop = 0.0
            yield
        finally:
            for stack, rate in layerdrop:
                stack.layerdrop = rate
            for omega, value in omegas:
                omega.data.copy_(value)
            np.random.set_state(masks)
            for buffer, value in buffers:
                buffer.copy_(value)


def _observe(
    profile: StackProfile, tokens: Places, first: int, name: str, connection: Any, args: tuple[Tensor, Tensor]
) -> None:
    """Add a sub-layer to the profile, and give its connection its ω, right before it joins."""
    omega = 1.0
    if getattr(connection, "profiled", False):
        omega = profile.next_omega(first)
        connection.omega.data.fill_(omega)
    elif hasattr(connection, "omega"):
        omega = float(connection.omega.mean())
    profile.names.append(name)
    profile.shortcut_variances.append(_variance(args[0], tokens, name))
    profile.branch_variances.append(_variance(args[1], tokens, name))
    profile.omega.append(omega)
    following = getattr(connection, "following", None)  # whose ω an injected connection multiplies its output by
    if following is not None and following.profiled:
        following.omega.data.fill_(profile.next_omega(first))


def _variance(x: Tensor, tokens: Places, name: str) -> float:
    if tokens is not None and not len(tokens[0]):
        raise ValueError("The batch has only padding on one side: there is nothing to profile.")
    value = float(variance(x, tokens))
    if not value < float("inf"):
        raise ValueError(f"The variance at {name} is {value}: the batch or the model's weights are not finite.")
    return value

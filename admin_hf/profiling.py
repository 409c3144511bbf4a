"""The profiling pass of Admin: measure the branches' variances once, and scale the shortcuts by them.

Section 4.2 of the paper: run the freshly initialised model on one batch, record Var[f_i] of every sub-layer i, and set

    ω_i = sqrt(Σ_{j<i} Var[f_j])

in all entries, where j = 0 is the stack's embedding. Each stack has a chain of its own; its first sub-layer has no ω
(see [`~admin_hf.residual.Admin`]), and stacks of other systems are measured as they are. As in the reference
implementation ω is applied in the very pass that measures it, so that the chain is consistent with itself; unlike
there, padding is left out of the variances.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.marian.modeling_marian import shift_tokens_right

from .architecture import STACKS
from .checkpoints import write_whole
from .pretrained import AdminPreTrainedModel
from .residual import AdminConnection, residual_connections
from .special_tokens import check_padding


# The paper profiles on at most this many tokens, counted as rows times the longer side.
MAX_PROFILE_TOKENS = 8192


@dataclass
class StackProfile:
    """What profiling measured in one stack, a list entry for each sub-layer in execution order.

    Attributes:
        names: the residual connections' names below the stack, such as `layers.0.self_attn_layer_norm`.
        branch_variances: Var[f_i], the variance of all entries of the branch output at real tokens, as one pool.
        shortcut_variances: Var[x_{i-1}] of the same tokens, before ω: the variance of the embeddings for the first
            sub-layer, and 1 for the others, behind a LayerNorm.
        omega: the shortcut scales ω_i that are to be written, or the mean of those that are not profiled; 1 where a
            sub-layer has none.
    """

    names: list[str] = field(default_factory=list)
    branch_variances: list[float] = field(default_factory=list)
    shortcut_variances: list[float] = field(default_factory=list)
    omega: list[float] = field(default_factory=list)

    def next_omega(self) -> float:
        """ω_i = sqrt(Var[x_0] + Σ_{0<j<i} Var[f_j]) of the sub-layer behind those profiled so far."""
        return (self.shortcut_variances[0] + sum(self.branch_variances)) ** 0.5


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
        """Write the profile as JSON, whole or not at all."""
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
                    f"{path} is damaged: its {name} must hold lists of names and of numbers, all as long."
                )
        return profile

    def table(self, rows: int = 6) -> str:
        """A short table of ω for people: at most `rows` sub-layers of each stack, first and last among them."""
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


def profile_residuals(model: AdminPreTrainedModel, batch: Mapping[str, Any]) -> ResidualProfile:
    """Measure the branch variances of `model` on one batch, and the ω that follow from them.

    One forward pass in train mode (dropout is part of a branch) without gradients. Weights, buffers, modes and random
    states are left as they were: nothing is initialised until [`initialize_omega`] is called.

    Args:
        model: an [`AdminModel`] or [`AdminForConditionalGeneration`], freshly initialised, of any residual systems.
        batch: what the model's forward takes, as tensors; moved to the model's device. Of a batch of more than 8,192
            tokens (rows times the longer side) the first rows are used. Padding is where `attention_mask` is 0 for the
            encoder (else where the ids are padding), and for the decoder where `labels` are −100, else where
            `decoder_attention_mask` is 0, else where the ids after the first are padding.

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
    check_padding(batch, model.padding_id)
    base: Any = model.base_model
    inputs = _first_rows(base_model_inputs(model, batch))
    profile = ResidualProfile({name: StackProfile() for name in STACKS})
    with torch.no_grad(), _restored_state(base), contextlib.ExitStack() as observers:
        for name, stack in STACKS.items():
            tokens = real_tokens(base, batch, inputs, stack.prefix)
            observers.enter_context(_observed(getattr(base, name), tokens, profile.stacks[name]))
        base(**inputs, use_cache=False)
    return profile


def initialize_omega(model: AdminPreTrainedModel, profile: ResidualProfile) -> None:
    """Write the profile's ω into all entries of the model's shortcut scales; nothing else changes.

    Raises:
        ValueError: the profile was made for another model (other sub-layers), or an ω in it is not finite and
            positive. Then nothing is written.
    """
    stacks = [
        (name, list(residual_connections(getattr(model.base_model, name))), profile.stacks.get(name, StackProfile()))
        for name in STACKS
    ]
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
            if isinstance(connection, AdminConnection) and connection.profiled:
                connection.omega.data.fill_(omega)
                connection.initialized = True
    model._set_profiled(True)


def base_model_inputs(model: AdminPreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the base model takes, which computes no logits and no loss."""
    names = [
        f"{stack.prefix}{name}"
        for stack in STACKS.values()
        for name in ("input_ids", "inputs_embeds", "attention_mask")
    ]
    inputs = {name: batch[name].to(model.device) for name in names if batch.get(name) is not None}
    if batch.get("labels") is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        labels = batch["labels"].to(model.device)
        inputs["decoder_input_ids"] = shift_tokens_right(
            labels,
            model.padding_id,
            model.config.decoder_start_token_id,  # type: ignore[arg-type]
        )
    for side, prefix in (("source", ""), ("target", "decoder_")):
        if not {f"{prefix}input_ids", f"{prefix}inputs_embeds"} & inputs.keys():
            raise ValueError(
                f"The batch has no {side}: expected {prefix}input_ids{' or labels' if prefix else ''}, "
                f"got {', '.join(batch) or 'nothing'}."
            )
    return inputs


def _first_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    longest = max(tensor.shape[1] for tensor in inputs.values())
    rows = max(1, MAX_PROFILE_TOKENS // longest)
    return {name: tensor[:rows] for name, tensor in inputs.items()}


def real_tokens(model: Any, batch: Mapping[str, Any], inputs: dict[str, Tensor], prefix: str) -> Tensor:
    """True where a token of the stack is no padding, `(rows, length)`; nowhere in a row that only fills up a batch."""
    targets = None
    if batch.get("labels") is not None:
        rows = next(iter(inputs.values())).shape[0]
        targets = batch["labels"][:rows].to(model.device).ne(-100)
    if prefix and targets is not None:
        return targets
    if f"{prefix}attention_mask" in inputs:
        tokens = inputs[f"{prefix}attention_mask"].bool()
        if targets is None:
            return tokens
        return tokens & (targets.any(1, keepdim=True) | ~targets.any())  # without any target, no row is a filler
    if f"{prefix}input_ids" in inputs:
        tokens = inputs[f"{prefix}input_ids"].ne(model.config.pad_token_id)
        tokens[:, 0] |= bool(prefix)  # a decoder starts from padding
        return tokens
    embeds = inputs[f"{prefix}inputs_embeds"]
    return embeds.new_ones(embeds.shape[:2], dtype=torch.bool)


@contextlib.contextmanager
def _restored_state(model: Any) -> Iterator[None]:
    """Train mode without LayerDrop; afterwards ω, modes, LayerDrop and random states are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    layerdrop = [(stack, stack.layerdrop) for stack in (getattr(model, name) for name in STACKS)]
    omegas = [(m.omega, m.omega.detach().clone()) for m in model.modules() if isinstance(m, AdminConnection)]
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        try:
            model.train()
            for stack, _ in layerdrop:
                stack.layerdrop = 0.0
            yield
        finally:
            for module, training in modes:
                module.training = training
            for stack, rate in layerdrop:
                stack.layerdrop = rate
            for omega, value in omegas:
                omega.data.copy_(value)


@contextlib.contextmanager
def _observed(stack: nn.Module, tokens: Tensor, profile: StackProfile) -> Iterator[None]:
    """Fill `profile` while `stack` runs: every connection is measured, and gets its ω, right before it joins."""

    def observe(name: str, connection: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        shortcut, branch = args
        omega = 1.0
        if isinstance(connection, AdminConnection) and connection.profiled:
            omega = profile.next_omega()
            connection.omega.data.fill_(omega)
        elif isinstance(connection, AdminConnection):
            omega = float(connection.omega.mean())
        profile.names.append(name)
        profile.shortcut_variances.append(_variance(shortcut, tokens, name))
        profile.branch_variances.append(_variance(branch, tokens, name))
        profile.omega.append(omega)

    handles = [
        connection.register_forward_pre_hook(lambda module, args, name=name: observe(name, module, args))
        for name, connection in residual_connections(stack)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _variance(x: Tensor, tokens: Tensor, name: str) -> float:
    """Population variance over all entries of the real tokens as one pool, accumulated in float32."""
    if not tokens.any():
        raise ValueError("The batch holds padding only on one side: there is nothing to profile.")
    variance = float(x[tokens].float().var(correction=0))
    if not variance < float("inf"):
        raise ValueError(f"The variance at {name} is {variance}: the batch or the model's weights are not finite.")
    return variance

"""Observes a running model from outside: hooks on its residual connections, at the real tokens."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.marian.modeling_marian import shift_tokens_right

from .architecture import STACKS, Stack
from .connections import residual_connections


# Where the tokens of a stack are real: their rows, and their places in them; None where all are
Places = tuple[Tensor, ...] | None


def observed(
    modules: Iterable[tuple[str, nn.Module]], observe: Callable[..., None], before: bool = False
) -> ExitStack:
    """Watch modules in forward passes, until the returned context is left or closed.

    Args:
        modules: names and modules, such as [`residual_connections`] of a stack.
        observe: called with a module's name, the module, its positional inputs as a tuple and its output.
        before: call it before the module computes, without an output.
    """
    hooks = ExitStack()
    for name, module in modules:
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        hooks.callback(register(partial(observe, name)).remove)
    return hooks


def connections_of(model: nn.Module) -> dict[str, list[tuple[str, Any]]]:
    """The residual connections of each stack with their names below it, in execution order.

    In an Admin model they are modules; with an injected ω they are [`~admin_hf.injection.InjectedConnection`]s.
    """
    if (injection := getattr(model, "injection", None)) is not None:
        return {name: [(each.name, each) for each in stack] for name, stack in injection.stacks.items()}
    return {name: list(residual_connections(getattr(model.base_model, name))) for name in STACKS}


def observed_connections(
    model: nn.Module, observers: Mapping[str, Callable[..., None]], before: bool = False
) -> ExitStack:
    """As [`observed`] of the residual connections, whose inputs are x_{i-1} and f_i(x_{i-1}), before they are scaled.

    Args:
        observers: by the name of the stack. They are called with x_i times the connection's `output_scale` as the
            output; this factor is 1 except with an injected ω.
    """
    if (injection := getattr(model, "injection", None)) is not None:
        return injection.observed(observers, before)
    hooks, connections = ExitStack(), connections_of(model)
    for name, observe in observers.items():
        hooks.enter_context(observed(connections[name], observe, before))
    return hooks


def run_stacks(model: Any, inputs: Mapping[str, Any]) -> None:
    """Run all stacks of a model on the result of [`stack_inputs`]."""
    if getattr(model, "injection", None) is not None:
        model(**inputs)
    else:
        model.base_model(**inputs, use_cache=False)


def at(x: Tensor, tokens: Places) -> Tensor:
    """The entries of `x`, `(rows, length, d_model)`, at the real tokens: `(tokens, d_model)`."""
    return x.flatten(0, -2) if tokens is None else x[tokens]


def variance(x: Tensor, tokens: Places, scale: Tensor | float = 1.0) -> Tensor:
    """Population variance of `scale · x` over all entries of all real tokens, in float32.

    Args:
        x: `(rows, length, d_model)`.
        tokens: the places from [`stack_inputs`].
        scale: a number, or of shape `(1,)` or `(d_model,)`.
    """
    return (at(x, tokens).float() * scale).var(correction=0)


def stack_inputs(
    model: Any, batch: Mapping[str, Any], max_tokens: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Places]]:
    """The inputs of the base model (which computes no logits and no loss) in a batch, and the places of real tokens.

    Args:
        model: the bare model; tensors are moved to its device.
        batch: the arguments of its forward. In the encoder, padding is where `attention_mask` is 0, or without it,
            where the ids are padding. In the decoder, it is where `labels` are −100; without labels, where
            `decoder_attention_mask` is 0; without both, where the ids after the first are padding. A row without
            labels only fills up a batch.
        max_tokens: limit of rows times the longer side; of a larger batch, only the first rows are used.

    Returns:
        The inputs, and the places of the real tokens by stack.

    Raises:
        ValueError: the batch lacks the input of a stack.
    """
    if (injection := getattr(model, "injection", None)) is not None:
        return injection.stack_inputs(batch, max_tokens)
    sides = [f"{stack.prefix}{name}" for stack in STACKS.values() for name in ("input_ids", "inputs_embeds")]
    masks = [f"{stack.prefix}attention_mask" for stack in STACKS.values()]
    inputs = {name: batch[name].to(model.device) for name in (*sides, *masks) if batch.get(name) is not None}
    if batch.get("labels") is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        labels, config = batch["labels"].to(model.device), model.config
        inputs["decoder_input_ids"] = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
    for side, stack in zip(("source", "target"), STACKS.values(), strict=True):
        if not {f"{stack.prefix}input_ids", f"{stack.prefix}inputs_embeds"} & inputs.keys():
            raise ValueError(
                f"The batch has no {side}: expected {stack.prefix}input_ids{' or labels' if stack.prefix else ''}, "
                f"got {', '.join(batch) or 'nothing'}."
            )
    if max_tokens is not None:
        rows = max(1, max_tokens // max(tensor.shape[1] for tensor in inputs.values()))
        inputs = {name: tensor[:rows] for name, tensor in inputs.items()}
    targets = None
    if batch.get("labels") is not None:
        targets = batch["labels"][: len(next(iter(inputs.values())))].to(model.device).ne(-100)
    return inputs, {
        name: _real_tokens(stack, inputs, targets, model.config.pad_token_id).nonzero(as_tuple=True)
        for name, stack in STACKS.items()
    }


def _real_tokens(stack: Stack, inputs: dict[str, Tensor], targets: Tensor | None, padding_id: int) -> Tensor:
    """True where a token of the stack is not padding, `(rows, length)`; never in a row that only fills up a batch."""
    if stack.prefix and targets is not None:
        return targets
    if (mask := inputs.get(f"{stack.prefix}attention_mask")) is not None:
        if targets is None:
            return mask.bool()
        return mask.bool() & (targets.any(1, keepdim=True) | ~targets.any())  # without any target, no row is a filler
    if (ids := inputs.get(f"{stack.prefix}input_ids")) is not None:
        tokens = ids.ne(padding_id)
        tokens[:, 0] |= bool(stack.prefix)  # a decoder starts from padding
        return tokens
    embeds = inputs[f"{stack.prefix}inputs_embeds"]
    return embeds.new_ones(embeds.shape[:2], dtype=torch.bool)


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """A context that restores the mode (train or evaluation) of every module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


__all__ = [
    "connections_of",
    "modes_restored",
    "observed",
    "observed_connections",
    "run_stacks",
    "stack_inputs",
    "variance",
]

"""Autocast: its dtype, and weights cast for it all at once, where it casts them one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype in which autocast computes matrix products on a type of device, or None where it is off."""
    # "meta" has no autocast, and asking whether it is on would raise
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def linear_weights(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the weights and biases of the linear layers below `model` are held, as dictionaries and keys."""
    linears = (module for module in model.modules() if type(module) is nn.Linear)
    places = ((module._parameters, name) for module in linears for name in ("weight", "bias"))
    return [(parameters, name) for parameters, name in places if parameters[name] is not None]


@contextmanager
def cast_at_once(places: list[tuple[dict[str, Any], str]], dtype: torch.dtype) -> Iterator[None]:
    """Let linear layers hold weights of `dtype`, made by few kernels, and so their gradients.

    Autocast would cast each weight and bias when it is used, and its gradient back: a fifth of all kernels of an
    update of Transformer-base, which Python launches more slowly than a GPU computes them.

    Args:
        places: what [`linear_weights`] found.
        dtype: autocast's.
    """
    held = [parameters[name] for parameters, name in places]
    for (parameters, name), weight in zip(places, _Cast.apply(dtype, *held), strict=True):
        parameters[name] = weight
    try:
        yield
    finally:
        for (parameters, name), weight in zip(places, held, strict=True):
            parameters[name] = weight


class _Cast(torch.autograd.Function):
    """Casts tensors, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([grad for grad in grads if grad is not None], torch.float32))
        return None, *(None if grad is None else next(cast) for grad in grads)


def _cast(tensors: Any, dtype: torch.dtype) -> list[Tensor]:
    cast = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast

"""Weights that are products with ω, computed in every forward pass by PyTorch's parametrizations."""

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Product(Tensor):
    """A computed weight. Anything written to it would be lost, so writing raises an error."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "This weight is the product of a parameter and ω, so anything written to it would be lost: write to "
            "`parametrizations.weight.original`; or call `reparameterize` first, for example to merge adapters."
        )

    @property
    def data(self) -> Tensor:
        return super().data.as_subclass(Product)

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        self._refuse()


for _name in dir(Tensor):
    if re.fullmatch(r"[a-z]\w*[a-z\d]_|__(i(add|sub|mul|truediv)|setitem)__", _name) and _name != "requires_grad_":
        setattr(Product, _name, Product._refuse)


class Scaled(nn.Module):
    """A parametrization: a weight or bias times ω, or divided by it along the inputs of a matrix.

    Args:
        norm: the LayerNorm after the sub-layer, which contains ω.
        divides: whether the weight is divided.
        transposed: whether the inputs are the rows of the matrix, as in a `Conv1D`.
    """

    def __init__(self, norm: nn.Module, divides: bool = False, transposed: bool = False) -> None:
        super().__init__()
        # Not the norm itself: a copy of one would copy the next, and so on, and run out of stack in a deep model
        self._holder = norm._parameters if "omega" in norm._parameters else norm._buffers
        self.divides, self.transposed = divides, transposed

    def forward(self, weight: Tensor) -> Tensor:
        omega: Any = self._holder["omega"].to(weight)  # type: ignore[union-attr]
        omega = omega.unsqueeze(1) if self.transposed else omega
        scaled = weight / omega if self.divides else weight * omega
        return scaled if torch.compiler.is_compiling() else scaled.as_subclass(Product)


def scale(module: Any, norm: nn.Module, names: Sequence[str] = ("weight", "bias"), **how: bool) -> None:
    """Turn a module's weights into products with the ω of a LayerNorm; `how` as in [`Scaled`]."""
    for name in names:
        if getattr(module, name) is not None:
            parametrize.register_parametrization(module, name, Scaled(norm, **how))


def original(module: Any, name: str) -> Tensor:
    """The parameter from which a weight is computed."""
    is_scaled = parametrize.is_parametrized(module, name)
    value: Tensor = module.parametrizations[name].original if is_scaled else getattr(module, name)
    return value


@torch.no_grad()
def remove(base: nn.Module, folds: bool) -> None:
    """Remove all ω from a model: keep the products, computed in float64, or the original weights."""
    for module in base.modules():
        for name in [*getattr(module, "parametrizations", ())]:
            scaled: Any = module.parametrizations[name]  # type: ignore[index]
            if not isinstance(scaled[0], Scaled):  # a weight norm that belongs to the model
                continue
            # PyTorch removes properties from the class, which the original of this copy still uses
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            value = scaled.original.to("cpu", torch.float64) if folds else scaled.original
            for product in scaled if folds else ():
                value = product(value)
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            getattr(module, name).copy_(value)
    for module in base.modules():  # some of them may be an adapter's copies
        for name in ("omega", "omega_profiled"):
            if name in module._parameters or name in module._buffers:
                delattr(module, name)


__all__ = ["Scaled", "original", "remove", "scale"]

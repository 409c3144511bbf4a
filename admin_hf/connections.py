"""Residual connections: how the shortcut and the branch of a sub-layer become its output.

They differ in what is normalised and what is scaled; [`~admin_hf.residual`] says which system uses which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import scaled_layer_norm


class ScaleModule(nn.Module):
    """A module with scales: parameters, such as ω and α, that start at a constant.

    They stay float32 in models of half precision (`.half()`, `.bfloat16()`, `dtype=...`), where an update of a large ω
    would be lost in rounding. They are cast where they are used. A loader keeps the dtype in which they are built.

    Attributes:
        initial_scales: the starting value of all entries of a scale, by its name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_scales: dict[str, float] = {}

    def add_scale(self, name: str, value: float, size: int = 1) -> None:
        """Add the parameter `name` of shape `(size,)`, whose entries start at `value`.

        A scalar has size 1, since FSDP cannot shard a tensor without a dimension.
        """
        self.initial_scales[name] = value
        self.register_parameter(name, nn.Parameter(torch.full((size,), value, dtype=torch.float32)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {name: self.get_parameter(name).data for name in self.initial_scales}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            scale = self.get_parameter(name)
            if scale.dtype in (torch.float16, torch.bfloat16):
                scale.data = value.to(scale.device)
        return self


class ResidualConnection(nn.Module):
    """Joins the shortcut ``x_{i-1}`` and the branch ``f_i`` of one sub-layer into ``x_i``.

    A layer calls it twice, so that hooks see both tensors: ``branch_input(x)`` returns the input of the branch, and
    ``forward(shortcut, branch)`` joins. All tensors are `(batch_size, sequence_length, d_model)`.

    Attributes:
        shortcut_scale, branch_scale: the factors of shortcut and branch in a subclass: a number, or a tensor of shape
            `(1,)` or `(d_model,)`. [`reparameterize`] folds those of a Post-LN connection into the weights around it.
            It also folds those of a Pre-LN connection whose shortcut is scaled by a number.
        input_scale: the factor, a number, of a Pre-LN connection's normalised input; it is folded as well.
        adds_layer_input: whether the shortcut is the sum of x_{i-1} and the input of the whole layer.
    """

    shortcut_scale: Tensor | float = 1.0
    branch_scale: Tensor | float = 1.0
    input_scale = 1.0
    adds_layer_input = False
    output_scale = 1.0
    is_in_chain = True  # whether profiling adds its branch: with an injected ω, not before the first LayerNorm

    def branch_input(self, shortcut: Tensor) -> Tensor:
        """The input of the branch: the shortcut itself, unless a system normalises or shifts it first."""
        return shortcut

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return ``x_i`` from ``x_{i-1}`` (`shortcut`) and ``f_i(x_{i-1})`` (`branch`, after its dropout)."""
        raise NotImplementedError


def residual_connections(module: nn.Module) -> Iterator[tuple[str, ResidualConnection]]:
    """Yield the residual connections below `module` (a stack or a layer) and their names, in execution order."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, ResidualConnection))


# --- with LayerNorm -------------------------------------------------------------------------------


class PostLNConnection(nn.LayerNorm, ResidualConnection):
    """``x_i = LN(x_{i-1} + f_i(x_{i-1}))``, the connection of the original Transformer."""

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(shortcut + branch)


class PreLNConnection(nn.LayerNorm, ResidualConnection):
    """``x_i = x_{i-1} + f_i(LN(x_{i-1}))``."""

    def branch_input(self, shortcut: Tensor) -> Tensor:
        return super().forward(shortcut)

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return shortcut + branch


class LayerNormScalingConnection(PreLNConnection):
    """``x_i = x_{i-1} + f_i(LN(x_{i-1}) / √l)`` in layer l, counted from 1."""

    def __init__(self, d_model: int, layer: int) -> None:
        super().__init__(d_model)
        self.input_scale = layer**-0.5

    def branch_input(self, shortcut: Tensor) -> Tensor:
        return self.input_scale * super().branch_input(shortcut)


class LayerScaleConnection(ScaleModule, PreLNConnection):
    """``x_i = x_{i-1} + λ ⊙ f_i(LN(x_{i-1}))`` with a trainable λ of shape `(d_model,)`."""

    gain: nn.Parameter

    def __init__(self, d_model: int, gain: float) -> None:
        super().__init__(d_model)
        self.add_scale("gain", gain, d_model)

    @property
    def branch_scale(self) -> Tensor:  # type: ignore[override]
        return self.gain

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return torch.addcmul(shortcut, self.gain.to(shortcut), branch.to(shortcut))


class GPASConnection(ScaleModule, PreLNConnection):
    """``x_i = y_i − SiLU(α_i) sg(y_i)`` of ``y_i = x_{i-1} + f_i(LN(x_{i-1}))``.

    α_i is a trainable number, 0 at the start. sg stops the gradient: the output is scaled by 1 − SiLU(α_i), and the
    gradient is not.
    """

    alpha: nn.Parameter

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.add_scale("alpha", 0.0)

    @property
    def shortcut_scale(self) -> Tensor:  # type: ignore[override]
        return 1 - nn.functional.silu(self.alpha)

    @property
    def branch_scale(self) -> Tensor:  # type: ignore[override]
        return self.shortcut_scale

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        y = shortcut + branch
        return y - nn.functional.silu(self.alpha).to(y) * y.detach()


class B2TConnection(PostLNConnection):
    """``x_i = LN(z + x_{i-1} + f_i(x_{i-1}))``, where z is the input of the layer, added to the shortcut before."""

    adds_layer_input = True


class KeelConnection(nn.LayerNorm, ResidualConnection):
    """``x_i = LN(α x_{i-1} + f_i(LN'(x_{i-1})))`` with a constant α; LN' is `inner`."""

    def __init__(self, d_model: int, alpha: float) -> None:
        super().__init__(d_model)
        self.shortcut_scale = alpha
        self.inner = nn.LayerNorm(d_model)

    def branch_input(self, shortcut: Tensor) -> Tensor:
        return self.inner(shortcut)

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(self.shortcut_scale * shortcut + branch)


class AdminConnection(ScaleModule, PostLNConnection):
    """``x_i = LN(x_{i-1} ⊙ ω_i + f_i(x_{i-1}))`` with a trainable ω_i (Admin, section 4.3 of the paper).

    Args:
        d_model: the model's width.
        omega: the starting value of the entries of ω. By default they start at 1, which is Post-LN, until
            [`initialize_omega`] writes the profile's value into all of them.

    Attributes:
        omega: the shortcut scale ω_i, of shape `(d_model,)`.
        profiled: whether a profile sets the start of ω.
        initialized: whether the value of ω was given, measured or loaded; False in a fresh connection that is still
            to be profiled.
    """

    omega: nn.Parameter

    def __init__(self, d_model: int, omega: float | None = None) -> None:
        super().__init__(d_model)
        self.add_scale("omega", 1.0 if omega is None else omega, d_model)
        self.profiled = omega is None
        self.initialized = not self.profiled

    @property
    def shortcut_scale(self) -> Tensor:  # type: ignore[override]
        return self.omega

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        omega = self.omega if self.omega.dtype == shortcut.dtype else self.omega.to(shortcut)
        if self.training and shortcut.device.type == "cpu" and not torch.compiler.is_compiling():
            return scaled_layer_norm(shortcut, omega, branch, self.weight, self.bias, self.eps)
        if self.training:  # the backward pass of addcmul is a kernel longer than those of a product and a sum
            return nn.LayerNorm.forward(self, branch + shortcut * omega)
        return nn.LayerNorm.forward(self, torch.addcmul(branch, shortcut, omega))


class DeepNormConnection(PostLNConnection):
    """``x_i = LN(α x_{i-1} + f_i(x_{i-1}))`` with a constant α."""

    def __init__(self, d_model: int, alpha: float) -> None:
        super().__init__(d_model)
        self.shortcut_scale = alpha

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(self.shortcut_scale * shortcut, branch)


def profiled_connections(module: nn.Module) -> Iterator[tuple[str, AdminConnection]]:
    """Yield the connections below `module` whose ω a profile sets, and their names, in execution order."""
    for name, child in module.named_modules():
        if isinstance(child, AdminConnection) and child.profiled:
            yield name, child


# --- ReZero ---------------------------------------------------------------------------------------


class AlphaModule(ScaleModule):
    """A connection with a trainable branch scale α, 0 at the start, which the sub-layers of a layer share.

    The first one owns it, so that a checkpoint contains it once, and nothing has to be tied again after loading.
    """

    alpha: nn.Parameter

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.add_scale("alpha", 0.0)
        self._owner = (self,)  # in a tuple, or PyTorch would treat it as a part of this module

    def share_alpha(self, owner: AlphaModule) -> None:
        """Use the α of `owner` from here on."""
        del self.alpha, self.initial_scales["alpha"]
        self._owner = (owner,)

    @property
    def branch_scale(self) -> Tensor:
        return self._owner[0].alpha


class ReZeroConnection(AlphaModule, ResidualConnection):  # type: ignore[misc]
    """``x_i = x_{i-1} + α f_i(x_{i-1})``."""

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return shortcut + self.branch_scale.to(shortcut) * branch


class ReZeroPostLNConnection(AlphaModule, PostLNConnection):  # type: ignore[misc]
    """``x_i = LN(x_{i-1} + α f_i(x_{i-1}))``."""

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(shortcut, self.branch_scale.to(shortcut) * branch)


# --- FixUp ----------------------------------------------------------------------------------------


class FixUpConnection(ScaleModule, ResidualConnection):
    """``x_i = x_{i-1} + m f_i(x_{i-1} + b)`` with trainable scalars m and b, 1 and 0 at the start."""

    multiplier: nn.Parameter
    input_bias: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.add_scale("multiplier", 1.0)
        self.add_scale("input_bias", 0.0)

    @property
    def branch_scale(self) -> Tensor:  # type: ignore[override]
        return self.multiplier

    def branch_input(self, shortcut: Tensor) -> Tensor:
        return shortcut + self.input_bias.to(shortcut)

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return shortcut + self.multiplier.to(shortcut) * branch


class FixUpActivation(ScaleModule):
    """``φ(x + b) + c`` of an activation φ, with trainable scalars b and c, 0 at the start."""

    input_bias: nn.Parameter
    output_bias: nn.Parameter

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.add_scale("input_bias", 0.0)
        self.add_scale("output_bias", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.input_bias.to(x)) + self.output_bias.to(x)


class FixUpOutput(ScaleModule):
    """``m (x + b)`` of a stack's output x, with trainable scalars m and b, 1 and 0 at the start."""

    multiplier: nn.Parameter
    input_bias: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.add_scale("multiplier", 1.0)
        self.add_scale("input_bias", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiplier.to(x) * (x + self.input_bias.to(x))

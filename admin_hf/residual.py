"""Residual connections and the systems that choose them.

A Transformer stack is a chain of residual connections, one for each sub-layer (self-attention, encoder-attention,
feed-forward) with its branch ``f_i``:

    Post-LN   x_i = LN(x_{i-1} + f_i(x_{i-1}))
    Pre-LN    x_i = x_{i-1} + f_i(LN(x_{i-1}))
    Admin     x_i = LN(x_{i-1} ⊙ ω_i + f_i(x_{i-1}))          (Liu et al., EMNLP 2020)

A **connection** is the module that joins shortcut and branch of one sub-layer. A **system** is the plan behind a name
such as ``"admin"``: which connection each sub-layer gets, how branch weights are initialised, and what follows the
stack. Layers and stacks never ask which system they run.

A system of your own is a class and a line, and no edit of the model:

```python
>>> from admin_hf import AdminConfig, AdminForConditionalGeneration
>>> from admin_hf.residual import SYSTEMS, PostLNConnection, ResidualSystem

>>> class HalfBranchConnection(PostLNConnection):
...     branch_scale = 0.5  # what `reparameterize` folds away
...
...     def forward(self, shortcut, branch):
...         return super().forward(shortcut, self.branch_scale * branch)

>>> class HalfBranch(ResidualSystem):
...     def connection(self, sublayer_idx):
...         return HalfBranchConnection(self.config.d_model)

>>> SYSTEMS["half_branch"] = HalfBranch
>>> config = AdminConfig(encoder_residual="half_branch", d_model=16, encoder_attention_heads=2, vocab_size=50)
>>> type(AdminForConditionalGeneration(config).model.encoder.layers[0].final_layer_norm).__name__
'HalfBranchConnection'

```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init


if TYPE_CHECKING:
    from .configuration_admin import AdminConfig


# --- connections ----------------------------------------------------------------------------------


class ResidualConnection(nn.Module):
    """Joins the shortcut ``x_{i-1}`` and the branch ``f_i`` of one sub-layer into ``x_i``.

    A layer calls it twice, so that hooks see both tensors: ``branch_input(x)`` gives what the branch reads, and
    ``forward(shortcut, branch)`` joins. All tensors are `(batch_size, sequence_length, d_model)`.
    """

    def branch_input(self, shortcut: Tensor) -> Tensor:
        """What the branch reads: the shortcut itself, unless a system normalises it first."""
        return shortcut

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return ``x_i`` from ``x_{i-1}`` (`shortcut`) and ``f_i(x_{i-1})`` (`branch`, after its dropout)."""
        raise NotImplementedError


class PostLNConnection(nn.LayerNorm, ResidualConnection):
    """``x_i = LN(x_{i-1} + f_i(x_{i-1}))``, the connection of the original Transformer.

    Attributes:
        shortcut_scale, branch_scale: what a subclass multiplies shortcut and branch by, a number or a vector of shape
            `(d_model,)`. [`reparameterize`] folds them into the weights around the connection.
    """

    shortcut_scale: Tensor | float = 1.0
    branch_scale: Tensor | float = 1.0

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(shortcut + branch)


class PreLNConnection(nn.LayerNorm, ResidualConnection):
    """``x_i = x_{i-1} + f_i(LN(x_{i-1}))``."""

    def branch_input(self, shortcut: Tensor) -> Tensor:
        return super().forward(shortcut)

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return shortcut + branch


class AdminConnection(PostLNConnection):
    """``x_i = LN(x_{i-1} ⊙ ω_i + f_i(x_{i-1}))`` with a trainable ω_i (Admin, section 4.2 of the paper).

    ω is 1, which is Post-LN, until [`initialize_omega`] writes the profile's value into all its entries. It has shape
    `(d_model,)` and stays float32 in models of half precision (`.half()`, `.bfloat16()`, `dtype=...`), where an update
    of a large ω would be rounded away; it is cast to the shortcut's dtype where it is used.

    Attributes:
        omega: the shortcut scale ω_i.
        initialized: whether ω holds a value that was measured or loaded; a fresh connection's does not.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.omega = nn.Parameter(torch.ones(d_model, dtype=torch.float32))
        self.initialized = False

    @property
    def shortcut_scale(self) -> Tensor:  # type: ignore[override]
        return self.omega

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(shortcut * self.omega.to(shortcut.dtype), branch)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdminConnection:
        omega = self.omega.data
        super()._apply(fn, recurse)
        if self.omega.dtype in (torch.float16, torch.bfloat16):
            self.omega.data = omega.to(self.omega.device)
        return self


def residual_connections(module: nn.Module) -> Iterator[tuple[str, ResidualConnection]]:
    """Yield the residual connections below `module` (a stack or a layer) and their names, in execution order."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, ResidualConnection))


# --- systems --------------------------------------------------------------------------------------

Initializer = Callable[[Tensor], Any]


class ResidualSystem:
    """The plan of one stack: its connections, the initialisation of its branches, and what follows it.

    This class is plain Post-LN with the standard initialisation; a subclass writes only what it changes.

    Args:
        config: the model's configuration.
        stack: `"encoder"` or `"decoder"`, for systems whose constants depend on it.
    """

    # Names of a layer's connections, which are Marian's names of its layer norms, in execution order.
    SUBLAYERS = {
        "encoder": ("self_attn_layer_norm", "final_layer_norm"),
        "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    }

    # fairseq's standard initialisation: the profile, and so ω, depends on it. Biases are zero.
    initializers: dict[str, Initializer] = {
        "q_proj": partial(init.xavier_uniform_, gain=2**-0.5),
        "k_proj": partial(init.xavier_uniform_, gain=2**-0.5),
        "v_proj": partial(init.xavier_uniform_, gain=2**-0.5),
        "out_proj": init.xavier_uniform_,
        "fc1": init.xavier_uniform_,
        "fc2": init.xavier_uniform_,
    }

    def __init__(self, config: AdminConfig, stack: str) -> None:
        self.config = config
        self.stack = stack

    def connection(self, sublayer_idx: int) -> nn.Module:
        """Return the connection of a sub-layer, counted through the stack from 0 in execution order."""
        return PostLNConnection(self.config.d_model)

    def connect(self, layer: nn.Module, layer_idx: int) -> None:
        """Give a stock Marian `layer` this system's connections and mark its projections with their initialisers.

        A system whose sub-layers share a parameter, or whose branches differ, overrides this.
        """
        names = self.SUBLAYERS[self.stack]
        for position, name in enumerate(names):
            setattr(layer, name, self.connection(layer_idx * len(names) + position))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.initializer = self.initializers[name.rpartition(".")[2]]  # type: ignore[assignment]

    def after_stack(self) -> nn.Module:
        """Return the module behind the last sub-layer, saved as the stack's `layer_norm`."""
        return nn.Identity()


class PostLN(ResidualSystem):
    """The original Transformer: diverges when it is deep, but reaches the best quality where it trains."""


class PreLN(ResidualSystem):
    """Pre-LN: stable when deep, weaker in the end; one LayerNorm follows the stack."""

    def connection(self, sublayer_idx: int) -> nn.Module:
        return PreLNConnection(self.config.d_model)

    def after_stack(self) -> nn.Module:
        return nn.LayerNorm(self.config.d_model)


class Admin(ResidualSystem):
    """Post-LN with a profiled shortcut scale ω on every sub-layer but the first of the stack.

    No LayerNorm precedes the first sub-layer into which a trained ω_1 could be folded; paper and reference
    implementation start ω_1 at 1 and train it.
    """

    def connection(self, sublayer_idx: int) -> nn.Module:
        return AdminConnection(self.config.d_model) if sublayer_idx > 0 else super().connection(sublayer_idx)


# The values that `encoder_residual` and `decoder_residual` of an AdminConfig can take.
SYSTEMS: dict[str, type[ResidualSystem]] = {
    "admin": Admin,
    "post_ln": PostLN,
    "pre_ln": PreLN,
}

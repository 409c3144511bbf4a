"""Residual systems: Post-LN, Pre-LN, Admin, DeepNorm, ReZero and others.

A Transformer stack is a chain of residual connections, one per sub-layer (self-attention, encoder-attention,
feed-forward) with its branch ``f_i``:

    Post-LN   x_i = LN(x_{i-1} + f_i(x_{i-1}))
    Pre-LN    x_i = x_{i-1} + f_i(LN(x_{i-1}))
    Admin     x_i = LN(x_{i-1} ⊙ ω_i + f_i(x_{i-1}))          (Liu et al., EMNLP 2020)

A **connection** is the module that joins shortcut and branch of one sub-layer (`connections.py`). A **system** is the
plan for a name such as ``"admin"``: which connection each sub-layer gets, how branch weights are initialised, what
follows the stack, and whether the output layer is tied. Layers and stacks never ask which system they run.

docs/systems.md has a table of all systems. Your own system needs a class and one line, and no change to the model:

```python
>>> from admin_hf import AdminConfig, AdminForConditionalGeneration
>>> from admin_hf.residual import SYSTEMS, PostLNConnection, ResidualSystem

>>> class HalfBranchConnection(PostLNConnection):
...     branch_scale = 0.5  # `reparameterize` folds it into the weights
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

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MarianConfig
from transformers import initialization as init

from .architecture import INNER, KEY, OUTER, OUTPUT, QUERY, STACKS, VALUE
from .connections import (
    AdminConnection,
    B2TConnection,
    DeepNormConnection,
    FixUpActivation,
    FixUpConnection,
    FixUpOutput,
    GPASConnection,
    KeelConnection,
    LayerNormScalingConnection,
    LayerScaleConnection,
    PostLNConnection,
    PreLNConnection,
    ResidualConnection,
    ReZeroConnection,
    ReZeroPostLNConnection,
    ScaleModule,
    profiled_connections,
    residual_connections,
)


Initializer = Callable[[Tensor], Any]


class ResidualSystem:
    """The plan of one stack: its connections, the initialisation of its branches, and what follows it.

    This class is plain Post-LN with the standard initialisation; a subclass contains only its changes. If it cannot
    work with a configuration, its constructor raises a ValueError.

    Args:
        config: the model's configuration.
        stack: `"encoder"` or `"decoder"`, for systems whose constants depend on it.
    """

    # fairseq's standard initialisation: the profile, and so ω, depends on it. Biases are zero.
    # A decoder's system with an entry for "lm_head" gives the model an output layer of its own, tied to no embeddings.
    initializers: dict[str, Initializer] = {
        QUERY: partial(init.xavier_uniform_, gain=2**-0.5),
        KEY: partial(init.xavier_uniform_, gain=2**-0.5),
        VALUE: partial(init.xavier_uniform_, gain=2**-0.5),
        OUTPUT: init.xavier_uniform_,
        INNER: init.xavier_uniform_,
        OUTER: init.xavier_uniform_,
    }

    def __init__(self, config: MarianConfig, stack: str) -> None:
        self.config = config
        self.stack = stack
        self.sublayers = STACKS[stack].sublayers
        self.depth = STACKS[stack].depth(config)  # in sub-layers

    def connection(self, sublayer_idx: int) -> nn.Module:
        """Return the connection of a sub-layer, counted through the stack from 0 in execution order."""
        return PostLNConnection(self.config.d_model)

    def connect(self, layer: nn.Module, layer_idx: int) -> None:
        """Give a stock Marian `layer` this system's connections and mark its projections with their initialisers.

        A system whose sub-layers share a parameter, or whose branches differ, overrides this.
        """
        for position, sublayer in enumerate(self.sublayers):
            setattr(layer, sublayer.norm, self.connection(layer_idx * len(self.sublayers) + position))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.initializer = self.initializers[name.rpartition(".")[2]]  # type: ignore[assignment]

    def after_stack(self) -> nn.Module:
        """Return the module after the last sub-layer, saved as the stack's `layer_norm`."""
        return nn.Identity()

    @property
    def ties_output(self) -> bool:
        """Whether the output layer is the decoder's embedding matrix (if the configuration ties them)."""
        return "lm_head" not in self.initializers


class PostLN(ResidualSystem):
    """The original Transformer: a deep one diverges; one that trains reaches the best quality."""


class PreLN(ResidualSystem):
    """Pre-LN: stable when deep, lower quality at the end; one LayerNorm follows the stack."""

    def connection(self, sublayer_idx: int) -> nn.Module:
        return PreLNConnection(self.config.d_model)

    def after_stack(self) -> nn.Module:
        return nn.LayerNorm(self.config.d_model)


# ω of an output change that grows so in the number n of sub-layers of a stack, as in the authors' package admin-torch
OUTPUT_CHANGES: dict[str, Callable[[int], float]] = {
    "O(log n)": lambda n: math.sqrt((n + 1) / math.log(n + 1) - 1),
    "O(1)": math.sqrt,
    "O(n)": lambda n: 1.0,
}


class Admin(ResidualSystem):
    """Post-LN with a profiled shortcut scale ω on every sub-layer except the first of the stack.

    The first sub-layer follows no LayerNorm into which a trained ω_1 could be folded. The authors' code starts ω_1 at
    1 and trains it; the paper does not mention its start.
    """

    # The starting value of ω for systems that need no profile
    omega: float | None = None

    def connection(self, sublayer_idx: int) -> nn.Module:
        d_model = self.config.d_model
        return AdminConnection(d_model, self.omega) if sublayer_idx > 0 else PostLNConnection(d_model)


class AdminUniform(Admin):
    """Admin without profiling: one ω for a stack of n sub-layers, sqrt((n + 1) / ln(n + 1) − 1), then trained.

    From the authors' package admin-torch, like its variants below.
    """

    omega: float
    output_change = "O(log n)"

    def __init__(self, config: MarianConfig, stack: str) -> None:
        super().__init__(config, stack)
        self.omega = OUTPUT_CHANGES[self.output_change](self.depth)


class AdminUniformO1(AdminUniform):
    """As `admin_uniform`, with sqrt(n): an output change of O(1)."""

    output_change = "O(1)"


class AdminUniformOn(AdminUniform):
    """As `admin_uniform`, with 1: an output change of O(n), as in Post-LN, but ω is trained."""

    output_change = "O(n)"


class AdminConstant(AdminUniform):
    """As `admin_uniform`, but ω is not trained."""

    def connection(self, sublayer_idx: int) -> nn.Module:
        d_model = self.config.d_model
        return DeepNormConnection(d_model, self.omega) if sublayer_idx > 0 else PostLNConnection(d_model)


class AdminConstantO1(AdminConstant):
    """As `admin_constant`, with sqrt(n)."""

    output_change = "O(1)"


class DeepNorm(ResidualSystem):
    """Post-LN with a constant α on the shortcut and smaller branches (DeepNet, Wang et al., 2022, Figure 2).

    q_proj and k_proj have Xavier-normal weights of gain 1, the others of gain β. For N encoder and M decoder layers:

        encoder   α = 0.81 (N⁴M)^(1/16)    β = 0.87 (N⁴M)^(-1/16)
        decoder   α = (3M)^(1/4)           β = (12M)^(-1/4)
    """

    def __init__(self, config: MarianConfig, stack: str) -> None:
        super().__init__(config, stack)
        self.alpha, beta = deepnorm_constants(config.encoder_layers, config.decoder_layers)[stack]
        gains = dict.fromkeys(self.initializers, beta) | {QUERY: 1.0, KEY: 1.0}
        self.initializers = {name: partial(init.xavier_normal_, gain=gain) for name, gain in gains.items()}

    def connection(self, sublayer_idx: int) -> nn.Module:
        return DeepNormConnection(self.config.d_model, self.alpha)


def deepnorm_constants(n: int, m: int = 0) -> dict[str, tuple[float, float]]:
    """α of the shortcuts and gain β of the branches, by stack, of n encoder and m decoder layers, or of one stack."""
    if not (n and m):
        layers = n or m
        return {"encoder" if n else "decoder": ((2 * layers) ** (1 / 4), (8 * layers) ** (-1 / 4))}
    return {
        "encoder": (0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16)),
        "decoder": ((3 * m) ** (1 / 4), (12 * m) ** (-1 / 4)),
    }


class ReZero(ResidualSystem):
    """No LayerNorm; every layer has one branch scale α that starts at 0 (Bachlechner et al., 2020).

    So a stack starts as the identity.
    """

    def connection(self, sublayer_idx: int) -> nn.Module:
        return ReZeroConnection()

    def connect(self, layer: nn.Module, layer_idx: int) -> None:
        super().connect(layer, layer_idx)
        first, *others = (getattr(layer, sublayer.norm) for sublayer in self.sublayers)
        for connection in others:
            connection.share_alpha(first)


class ReZeroPostLN(ReZero):
    """ReZero's α inside Post-LN (Table 3 of the paper)."""

    def connection(self, sublayer_idx: int) -> nn.Module:
        return ReZeroPostLNConnection(self.config.d_model)


class FixUp(ResidualSystem):
    """No LayerNorm; scaled-down branches that start at 0, scalar multipliers and biases (Zhang et al., 2019).

    With L sub-layers in both stacks, the inner matrices of a branch of m matrices are scaled by L^(-1/(2m-2)), and its
    last one is 0: m = 2 in the feed-forward branch, 4 in attention. The output layer starts at 0, so it is not tied.
    """

    def __init__(self, config: MarianConfig, stack: str) -> None:
        super().__init__(config, stack)
        depth = sum(stack.depth(config) for stack in STACKS.values())
        attention: Initializer = partial(init.xavier_uniform_, gain=2**-0.5 * depth ** (-1 / 6))
        self.initializers = {
            QUERY: attention,
            KEY: attention,
            VALUE: attention,
            OUTPUT: init.zeros_,
            INNER: partial(init.xavier_uniform_, gain=depth ** (-1 / 2)),
            OUTER: init.zeros_,
            "lm_head": init.zeros_,
        }

    def connection(self, sublayer_idx: int) -> nn.Module:
        return FixUpConnection()

    def connect(self, layer: nn.Module, layer_idx: int) -> None:
        super().connect(layer, layer_idx)
        layer.activation_fn = FixUpActivation(layer.activation_fn)  # type: ignore[arg-type]

    def after_stack(self) -> nn.Module:
        return FixUpOutput() if self.stack == "encoder" else nn.Identity()


class DSInit(ResidualSystem):
    """Post-LN whose layer l, counted from 1, has an initialisation smaller by 1/√l (Zhang et al., 2019, section 4.1).

    The depth-scaled initialisation, without the paper's merged attention.
    """

    def connect(self, layer: nn.Module, layer_idx: int) -> None:
        super().connect(layer, layer_idx)
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.initializer = partial(_scaled_, module.initializer, (layer_idx + 1) ** -0.5)  # type: ignore


def _scaled_(initializer: Initializer, scale: float, weight: Tensor) -> None:
    initializer(weight)
    init.copy_(weight, scale * weight)


class LayerNormScaling(PreLN):
    """Pre-LN whose LayerNorms of layer l, counted from 1, are divided by √l (Sun et al., 2025, section 3)."""

    def connection(self, sublayer_idx: int) -> nn.Module:
        return LayerNormScalingConnection(self.config.d_model, 1 + sublayer_idx // len(self.sublayers))


class LayerScale(PreLN):
    """Pre-LN with a trained scale λ on every branch (Touvron et al., 2021, "Going deeper with image Transformers").

    λ starts at 0.1 in stacks of up to 18 layers, at 1e-5 up to 24, at 1e-6 beyond.
    """

    def connection(self, sublayer_idx: int) -> nn.Module:
        layers = self.depth // len(self.sublayers)
        return LayerScaleConnection(self.config.d_model, 0.1 if layers <= 18 else 1e-5 if layers <= 24 else 1e-6)


class GPAS(PreLN):
    """Pre-LN whose outputs are scaled down, but not their gradients (Chen et al., 2025, arXiv:2506.22049)."""

    def connection(self, sublayer_idx: int) -> nn.Module:
        return GPASConnection(self.config.d_model)


class MixLN(PreLN):
    """Post-LN in the first quarter of the layers, Pre-LN in the others (Li et al., 2024, arXiv:2412.13795)."""

    def connection(self, sublayer_idx: int) -> nn.Module:
        layer, layers = sublayer_idx // len(self.sublayers), self.depth // len(self.sublayers)
        return PostLNConnection(self.config.d_model) if layer < layers // 4 else super().connection(sublayer_idx)


class B2T(ResidualSystem):
    """Post-LN that adds the input of a layer before its last LayerNorm (Takase et al., 2022, arXiv:2206.00330)."""

    def connection(self, sublayer_idx: int) -> nn.Module:
        is_last = (sublayer_idx + 1) % len(self.sublayers) == 0
        return B2TConnection(self.config.d_model) if is_last else PostLNConnection(self.config.d_model)


class Keel(ResidualSystem):
    """Post-LN with a shortcut times α and a LayerNorm before each branch (Chen and Wei, 2026, arXiv:2601.19895).

    α is the number of sub-layers of the stack.
    """

    def connection(self, sublayer_idx: int) -> nn.Module:
        return KeelConnection(self.config.d_model, float(self.depth))


def _mirrored_xavier_(weight: Tensor, dim: int) -> None:
    init.xavier_uniform_(weight)
    half = weight.chunk(2, dim)[0]
    init.copy_(weight, torch.cat([half, -half], dim))


class LookLinear(ResidualSystem):
    """Post-LN whose feed-forward branches start as linear maps (Balduzzi et al., 2017).

    The second half of fc1's rows is minus the first, B and −B, and that of fc2's columns too, A and −A:
    A relu(Bx) − A relu(−Bx) = ABx.
    """

    initializers = ResidualSystem.initializers | {
        INNER: partial(_mirrored_xavier_, dim=0),
        OUTER: partial(_mirrored_xavier_, dim=1),
    }

    def __init__(self, config: MarianConfig, stack: str) -> None:
        super().__init__(config, stack)
        if (width := getattr(config, f"{stack}_ffn_dim")) % 2:
            raise ValueError(f"{stack}_ffn_dim={width} must be even: looklinear mirrors one half in the other.")
        if config.activation_function != "relu":
            raise ValueError(
                f"activation_function={config.activation_function!r} must be 'relu', with which looklinear makes the "
                "feed-forward branches linear."
            )


# The values that `encoder_residual` and `decoder_residual` of an AdminConfig can take.
SYSTEMS: dict[str, type[ResidualSystem]] = {
    "admin": Admin,
    "post_ln": PostLN,
    "pre_ln": PreLN,
    "rezero": ReZero,
    "rezero_post_ln": ReZeroPostLN,
    "fixup": FixUp,
    "looklinear": LookLinear,
    "deepnorm": DeepNorm,
    "admin_uniform": AdminUniform,
    "admin_uniform_o1": AdminUniformO1,
    "admin_uniform_on": AdminUniformOn,
    "admin_constant": AdminConstant,
    "admin_constant_o1": AdminConstantO1,
    "ds_init": DSInit,
    "b2t": B2T,
    "keel": Keel,
    "mix_ln": MixLN,
    "layer_norm_scaling": LayerNormScaling,
    "layer_scale": LayerScale,
    "gpas": GPAS,
}


def residual_system(config: MarianConfig, stack: str) -> ResidualSystem:
    """Return the system that the configuration chooses for a stack, `"encoder"` or `"decoder"`.

    Raises:
        ValueError: there is no system of that name, or it cannot work with the rest of the configuration.
    """
    field = f"{stack}_residual"
    if (name := getattr(config, field)) not in SYSTEMS:
        raise ValueError(
            f"{field}={name!r} is not a residual system; choose one of {', '.join(SYSTEMS)}, "
            "or add your own to admin_hf.residual.SYSTEMS first."
        )
    return SYSTEMS[name](config, stack)


__all__ = [
    "SYSTEMS",
    "AdminConnection",
    "PostLNConnection",
    "PreLNConnection",
    "ResidualConnection",
    "ResidualSystem",
    "ScaleModule",
    "profiled_connections",
    "residual_connections",
    "residual_system",
]

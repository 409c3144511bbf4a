"""Gradient norms at sub-layer outputs (section 3.1, Fig. 3): in which stack gradients vanish, and where."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import exp, log
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..architecture import STACKS
from ..families import stack_layers
from ..modeling_admin import AdminForConditionalGeneration
from ..observation import connections_of, observed_connections
from .inputs import Batch, ByStack, residual_name, training_loss


# A stack whose lowest sub-layer gets less than this share of the highest one's gradient has vanishing gradients.
VANISHING = 0.1


@dataclass(frozen=True)
class StackGradients:
    """The gradients of one stack.

    Attributes:
        system: the residual system, such as `"post_ln"`; a label only.
        names: the residual connections' names below the stack, in execution order.
        kinds: the kinds of their branches, such as `"self-attention"`.
        relative_norms: ‖Δx_i‖₂ / max_j ‖Δx_j‖₂ of each sub-layer's output, the maximum over the stack.
        largest_norm: max_j ‖Δx_j‖₂; 0 if the loss has no gradient, as before FixUp's first update.
    """

    system: str
    names: list[str]
    kinds: list[str]
    relative_norms: list[float]
    largest_norm: float

    def lowest_to_highest(self) -> float:
        """‖Δx_1‖₂ / ‖Δx_N‖₂."""
        return self.relative_norms[0] / self.relative_norms[-1]

    def steps(self) -> dict[str, float]:
        """‖Δx_{i-1}‖₂ / ‖Δx_i‖₂, the factor by which a step back through a sub-layer changes the gradient: geometric
        means by the kind of its branch."""
        logs: dict[str, list[float]] = {}
        for kind, factor in zip(self.kinds[1:], self.factors(), strict=True):
            logs.setdefault(kind, []).append(log(factor))
        return {branch: exp(fmean(values)) for branch, values in logs.items()}

    def factors(self) -> list[float]:
        """‖Δx_{i-1}‖₂ / ‖Δx_i‖₂ for i = 2 … N. Theorem 1 says of Post-LN encoders that none is below 1."""
        return [before / after for before, after in zip(self.relative_norms, self.relative_norms[1:], strict=False)]

    def verdict(self) -> str:
        if not all(self.relative_norms):
            return f"({self.system}): no gradient reaches its lowest sub-layers."
        vanishes = self.lowest_to_highest() < VANISHING
        text = f"({self.system}): gradients {'vanish' if vanishes else 'do not vanish'}, "
        text += f"‖Δx_1‖ is {self.lowest_to_highest():.2g} ‖Δx_{len(self.names)}‖"
        if vanishes:
            steps = [f"{factor:.2f} through {branch}" for branch, factor in sorted(self.steps().items())]
            text += f" (a step back multiplies by {', '.join(steps)})"
        if (factors := self.factors()) and "encoder-attention" not in self.kinds:
            holds = sum(factor >= 1 for factor in factors)
            text += f"; ‖Δx_i-1‖ ≥ ‖Δx_i‖ (Theorem 1) in {holds} of {len(factors)} steps"
            text += f", and {min(factors):.3f} ‖Δx_i‖ at least" if holds < len(factors) else ""
        return text + "."


@dataclass(frozen=True)
class GradientNorms(ByStack[StackGradients]):
    """The result of [`gradient_norms`]."""

    EXPECTATION: ClassVar[str] = (
        "at initialisation gradients vanish in the Post-LN decoder (and in Admin's, which is Post-LN in form), mostly "
        "through encoder-attention; not in the Post-LN encoder, nor in Pre-LN (18 layers, Fig. 3)."
    )


def gradient_norms(model: AdminForConditionalGeneration, batch: Batch) -> GradientNorms:
    """Measure ‖Δx_i‖₂, the norm of the training loss's gradient at each sub-layer's output, without dropout.

    Only norms are kept. The only weight whose gradient is computed is the embedding. Weights, their gradients and
    modes are not changed.

    Args:
        model: fresh (with ω already initialised) or trained.
        batch: `input_ids`, `labels` and other arguments of the model's forward.

    Raises:
        ValueError: the batch has no labels, or the loss is not finite.

    Example:

    ```python
    >>> from admin_hf import AdminConfig
    >>> from admin_hf.analysis import gradient_norms, initialized_model, random_batch

    >>> config = AdminConfig(vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2)
    >>> norms = gradient_norms(initialized_model(config), random_batch(config))
    >>> len(norms.decoder.relative_norms), max(norms.decoder.relative_norms)
    (6, 1.0)

    ```
    """
    if batch.get("labels") is None and not hasattr(model, "injection"):
        raise ValueError(f"The batch has no labels, which the loss needs; got {', '.join(batch) or 'nothing'}.")
    connections, bottom = connections_of(model), _below_stacks(model)
    measured: dict[str, dict[str, float]] = {name: {} for name in connections}
    observers = {name: partial(_observe, norms) for name, norms in measured.items()}
    with _only_needs_gradient(model, bottom), observed_connections(model, observers), torch.enable_grad():
        loss = training_loss(model, batch)
        if loss is None:
            raise ValueError(f"The model returns no loss for this batch; got {', '.join(batch) or 'nothing'}.")
        if not bool(loss.isfinite()):
            raise ValueError(f"The training loss is {loss.item()}: the model or the batch is not usable.")
        torch.autograd.grad(loss, bottom, allow_unused=True)
    injection = getattr(model, "injection", None)
    descriptions = STACKS if injection is None else injection.descriptions
    stacks = {}
    for stack, norms in measured.items():
        names = [name for name, _ in connections[stack]]
        kinds = [descriptions[stack].sublayer(name).kind for name in names]
        largest = max(norms.values())
        relative = [norms[name] / (largest or 1.0) for name in names]
        stacks[stack] = StackGradients(residual_name(model, stack), names, kinds, relative, largest)
    return GradientNorms(stacks)


def _below_stacks(model: Any) -> list[Tensor]:
    """The weights before the stacks, which the gradient must pass: usually the embeddings."""
    if (injection := getattr(model, "injection", None)) is None:
        base = model.base_model
        return [*{stack.embed_tokens.weight for stack in (base.encoder, base.decoder)}]  # one where it is shared
    inner = {
        id(p) for stack in injection.descriptions.values() for p in stack_layers(injection.base, stack).parameters()
    }
    return [p for p in injection.base.parameters() if id(p) not in inner and p.is_floating_point()]


def _observe(norms: dict[str, float], name: str, connection: Any, args: tuple, output: Tensor) -> None:
    """Note the norm of the gradient at a connection's output x_i when it is computed."""
    scale = connection.output_scale  # of what is put out, instead of x_i
    output.register_hook(lambda gradient: norms.__setitem__(name, float((gradient.float() * scale).norm())))


@contextmanager
def _only_needs_gradient(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Freeze everything except `weights`, so that the other gradients take neither time nor memory."""
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in needed:
            parameter.requires_grad_(any(parameter is weight for weight in weights))
        yield
    finally:
        for parameter, before in needed:
            parameter.requires_grad_(before)


__all__ = ["GradientNorms", "StackGradients", "gradient_norms"]

"""Additions to Trainer for the recipe of the paper and its code: RAdam, warm-up from above 0, smallest loss scale."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


RADAM = "radam"


def radam(learning_rate: float, betas: tuple[float, float], eps: float) -> tuple[type[Optimizer], dict[str, Any]]:
    """PyTorch's RAdam with decoupled weight decay, as class and arguments.

    In the first updates, its variance cannot be estimated. PyTorch's RAdam then takes a step of momentum alone; that
    of the paper's code takes none.
    """
    return torch.optim.RAdam, {"lr": learning_rate, "betas": betas, "eps": eps, "decoupled_weight_decay": True}


def warm_up_from(scheduler: LambdaLR, initial: float, warmup_steps: int) -> LambdaLR:
    """The same schedule with a linear warm-up that starts at `initial`, a share of the peak, instead of 0.

    Args:
        scheduler: one of Transformers' schedules, all of which warm up linearly from 0.
        initial: the first update's learning rate, divided by the peak's.
        warmup_steps: updates until the peak.
    """

    def raised(factor: Any) -> Any:
        return lambda step: initial + (1 - initial) * factor(step) if step < warmup_steps else factor(step)

    return LambdaLR(scheduler.optimizer, [raised(factor) for factor in scheduler.lr_lambdas])


def skipping_optimizer(optimizer: Any) -> Optimizer | None:
    """The innermost optimiser of accelerate's wrappers, if it can skip an update without asking the host.

    PyTorch's fused optimisers change nothing, neither weights nor their own state, in an update for which the
    attribute `found_inf` is a float32 tensor of 1.0; a GradScaler sets it, too.

    Returns:
        The optimiser; None if it cannot, or if its weights are sharded over processes, because the attribute would
        then have to be sharded as well.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    return None if any(hasattr(weight, "full_tensor") for weight in weights) else optimizer


class LossScaleClamp:
    """Keeps the loss scale of float16 at or above a smallest value, and counts overflows there.

    A gradient that overflows halves the scale; a model that diverges overflows at any scale. So the scale is clamped,
    and repeated overflows at the clamp indicate divergence. No number is read: scales and counts are scalar tensors.

    Args:
        min_scale: the smallest scale.
        device: the scaler's.
    """

    def __init__(self, min_scale: float, device: torch.device | str = "cpu") -> None:
        self.min_scale = torch.tensor(min_scale, dtype=torch.float32).item()  # as the scaler holds it
        self._one = torch.ones((), device=device)
        self._overflows = torch.zeros((), device=device)

    def scale(self, scaler: torch.amp.GradScaler) -> Tensor:
        """The loss scale as it is now, float32."""
        return scaler.scale(self._one)

    def update(self, scaler: torch.amp.GradScaler, scale_before: Tensor) -> Tensor:
        """Clamp after the scaler's own update of a step that was computed with `scale_before`.

        Returns:
            The number of overflows in a row at the clamp, float32.
        """
        # Not accelerate's `optimizer_step_was_skipped`: fused optimisers skip by themselves, which it does not see
        scale = self.scale(scaler)
        overflowed_there = (scale < scale_before) & (scale_before <= self.min_scale)
        self._overflows = (self._overflows + 1) * overflowed_there
        scaler.update(scale.clamp(min=self.min_scale))
        return self._overflows

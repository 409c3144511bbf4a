"""What the paper's recipe adds to Trainer: RAdam, a warm-up that starts above 0, a loss scale with a lower bound."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR


RADAM = "radam"


def radam(
    learning_rate: float, betas: tuple[float, float], eps: float
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """PyTorch's RAdam with decoupled weight decay, as class and arguments.

    While its variance cannot be estimated, the first updates, PyTorch's takes a step of momentum alone; that of the
    paper's code takes none.
    """
    return torch.optim.RAdam, {"lr": learning_rate, "betas": betas, "eps": eps, "decoupled_weight_decay": True}


def warm_up_from(scheduler: LambdaLR, initial: float, warmup_steps: int) -> LambdaLR:
    """The same schedule with a linear warm-up that starts at `initial`, a share of the peak, in place of 0.

    Args:
        scheduler: one of Transformers' schedules, all of which warm up linearly from 0.
        initial: the first update's learning rate, divided by the peak's.
        warmup_steps: updates until the peak.
    """

    def raised(factor: Any) -> Any:
        return lambda step: initial + (1 - initial) * factor(step) if step < warmup_steps else factor(step)

    return LambdaLR(scheduler.optimizer, [raised(factor) for factor in scheduler.lr_lambdas])


class LossScaleClamp:
    """Keeps the loss scale of float16 at or above a smallest value, and counts overflows there.

    A gradient that overflows halves the scale; a model that diverges overflows at any scale. So the scale is clamped,
    and overflow after overflow at the clamp is what divergence looks like.

    Args:
        min_scale: the smallest scale.
    """

    def __init__(self, min_scale: float) -> None:
        self.min_scale = torch.tensor(min_scale, dtype=torch.float32).item()  # as the scaler holds it
        self.overflows = 0

    def update(self, scaler: torch.amp.GradScaler, scale_before: float) -> int:
        """Clamp after the scaler's own update; returns the number of overflows in a row at the clamp.

        Args:
            scaler: the scaler, already updated for this step.
            scale_before: the scale that the step was computed with.
        """
        # Not accelerate's `optimizer_step_was_skipped`: fused optimisers skip by themselves, which it does not see
        overflow = scaler.get_scale() < scale_before
        if scaler.get_scale() < self.min_scale:
            scaler.update(self.min_scale)
        self.overflows = self.overflows + 1 if overflow and scale_before <= self.min_scale else 0
        return self.overflows

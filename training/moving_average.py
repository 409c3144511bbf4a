"""The exponential moving average of the weights in training, which is evaluated, saved and exported."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from .errors import InputError


WEIGHTS_NAME = "training_weights.safetensors"  # in a checkpoint: training continues from these


class MovingAverage(TrainerCallback):
    """Averages all trained weights, including ω, after each update.

    After update t the average moves to the weights by a share of 1 − d, where d = min(decay, (1 + t) / (10 + t)), as
    in TensorFlow's ExponentialMovingAverage: so the first weights are soon forgotten. Updates that float16 skips do
    not count. All processes have equal weights, and so equal averages.

    Args:
        model: the trained model; tied weights count once.
        decay: from 0 to 1; the last 1 / (1 − decay) updates make most of the average.

    Attributes:
        average: of each trained weight, in float32, by its name; empty before the first update.

    Raises:
        InputError: a weight is not in float32; in half precision, the changes of an average are lost in rounding.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        # The weights that training continues from, while the model has the average
        self._training: dict[str, Tensor] = {}
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        for name, weight in self._weights.items():
            if decay and weight.dtype != torch.float32:
                raise InputError(
                    f"--ema_decay {decay} needs weights in float32, but {name} is in {weight.dtype}: leave it out, or "
                    "start from a model that was saved in float32."
                )

    @torch.no_grad()
    def on_step_end(self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):
            return
        if not self.average:
            self.average = {name: weight.detach().clone() for name, weight in self._weights.items()}
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_([*self.average.values()], [*self._weights.values()], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the average, if there is one, and restore its weights afterwards, bit for bit."""
        self._training = {name: self._weights[name].detach().clone() for name in self.average}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(self._training)
            self._training = {}

    def finish(self) -> None:
        """Give the model the average permanently: training is over."""
        self._copy(self.average)
        self.average = {}

    def save(self, checkpoint: Path) -> None:
        """Write the weights that training continues from, next to the average of [`in_place`]."""
        if self._training:
            save_file(self._training, checkpoint / WEIGHTS_NAME)

    def load(self, checkpoint: Path) -> None:
        """Resume from a checkpoint whose model, the average, has been loaded.

        One without an optimiser has no other weights either, so training continues from the average.
        """
        self.average = {name: weight.detach().clone() for name, weight in self._weights.items()}
        if (file := checkpoint / WEIGHTS_NAME).is_file():
            self._copy(load_file(file))

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._weights[name].copy_(weight)

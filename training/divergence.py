"""Divergence is a result: the run stops with a sentence and a record, and its earlier files stay unchanged."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from admin_hf.checkpoints import write_whole
from admin_hf.observation import observed
from admin_hf.run.folder import DIVERGENCE_NAME


# Overflows in a row at the smallest loss scale that are divergence
MAX_OVERFLOWS = 10


class Divergence(RuntimeError):
    """Training has diverged. `run_translation.py` exits with 3.

    Args:
        reason: a readable sentence.
        step: number of updates before.
        loss: loss of the update that showed it.
        scale: the loss scale of float16 at that time, if there is one.
        layer: the first module whose output is not finite; else the parameter closest to the loss whose gradient is
            not finite, if any.
    """

    def __init__(self, reason: str, step: int, loss: float, scale: float | None = None, layer: str | None = None):
        super().__init__(reason)
        self.record = {
            "reason": reason,
            "step": step,
            "loss": loss if abs(loss) < float("inf") else str(loss),  # JSON has no NaN
            "scale": scale,
            "first_non_finite": layer,
        }

    def save(self, folder: Path, checkpoint: str | None) -> None:
        """Write the record, with the last good checkpoint, as `divergence.json`."""
        text = json.dumps(self.record | {"last_checkpoint": checkpoint}, indent=1)
        write_whole(folder / DIVERGENCE_NAME, text + "\n")


def first_non_finite(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Find the first module in a forward pass whose output is not finite, else the first such gradient backwards.

    Gradients are computed again, because clipping makes all of them NaN if one is. The model's own gradients count if
    they come from other batches.

    Args:
        model: the bare model; its random state and gradients are not changed.
        inputs: the batch to check, with labels.

    Returns:
        A module's or parameter's name, or None if all is finite.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else output.values() if isinstance(output, Mapping) else [output]
        if any(isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all() for x in tensors):
            found.append(name or type(model).__name__)

    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.random.fork_rng():
        with observed(model.named_modules(), look):
            loss = model(**inputs).loss
        # Also where an output is not finite: sharded models need all processes to do the same
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    if found:
        return found[0]
    names, held = (_non_finite(weights, x) for x in (gradients, [weight.grad for weight in weights.values()]))
    if not names and len(held) < len(weights):
        names = held
    return names[-1] if names else None


def _non_finite(names: Iterable[str], tensors: Iterable[Tensor | None]) -> list[str]:
    pairs = zip(names, tensors, strict=True)
    return [name for name, x in pairs if x is not None and not x.isfinite().all()]

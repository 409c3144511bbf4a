"""Gradients and updates during training (Fig. 5 and 11 of the paper), from the checkpoints of a run.

For the matrices of the encoder's self-attention, W_Q, W_K, W_V and W_O (the paper calls the last two W_V1 and W_V2),
and each pair of consecutive checkpoints W_t and W_{t+1}:

    ‖∇L(W_t)‖₂  and  ‖W_{t+1} − W_t‖₂,  each divided by the largest in the network (of all layers and matrices)

L is the training loss on one batch, without dropout.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import ClassVar

import torch

from ..architecture import ENCODER, KEY, OUTPUT, QUERY, VALUE
from .inputs import Batch, load_model, read_tensors, training_loss


MATRICES = {QUERY: "W_Q", KEY: "W_K", VALUE: "W_V", OUTPUT: "W_O"}

_ATTENTION = ENCODER.sublayers[0].ends.removesuffix(f".{OUTPUT}")
_WEIGHT = re.compile(rf"model\.{ENCODER.path}\.(\d+)\.{_ATTENTION}\.({'|'.join(MATRICES)})\.weight")

# By the name of the projection, a norm for each layer
LayerNorms = dict[str, list[float]]


@dataclass(frozen=True)
class UpdateNorms:
    """The result of [`update_norms`].

    Attributes:
        checkpoints: the folders' names, one more than there are updates.
        gradients, updates: relative norms, for each update by projection (`"q_proj"`, `"k_proj"`, `"v_proj"`,
            `"out_proj"`) and layer; the largest of an update is 1.
    """

    EXPECTATION: ClassVar[str] = (
        "Fig. 5 and 11: gradients differ much between the layers and matrices of the encoder's self-attention, while "
        "the updates that an adaptive optimizer makes of them are of about one size."
    )

    checkpoints: list[str]
    gradients: list[LayerNorms]
    updates: list[LayerNorms]

    def verdict(self) -> str:
        """The ratio of the largest to the smallest norm, for gradients and for updates."""
        all_gradients, all_updates = (_median_ratio(map(_flat, norms)) for norms in (self.gradients, self.updates))
        gradients, updates = (
            _median_ratio(layers for matrices in norms for layers in matrices.values())
            for norms in (self.gradients, self.updates)
        )
        found = "more balanced than" if updates < gradients else "not more balanced than"
        return (
            f"Updates are {found} gradients: between the layers of a matrix the largest norm is {updates:.3g} times "
            f"the smallest for updates and {gradients:.3g} times for gradients; between all layers and matrices "
            f"{all_updates:.3g} and {all_gradients:.3g} times (medians over {len(self.updates)} updates)."
        )


def update_norms(checkpoints: Sequence[str | os.PathLike], batch: Batch) -> UpdateNorms:
    """Measure gradients and updates from one checkpoint of a run to the next.

    Differences are read matrix by matrix. For the gradients, one model at a time is in memory, for one backward pass.

    Args:
        checkpoints: two or more folders in the order of their updates.
        batch: the batch for the gradients, with labels.

    Raises:
        OSError: weights are missing, damaged, or a pickle.
        ValueError: fewer than two checkpoints, checkpoints of different models or with the same weights, or a batch
            without labels.

    Example:

    ```python
    from admin_hf.analysis import run_checkpoints, update_norms

    print(update_norms(run_checkpoints("runs/en-de"), batch).verdict())
    ```
    """
    folders = [Path(checkpoint) for checkpoint in checkpoints]
    if len(folders) < 2:
        raise ValueError(
            f"There are {len(folders)} checkpoints; an update is the difference between two, so name two or more."
        )
    if batch.get("labels") is None:
        raise ValueError(f"The batch has no labels, which the gradient needs: got {', '.join(batch) or 'nothing'}.")
    updates = [_update(before, after) for before, after in zip(folders, folders[1:], strict=False)]
    gradients = [_gradient(folder, batch) for folder in folders[:-1]]
    return UpdateNorms([folder.name for folder in folders], gradients, updates)


def _update(before: Path, after: Path) -> LayerNorms:
    """‖W_{t+1} − W_t‖₂ of two checkpoints."""
    norms = {}
    old, new = (read_tensors(folder, lambda name: bool(_WEIGHT.fullmatch(name))) for folder in (before, after))
    for (name, W_t), (other, W_next) in zip_longest(old, new, fillvalue=("nothing", torch.empty(0))):
        if name != other or W_t.shape != W_next.shape:
            raise ValueError(
                f"{after} contains another model than {before}: {other} {tuple(W_next.shape)}, expected {name} "
                f"{tuple(W_t.shape)}."
            )
        norms[name] = float((W_next.double() - W_t.double()).norm())
    if not any(norms.values()):
        raise ValueError(f"{after} has the weights of {before}: there is no update between them.")
    return _relative(norms)


def _gradient(folder: Path, batch: Batch) -> LayerNorms:
    """‖∇L(W_t)‖₂ of a checkpoint."""
    model = load_model(folder)
    weights = {name: W for name, W in model.named_parameters() if _WEIGHT.fullmatch(name)}
    gradients = torch.autograd.grad(training_loss(model, batch), list(weights.values()))
    return _relative(
        {name: float(gradient.double().norm()) for name, gradient in zip(weights, gradients, strict=True)}
    )


def _relative(norms: dict[str, float]) -> LayerNorms:
    """Norms by the weights' names, divided by the largest and sorted into projections and layers."""
    largest = max(norms.values()) or 1.0  # all are 0 where the loss has no gradient
    found = {match.groups(): norms[name] / largest for name in norms if (match := _WEIGHT.fullmatch(name))}
    layers = sorted({int(layer) for layer, _ in found})
    return {projection: [found[str(layer), projection] for layer in layers] for projection in MATRICES}


def _flat(norms: LayerNorms) -> list[float]:
    return [norm for layers in norms.values() for norm in layers]


def _median_ratio(groups: Iterable[list[float]]) -> float:
    """The median over groups of largest over smallest; infinite where most have a zero."""
    return median(max(group) / min(group) if min(group) > 0 else float("inf") for group in groups)

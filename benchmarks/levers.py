"""What each lever is worth: a training step without it, against one with all of them."""

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from admin_hf import kernels, modeling_admin

from . import systems
from .record import Settings, conditions, cost
from .systems import DTYPES, SHAPES, Shape
from .turns import Turns, take_turns


TITLE = "What each lever is worth"
ABOUT = (
    "A training step of the tiny shape without one of the levers, in units of the step with all of them. They are the "
    "functions named here, and the plain computation that stands in for each is in `benchmarks/levers.py`:"
)


def measure(settings: Settings, shape: Shape = SHAPES["tiny"]) -> dict[str, Any]:
    figures, measured = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            options: dict[str, Any] = {"shape": shape, "dtype": dtype, "folder": Path(folder)}
            turns = {"all levers": partial(systems.ours, **options)}
            turns |= {f"without {lever}": partial(without, lever=lever, **options) for lever in LEVERS}
            measured[dtype] = take_turns(turns, settings.rounds, settings.threads, f"levers, {dtype}")
            pairs = [(f"without {lever}", "all levers") for lever in LEVERS]
            figures += [cost(dtype, measured[dtype], *pair, "updates") for pair in pairs]
    return conditions(settings) | {"shape": asdict(shape), "measured": measured, "figures": figures}


def without(turns: Turns, lever: str, shape: Shape, dtype: str, folder: Path) -> None:
    """Train with the plain computation in place of a lever."""
    if lever in REPLACED:
        patch.object(*REPLACED[lever]).start()
    changes = {"keep_freed_memory": False} if lever == MEMORY else {}
    trainer = systems.our_batch_trainer(shape, dtype, folder, **changes)
    if lever == ATTENTION:
        trainer.model.set_attn_implementation("sdpa")
    systems.train_on_random_batches(turns, trainer, shape)


# --- the plain computations -----------------------------------------------------------------------


def plain_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, *of_loss: Any) -> tuple[Tensor, Tensor]:
    """The loss through the logits of the whole batch; without smoothing, as the benchmarks train."""
    labels, *_, num_items_in_batch = of_loss
    logits = nn.functional.linear(hidden, weight) + bias
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    loss = loss / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)
    return loss, loss.detach()


def plain_relu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    return kernels.dropout(nn.functional.relu(x), p, training)


def never(x: Tensor, p: float) -> bool:
    return False


MEMORY, ATTENTION = "`keep_freed_memory`", "`admin_attention`"
# The product has no options for these, which would choose what is slower; each process replaces one in itself
REPLACED: dict[str, tuple[Any, str, Any]] = {
    "`linear_cross_entropy`": (modeling_admin, "linear_cross_entropy", plain_cross_entropy),
    "`dropout` and `relu_dropout`": (kernels, "_draws_bits", never),
    "`relu_dropout`": (modeling_admin, "relu_dropout", plain_relu_dropout),
}
LEVERS = (*REPLACED, MEMORY, ATTENTION)

"""What each lever is worth: a training step without it, against one with all of them."""

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from admin_hf import allocator, kernels, modeling_admin, pretrained

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
            step = partial(systems.ours, shape=shape, dtype=dtype, folder=Path(folder))
            levers = [lever for lever in LEVERS if dtype == "bfloat16" or lever not in BFLOAT16_ONLY]
            turns: dict[str, Any] = {"all levers": step}
            turns |= {f"without {lever}": partial(without, lever=lever, step=step) for lever in levers}
            measured[dtype] = take_turns(turns, settings.rounds, settings.threads, f"levers, {dtype}")
            pairs = [(f"without {lever}", "all levers") for lever in levers]
            figures += [cost(dtype, measured[dtype], *pair, "updates") for pair in pairs]
    return conditions(settings) | {"shape": asdict(shape), "measured": measured, "figures": figures}


def without(turns: Turns, lever: str, step: Any) -> None:
    """Train with the plain computation in place of a lever."""
    module, name, plain = LEVERS[lever]
    setattr(module, name, plain)
    step(turns)


# --- the plain computations -----------------------------------------------------------------------


def plain_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    pad_token_id: int,
    label_smoothing: float,
    num_items_in_batch: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """The loss through the logits of the whole batch; without smoothing, as the benchmarks train."""
    logits = nn.functional.linear(hidden, weight) + bias
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    loss = loss / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)
    return loss, loss.detach()


def plain_relu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    return kernels.dropout(nn.functional.relu(x), p, training)


def never(x: Tensor, p: float) -> bool:
    return False


def nothing(*args: Any) -> Any:
    return args[0] if args else None


LEVERS: dict[str, tuple[Any, str, Any]] = {
    "`linear_cross_entropy`": (modeling_admin, "linear_cross_entropy", plain_cross_entropy),
    "`dropout` and `relu_dropout`": (kernels, "_draws_bits", never),
    "`relu_dropout`": (modeling_admin, "relu_dropout", plain_relu_dropout),
    "`keep_freed_memory`": (allocator, "_has_glibc", nothing),
    "`admin_attention`": (pretrained, "ADMIN_ATTENTION", "sdpa"),
    "one cast for q, k and v": (modeling_admin, "cast_once", nothing),
}
BFLOAT16_ONLY = ("one cast for q, k and v",)

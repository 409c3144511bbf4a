"""What each lever is worth: a training step without it, against one with all of them."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from admin_hf import kernels

from . import systems
from .record import Settings, conditions, cost
from .systems import DTYPES, SHAPES, Shape
from .turns import Turns, take_turns


TITLE = "What each lever is worth"
ABOUT = (
    "A training step of the tiny shape without one of the levers, in units of the step with all of them. The levers "
    "are the functions named here. `benchmarks/levers.py` has the plain computation that replaces each:"
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
    """Train with the plain computation instead of a lever."""
    changes = {"keep_freed_memory": False} if lever == MEMORY else {}
    trainer = systems.our_batch_trainer(shape, dtype, folder, **changes)
    model = trainer.model
    if lever == ATTENTION:
        model.set_attn_implementation("sdpa")
    if plain := PLAIN.get(lever):
        layers = [*model.model.encoder.layers, *model.model.decoder.layers]
        for module in [model.lm_head] if plain is PlainOutput else layers:
            module.__class__ = type(type(module).__name__, (plain, type(module)), {})
    systems.train_on_random_batches(turns, trainer, shape)


# --- the plain computations -----------------------------------------------------------------------


class PlainOutput:
    """An output layer with a forward pass of its own, as an adapter has: the loss is computed from its logits."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class PlainRelu:
    """A layer with ReLU and its dropout apart."""

    def feed_forward(self: Any, x: Tensor) -> Tensor:
        return self.fc2(kernels.dropout(nn.functional.relu(self.fc1(x)), self.activation_dropout, self.training))


class PlainDropout:
    """A layer with PyTorch's dropout."""

    def residual(self: Any, connection: Any, x: Tensor, branch: Callable[[Tensor], Tensor], *others: Any) -> Tensor:
        f = branch(kernels.cast_once(connection.branch_input(x)))
        return connection(x, nn.functional.dropout(f, self.dropout, self.training))

    def feed_forward(self: Any, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.fc1(x))
        return self.fc2(nn.functional.dropout(x, self.activation_dropout, self.training))


MEMORY, ATTENTION = "`keep_freed_memory`", "`admin_attention`"
# The product has no options for these, which would choose what is slower: modules get another class
PLAIN: dict[str, type] = {
    "`linear_cross_entropy`": PlainOutput,
    "`dropout` and `relu_dropout`": PlainDropout,
    "`relu_dropout`": PlainRelu,
}
LEVERS = (*PLAIN, MEMORY, ATTENTION)

"""Position tables that a model cannot compute again, such as fairseq's: they are saved with its weights.

Marian's loader reads a table from a file. But `save_pretrained` leaves out every table, since the standard one,
sinusoids counted from 0, is computed again. Another table would be lost without a warning.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding


# The models that compute Marian's table have run in one of these
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def position_tables(model: torch.nn.Module) -> Iterator[tuple[str, MarianSinusoidalPositionalEmbedding]]:
    """Yield the position tables of a Marian or Admin model and their names."""
    for name, module in model.named_modules():
        if isinstance(module, MarianSinusoidalPositionalEmbedding):
            yield name, module


@lru_cache(maxsize=4)
def standard_table(length: int, width: int) -> Tensor:
    """The table that Marian computes, `(length, width)` in float32."""
    with torch.device("meta"):  # a constructor draws no random numbers there
        module = MarianSinusoidalPositionalEmbedding(length, width)
    with torch.device("cpu"):
        return cast(Tensor, module.create_weight()).float()


def is_standard(table: Tensor) -> bool:
    """Whether a table, `(length, width)`, is the standard one, possibly rounded to half precision."""
    standard, table = standard_table(*table.shape), table.detach().cpu().double()
    return any(table.allclose(standard.to(dtype).double(), rtol=0, atol=1e-6) for dtype in _DTYPES)


def save_own_tables(model: Any, weights: Mapping[str, Tensor] | None = None) -> None:
    """Let `save_pretrained` of this model write its position tables, unless they are standard.

    Call it whenever the tables may have changed. Stock classes do not do this: a model that they load from the folder
    has the tables, but loses them when it is saved again.

    Args:
        model: a model of any class; one without such tables is not changed.
        weights: the model's state dict, if its own weights are sharded over processes.
    """
    tables = {f"{name}.weight": module.weight for name, module in position_tables(model)}
    if weights is not None:
        tables = {name: weights[name] for name in tables if name in weights}
    own = {name for name, table in tables.items() if table.device.type != "meta" and not is_standard(table)}
    if own:
        model._keys_to_ignore_on_save = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) - own

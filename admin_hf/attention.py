"""Attention of all Admin models, as an attention implementation of Transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from .kernels import autocast_dtype
from .kernels import dropout as cpu_dropout
from .short_attention import fits, short_attention


ADMIN_ATTENTION = "admin"  # the default attention of a model
CPU_ATTENTION = "admin_cpu"
"""The former name of the attention that all Admin models have, `"admin"`: an `attn_implementation`."""

# PyTorch's softmax takes up to 20 times as long for an entry of a row that is shorter than a vector register, which
# holds 16 float32 with AVX-512: 56 ns in rows of 15, 2.6 ns in rows of 16 (one thread)
SHORTEST_ROW = 16


def admin_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention computed as its formula, ``dropout(softmax(q kᵀ · scaling + mask)) v``, in train mode on a CPU.

    Elsewhere, and under `torch.compile`, it is PyTorch's fused attention. On a CPU, the latter has no dropout, and its
    backward pass in bfloat16 takes about eight times as long as this one. Compared with PyTorch's plain path, which
    has dropout, this one has cheap random bits and no short rows for softmax: with PyTorch's, a training step of a
    small model takes 1.06 times as long in float32, and 1.23 times in bfloat16. Weights are never returned; use
    `"eager"` for that.

    Args:
        query: `(batch_size, heads, target_length, head_size)`.
        key, value: `(batch_size, heads, source_length, head_size)`.
        attention_mask: `(batch_size, 1, target_length, source_length)`, added to the products; or, if bool, True for
            positions that are attended to.

    Returns:
        The output, `(batch_size, target_length, heads, head_size)`, and None.
    """
    if _takes_short_rows(module, query, key, attention_mask):
        return short_attention(query, key, value, attention_mask, scaling, dropout), None
    if query.device.type != "cpu" or not module.training or torch.compiler.is_compiling():
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scores = query @ key.transpose(2, 3) * scaling
    if (
        attention_mask is not None and attention_mask.dtype == torch.bool
    ):  # the caller's own mask; PyTorch accepts it too
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    keys = scores.shape[-1]
    if keys < SHORTEST_ROW:
        scores = nn.functional.pad(scores, (0, SHORTEST_ROW - keys), value=-torch.inf)
    weights = scores.softmax(dim=-1).to(value.dtype)
    weights = cpu_dropout(weights, dropout, training=True)[..., :keys]
    return (weights @ value).transpose(1, 2).contiguous(), None


def _takes_short_rows(module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether this is a compiled training pass on a GPU, and short enough for the kernel that is made for it."""
    if not (torch.compiler.is_compiling() and query.device.type == "cuda" and module.training and fits(query, key)):
        return False
    if attention_mask is None:
        return not getattr(module, "is_causal", False)
    is_ours = attention_mask.shape[1] == 1 and not attention_mask.requires_grad
    return is_ours and attention_mask.is_floating_point()


def admin_mask(
    *,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask that is added to the products, `(batch_size, 1, target_length, source_length)`, made once per forward.

    As [`~transformers.masking_utils.eager_mask`], but it reads the entries of `attention_mask` only on a CPU. On any
    other device, this would mean to wait, and the pass could not be recorded in a graph. Its dtype there is that of
    the products, so that PyTorch need not convert it in every layer. Masked entries have the lowest finite value, so
    a row that is masked completely gets equal weights instead of NaN.

    Returns:
        The mask, or None if nothing is masked: on a CPU if `attention_mask` says so, elsewhere if it is None.
    """
    device = torch.device(device)
    if device.type != "cpu":
        allow_is_bidirectional_skip = allow_is_bidirectional_skip and attention_mask is None
        dtype = autocast_dtype(device.type) or dtype
    return eager_mask(
        attention_mask=attention_mask,
        dtype=dtype,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        device=device,
        **kwargs,
    )


for name in (ADMIN_ATTENTION, CPU_ATTENTION):
    AttentionInterface.register(name, admin_attention)
    AttentionMaskInterface.register(name, admin_mask)

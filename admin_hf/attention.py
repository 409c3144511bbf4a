"""Attention for training on a CPU, as an attention implementation of Transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from .dropout import dropout as cpu_dropout


CPU_ATTENTION = "admin_cpu"  # for `model.set_attn_implementation`

# PyTorch's softmax takes up to 20 times as long for an entry of a row that is shorter than a vector register, which
# holds 16 float32 with AVX-512: 56 ns in rows of 15, 2.6 ns in rows of 16 (one thread)
SHORTEST_ROW = 16


def cpu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as its formula says it, ``dropout(softmax(q kᵀ · scaling + mask)) v``, in train mode; else PyTorch's.

    PyTorch's fused attention has no dropout on a CPU, and without dropout a backward pass in bfloat16 that takes
    about eight times as long as this. Against its plain path, which has dropout, this one has cheap random bits and no
    short rows for softmax: a training step of a small model takes 1.06 times as long with PyTorch's in float32, 1.23
    times in bfloat16. Weights are never returned: `"eager"` does that.

    Args:
        query: `(batch_size, heads, target_length, head_size)`.
        key, value: `(batch_size, heads, source_length, head_size)`.
        attention_mask: added to the products, `(batch_size, 1, target_length, source_length)`.

    Returns:
        The output, `(batch_size, target_length, heads, head_size)`, and None.
    """
    if not module.training:
        kwargs["is_causal"] = False  # the mask says it
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    keys = scores.shape[-1]
    if keys < SHORTEST_ROW:
        scores = nn.functional.pad(scores, (0, SHORTEST_ROW - keys), value=-torch.inf)
    weights = scores.softmax(dim=-1).to(value.dtype)
    weights = cpu_dropout(weights, dropout, training=True)[..., :keys]
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
AttentionMaskInterface.register(CPU_ATTENTION, eager_mask)

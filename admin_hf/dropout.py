"""Dropout whose random bits cost little on a CPU."""

import torch
from torch import Tensor, nn


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """As `torch.nn.functional.dropout`, but on a CPU with 16 random bits for an entry in place of a draw of its own.

    There a mask of `bernoulli_` takes ten times as long as its bits here (10 ms and 1 ms for 512,000 entries on one
    thread), which was a fifth of a training step of a small model in bfloat16. The mask follows PyTorch's global
    generator, but is not the one that `torch.nn.functional.dropout` draws.

    Args:
        x: of any shape and floating dtype.
        p: probability of an entry to become 0, rounded to a multiple of 2⁻¹⁶; the others are divided by 1 − p.
        training: whether anything is dropped.
    """
    dropped = round(p * 2**16)
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (training and on_cpu and 0 < dropped < 2**16):
        return nn.functional.dropout(x, p=p, training=training)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = torch.empty_like(x)  # where a comparison can write at once: a mask of bool would cost three passes more
    torch.ge(bits.view(torch.int16)[: x.numel()].view(x.shape), dropped - 2**15, out=mask)
    return x * mask.mul_(2**16 / (2**16 - dropped))

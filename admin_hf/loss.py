"""The training loss, computed without the full matrix of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


# Elements of the largest matrix of logits that exists at a time: 2^22 float32 are 16 MiB, whatever the vocabulary.
CHUNK_ELEMENTS = 2**22


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T + bias`; the gradients are computed with the loss, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_smoothing: float, pad_id: int
    ) -> tuple[Tensor, Tensor]:
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
        with torch.autocast(device_type, enabled=False):
            w, b = weight.to(dtype), bias.to(dtype)
            smoothed = label_smoothing / (weight.shape[0] - 1)
            # The smoothing term needs no logits: Σ_{v≠pad} z_v = h · Σ_{v≠pad} w_v + Σ_{v≠pad} b_v
            w_sum = weight.float().sum(0) - weight[pad_id].float()
            b_sum = bias[:pad_id].float().sum() + bias[pad_id + 1 :].float().sum()
            needs_hidden, needs_weight = ctx.needs_input_grad[:2]
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            loss, nll = hidden.new_zeros(2, dtype=torch.float32)

            rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
            for start in range(0, hidden.shape[0], rows):
                h, y = hidden[start : start + rows], labels[start : start + rows]
                real = y.ne(-100).float()
                y = y.clamp(min=0).unsqueeze(1)
                z = torch.addmm(b, h.to(dtype), w.T)
                p = z.softmax(dim=1, dtype=torch.float32)
                lse = z.amax(dim=1).float() - p.amax(dim=1).log()
                z_y = z.gather(1, y).squeeze(1).float()
                nll += ((lse - z_y) * real).sum()
                smoothing = label_smoothing * z_y - smoothed * (h.float() @ w_sum + b_sum)
                loss += ((lse - z_y + smoothing) * real).sum()
                # ∂loss/∂z = softmax(z) − (1−ε)·onehot(y) − ε/(V−1), nothing for padding; the last term is added behind
                # the products, where it is a vector
                dz = p.scatter_add_(1, y, torch.full_like(y, label_smoothing - 1, dtype=p.dtype))
                dz[:, pad_id] = 0
                dz = dz.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = (dz @ w - smoothed * w_sum) * real.unsqueeze(1)
                if grad_weight is not None:
                    h = h * real.unsqueeze(1)
                    grad_weight += dz.T @ h.to(dtype)
                    grad_weight -= smoothed * h.float().sum(0)
            if grad_weight is not None:
                grad_weight[pad_id] = 0
                grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (None if grad is None else grad * grad_loss for grad in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None, None


# Traced, the loop over chunks would be unrolled, and compiled anew for every shape of a batch
@torch.compiler.disable
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    pad_token_id: int,
    label_smoothing: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the output layer's predictions, averaged over real targets, with label smoothing ε.

        loss = lse(z) − (1−ε) z_y − ε/(V−1) Σ_{v≠pad} z_v,    z = hidden · weightᵀ + bias

    The logits of a whole batch never exist: they are made, used for the gradient and dropped, a chunk of rows at a
    time. Sums are in float32; products run in autocast's dtype where that is on, else in `hidden`'s. The padding entry
    gets no share of the smoothing and its row of `weight` no gradient, so a zero row stays exactly zero.

    Args:
        hidden: decoder output, `(batch_size, target_length, d_model)`.
        weight: output embeddings, `(vocab_size, d_model)`.
        bias: a constant added to the logits, `(1, vocab_size)`.
        labels: target ids, `(batch_size, target_length)`, −100 where there is none.
        pad_token_id: id of the padding entry.
        label_smoothing: ε, in [0, 1).
        num_items_in_batch: what the summed loss is divided by, for gradient accumulation and several processes, which
            average over all targets of an update; by default the targets of this batch.

    Returns:
        The loss and, without smoothing and without a gradient, the negative log-likelihood: float32 scalars.
    """
    if num_items_in_batch is None:
        num_items_in_batch = labels.ne(-100).sum().clamp(min=1)
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    if hidden.device.type == "cpu":
        # Selecting rows would make a GPU wait for the CPU; there, padded rows are computed and weighted with 0
        real = labels.ne(-100)
        hidden, labels = hidden[real], labels[real]
    loss, nll = _LinearCrossEntropy.apply(hidden, weight, bias.flatten(), labels, label_smoothing, pad_token_id)
    return loss / num_items_in_batch, nll / num_items_in_batch

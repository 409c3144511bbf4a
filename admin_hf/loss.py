"""The training loss, computed without the full matrix of logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .kernels import autocast_dtype


# Elements of the largest matrix of logits that exists at a time, whatever the vocabulary. 2^23 float32 are 32 MiB, of
# which a CPU's caches hold a part. A GPU waits for launches between smaller chunks: 2^27 float32 are 512 MiB.
CHUNK_ELEMENTS = 2**23
GPU_CHUNK_ELEMENTS = 2**27


def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    label_smoothing: float,
    pad_id: int,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    selects: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed cross-entropy of `hidden @ weight.T + bias` at rows with a label, the same unsmoothed, and the gradients.

    Products are of `dtype`; a gradient that is not needed is empty. `selects` is for a CPU: rows without a label are
    cut out, and a bias of 0 is not added, which costs as much as the product in bfloat16. On a GPU looking at the data
    would make the step wait; there such rows are computed and weighted with 0.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    w, b = weight.to(dtype), bias.to(dtype)
    is_real, y_clamped = labels.ne(-100).to(exact), labels.clamp(min=0)
    smoothed = label_smoothing / (len(b) - 1)
    if smoothed:
        # The smoothing term needs no logits: Σ_{v≠pad} z_v = h · Σ_{v≠pad} w_v + Σ_{v≠pad} b_v
        w_sum = weight.to(exact).sum(0) - weight[pad_id].to(exact)
        b_sum = bias.to(exact).sum() - bias[pad_id].to(exact)
    only_pad = selects and not bias[torch.arange(len(b)) != pad_id].any()  # as Marian's
    grad_hidden = (torch.zeros_like if selects else torch.empty_like)(hidden) if needs_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else weight.new_empty(0)
    loss, nll = (hidden.new_zeros((), dtype=exact) for _ in range(2))

    for rows in _chunks(labels, len(b), selects):
        h, real = hidden[rows], is_real[rows]
        h_cast, y = h.to(dtype), y_clamped[rows].unsqueeze(1)
        z = torch.mm(h_cast, w.T) if only_pad else torch.addmm(b, h_cast, w.T)
        if only_pad:
            z[:, pad_id] += b[pad_id]
        z_y, largest = z.gather(1, y).squeeze(1).to(exact), None if selects else z.max(1, keepdim=True)
        p = torch.softmax(z, 1, out=None if selects else z)  # in float32 inside; on a GPU in the place of z
        p_y = p.gather(1, y)
        log_p = p_y.squeeze(1).to(exact).log() if selects else None
        if log_p is None or (p_y < torch.finfo(dtype).tiny).any():
            # From the largest p of the row, because p_y may be too small for its dtype
            z_max, likeliest = largest or z.max(1, keepdim=True)
            log_p = z_y - (z_max.to(exact) - p.gather(1, likeliest).to(exact).log()).squeeze(1)
        nll -= torch.dot(log_p, real)
        if smoothed:
            loss += torch.dot(label_smoothing * z_y - smoothed * (h.to(exact) @ w_sum + b_sum), real)
        # ∂loss/∂z = softmax(z) − (1−ε)·onehot(y) − ε/(V−1), nothing for padding; the last term is added after the
        # products, where it is a vector
        dz = p.scatter_(1, y, p_y - (1 - label_smoothing))
        dz[:, pad_id] = 0
        if needs_hidden:
            dh = dz @ w - smoothed * w_sum if smoothed else dz @ w
            grad_hidden[rows] = (dh * real.unsqueeze(1)).to(hidden.dtype)
        if needs_weight:
            h_real = h * real.unsqueeze(1)
            grad_weight += dz.T @ h_real.to(dtype)
            if smoothed:
                grad_weight -= smoothed * h_real.sum(0, dtype=exact)
        del z, p, dz  # or they would stay until the next chunk has its own
    if needs_weight:
        grad_weight[pad_id] = 0
        grad_weight = grad_weight.to(weight.dtype)
    return loss + nll, nll, grad_hidden, grad_weight


# An operator of its own, so that torch.compile does not look inside: it would unroll the loop over chunks, and compile
# it again for every shape of a batch
_loss_and_gradients = torch.library.custom_op("admin_hf::linear_cross_entropy", _compute, mutates_args=())


def _chunks(labels: Tensor, vocab_size: int, selects: bool) -> Iterator[Tensor | slice]:
    """The rows that are computed together: those with a label, or all in turn."""
    if selects:
        yield from labels.ne(-100).nonzero().squeeze(1).split(max(1, CHUNK_ELEMENTS // vocab_size))
        return
    size = max(1, GPU_CHUNK_ELEMENTS // vocab_size)
    for start in range(0, len(labels), size):
        yield slice(start, start + size)


@_loss_and_gradients.register_fake
def _(hidden, weight, bias, labels, label_smoothing, pad_id, dtype, needs_hidden, needs_weight, selects):  # type: ignore[no-untyped-def]
    exact = torch.promote_types(hidden.dtype, torch.float32)
    loss, nll = (hidden.new_empty((), dtype=exact) for _ in range(2))
    grad_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    return loss, nll, grad_hidden, grad_weight


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # of the outputs after the loss, which nothing uses
    ctx.save_for_backward(*output[2:])


def _scale_gradients(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # by create_graph=True
        raise RuntimeError("The training loss has no second derivative; the loss of a model in eval mode has one.")
    gradients = (grad * grad_loss if grad.numel() else None for grad in ctx.saved_tensors)
    return *gradients, *[None] * 8


_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)


class _Eager(torch.autograd.Function):
    """The same where nothing is compiled, without the time that an operator takes to be called."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _compute(*inputs)
        _keep_gradients(ctx, inputs, output)
        return output[:2]

    backward = staticmethod(_scale_gradients)


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

    The logits of a whole batch never exist at once: one chunk of rows at a time, they are computed, used for the
    gradient and dropped. A training step of a small model (width 128, vocabulary 10,000) on a CPU takes 1.08 times as
    long with stock logits and loss in float32, 1.15 times in bfloat16.

    Sums are in float32 (float64 if `hidden` is). Products run in autocast's dtype if autocast is on, else in the dtype
    of `hidden`. The padding token gets no share of the smoothing, and its row of `weight` gets no gradient, so a zero
    row stays exactly zero.

    Args:
        hidden: decoder output, `(batch_size, target_length, d_model)`.
        weight: output embeddings, `(vocab_size, d_model)`.
        bias: a constant added to the logits, `(1, vocab_size)`.
        labels: target ids, `(batch_size, target_length)`, −100 where there is none.
        pad_token_id: id of the padding entry.
        label_smoothing: ε, in [0, 1).
        num_items_in_batch: the divisor of the summed loss. With gradient accumulation and several processes, it is the
            number of all targets of an update; default: the targets of this batch.

    Returns:
        The loss and, without smoothing and without a gradient, the negative log-likelihood: scalars.

    Raises:
        RuntimeError: a second derivative is requested, in the backward pass.
    """
    if num_items_in_batch is None:
        num_items_in_batch = labels.ne(-100).sum().clamp(min=1)
    hidden, labels, bias = hidden.flatten(0, 1), labels.flatten(), bias.flatten()
    device = hidden.device.type
    dtype = autocast_dtype(device) or hidden.dtype
    needs = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    with torch.autocast(device, enabled=False):  # otherwise it would also compute sums in `dtype`
        compute = _loss_and_gradients if torch.compiler.is_compiling() else _Eager.apply
        inputs = (hidden, weight, bias, labels, label_smoothing, pad_token_id, dtype, *needs, device == "cpu")
        loss, nll, *_ = compute(*inputs)
    return loss / num_items_in_batch, nll.detach() / num_items_in_batch


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    pad_token_id: int,
    label_smoothing: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of [`linear_cross_entropy`], computed from logits: for an output layer that is more than its weight.

    Args:
        logits: `(batch_size, target_length, vocab_size)`.
    """
    z, labels = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten()
    is_pad = torch.arange(z.shape[1], device=z.device).eq(pad_token_id)
    log_p = torch.where(is_pad, z.detach(), z).log_softmax(dim=1)
    real = labels.ne(-100)
    nll = -(log_p.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1) * real).sum()
    others = log_p.masked_fill(is_pad, 0.0).sum(1) / (z.shape[1] - 1)
    loss = (1 - label_smoothing) * nll - label_smoothing * (others * real).sum()
    if num_items_in_batch is None:
        num_items_in_batch = real.sum().clamp(min=1)
    return loss / num_items_in_batch, nll.detach() / num_items_in_batch

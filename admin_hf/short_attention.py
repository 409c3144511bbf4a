"""Attention over short rows on a GPU: each sentence and head is one block of a kernel, forward and backward.

The fused kernels of PyTorch work on tiles of 64 or 128 positions. A sentence of 25 tokens fills little of one. On an
H200 they take a fifth of a compiled update of Transformer-base. Here nothing is tiled: a block computes all products
of a sentence and a head. It draws its dropout on the way, and draws it again in the backward pass.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (kernels and shapes of operators say their types elsewhere)

from typing import Any

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch for a GPU
    triton = None

LONGEST = 128  # positions of a row
HEAD_SIZES = (16, 32, 64)  # a block then fits the shared memory of compute capability 8.0 and newer
DTYPES = (torch.bfloat16, torch.float16)


def fits(query: Tensor, key: Tensor) -> bool:
    """Whether [`short_attention`] accepts these, `(batch_size, heads, length, head_size)`."""
    return (
        triton is not None
        and query.dtype in DTYPES
        and query.shape[3] in HEAD_SIZES
        and query.shape[2] <= LONGEST
        and key.shape[2] <= LONGEST
    )


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """``dropout(softmax(q kᵀ · scaling + mask)) v``, for inputs that [`fits`] accepts.

    Args:
        query: `(batch_size, heads, target_length, head_size)`, float16 or bfloat16.
        key, value: `(batch_size, heads, source_length, head_size)`, of the same dtype.
        mask: added to the products, `(batch_size, 1, target_length, source_length)`.
        scaling: factor of the products.
        dropout: probability that a weight becomes 0; the others are divided by 1 − dropout.

    Returns:
        `(batch_size, target_length, heads, head_size)`.
    """
    # The seed is an input, so that the operator gives the same result when it is computed again
    seed = torch.randint(2**31 - 1, (1,), device=query.device)
    if mask is None:
        mask = query.new_zeros(1, 1, 1, 1)
    mask = mask.expand(query.shape[0], 1, query.shape[2], key.shape[2])
    return _forward(query, key, value, mask, seed, scaling, dropout)


@torch.library.custom_op("admin_hf::short_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, seed: Tensor, scaling: float, dropout: float
) -> Tensor:
    output = _rows_of_heads(query)
    inputs = (query, key, value, mask)
    _launch(_forward_kernel, inputs, (output.transpose(1, 2),), seed, scaling, dropout)
    return output


@_forward.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    return _rows_of_heads(query)


@torch.library.custom_op("admin_hf::short_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    seed: Tensor,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(_rows_of_heads(x) for x in (query, key, value))
    inputs = (query, key, value, mask, grad.transpose(1, 2))
    _launch(_backward_kernel, inputs, tuple(x.transpose(1, 2) for x in grads), seed, scaling, dropout)
    return grads[0], grads[1], grads[2]


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_of_heads(query), _rows_of_heads(key), _rows_of_heads(value)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling, ctx.dropout = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.dropout)
    return *(x.transpose(1, 2) for x in grads), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep_inputs)


def _rows_of_heads(x: Tensor) -> Tensor:
    """An empty tensor for `x`, `(batch_size, heads, length, head_size)`, that has a position's heads in a row."""
    batch_size, heads, length, head_size = x.shape
    return x.new_empty(batch_size, length, heads, head_size)


def _launch(
    kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], seed: Tensor, scaling: float, dropout: float
) -> None:
    query, key = inputs[:2]
    batch_size, heads, targets, head_size = query.shape
    sources = key.shape[2]
    # The entries of a head are next to each other in all of them; those of the mask have a stride
    tensors = [x if x is inputs[3] or x.stride(3) == 1 else x.contiguous() for x in inputs]
    strides = [stride for x in (*tensors, *outputs) for stride in x.stride()[:3]]
    block_q, block_k = (max(16, triton.next_power_of_2(n)) for n in (targets, sources))
    kernel[(batch_size * heads,)](
        *tensors,
        *outputs,
        seed,
        *strides,
        tensors[3].stride(3),
        heads,
        targets,
        sources,
        scaling,
        dropout,
        HEAD=head_size,
        Q=block_q,
        K=block_k,
        num_warps=max(1, min(8, block_q * block_k // 512)),
    )


if triton is not None:

    @triton.jit
    def _load(x, batch, head, stride_b, stride_h, stride_l, length, L: tl.constexpr, D: tl.constexpr):
        """The rows of a sentence and head, `(L, D)`, 0 from `length` on."""
        rows, columns = tl.arange(0, L)[:, None], tl.arange(0, D)[None, :]
        start = x + batch.to(tl.int64) * stride_b + head * stride_h
        return tl.load(start + rows * stride_l + columns, mask=rows < length, other=0.0)

    @triton.jit
    def _store(x, value, batch, head, stride_b, stride_h, stride_l, length, L: tl.constexpr, D: tl.constexpr):
        rows, columns = tl.arange(0, L)[:, None], tl.arange(0, D)[None, :]
        start = x + batch.to(tl.int64) * stride_b + head * stride_h
        tl.store(start + rows * stride_l + columns, value.to(x.dtype.element_ty), mask=rows < length)

    @triton.jit
    def _weights(
        q, k, mask, seed, batch, m_b, m_q, m_k, targets, sources, scaling, dropout, Q: tl.constexpr, K: tl.constexpr
    ):
        """softmax(q kᵀ · scaling + mask), and what dropout multiplies it by, both `(Q, K)` in float32."""
        rows, columns = tl.arange(0, Q)[:, None], tl.arange(0, K)[None, :]
        inside = (rows < targets) & (columns < sources)
        added = tl.load(mask + batch.to(tl.int64) * m_b + rows * m_q + columns * m_k, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scaling + added.to(tl.float32)
        scores = tl.where(columns < sources, scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        number = tl.program_id(0) * Q * K + rows * K + columns
        kept = tl.where(tl.rand(tl.load(seed), number) >= dropout, 1.0 / (1.0 - dropout), 0.0)
        return weights, kept

    @triton.jit
    def _forward_kernel(
        q, k, v, mask, output, seed,
        q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, m_b, m_h, m_q, o_b, o_h, o_l, m_k,
        heads, targets, sources, scaling, dropout,
        HEAD: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
        queries = _load(q, batch, head, q_b, q_h, q_l, targets, Q, HEAD)
        keys = _load(k, batch, head, k_b, k_h, k_l, sources, K, HEAD)
        values = _load(v, batch, head, v_b, v_h, v_l, sources, K, HEAD)
        weights, kept = _weights(
            queries, keys, mask, seed, batch, m_b, m_q, m_k, targets, sources, scaling, dropout, Q, K
        )
        result = tl.dot((weights * kept).to(values.dtype), values)
        _store(output, result, batch, head, o_b, o_h, o_l, targets, Q, HEAD)

    @triton.jit
    def _backward_kernel(
        q, k, v, mask, grad, dq, dk, dv, seed,
        q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, m_b, m_h, m_q, g_b, g_h, g_l,
        dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l, m_k,
        heads, targets, sources, scaling, dropout,
        HEAD: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
        queries = _load(q, batch, head, q_b, q_h, q_l, targets, Q, HEAD)
        keys = _load(k, batch, head, k_b, k_h, k_l, sources, K, HEAD)
        values = _load(v, batch, head, v_b, v_h, v_l, sources, K, HEAD)
        grads = _load(grad, batch, head, g_b, g_h, g_l, targets, Q, HEAD)
        weights, kept = _weights(
            queries, keys, mask, seed, batch, m_b, m_q, m_k, targets, sources, scaling, dropout, Q, K
        )
        dtype = queries.dtype
        _store(
            dv, tl.dot(tl.trans((weights * kept).to(dtype)), grads), batch, head, dv_b, dv_h, dv_l, sources, K, HEAD
        )
        d_weights = tl.dot(grads, tl.trans(values)) * kept
        # Through softmax: ds = w ⊙ (dw − Σ dw ⊙ w)
        d_scores = weights * (d_weights - tl.sum(d_weights * weights, 1)[:, None]) * scaling
        d_scores = d_scores.to(dtype)
        _store(dq, tl.dot(d_scores, keys), batch, head, dq_b, dq_h, dq_l, targets, Q, HEAD)
        _store(dk, tl.dot(tl.trans(d_scores), queries), batch, head, dk_b, dk_h, dk_l, sources, K, HEAD)

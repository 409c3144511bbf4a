"""The same numbers in less time: shared casts, dropout, and the scaled LayerNorm for a CPU."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


# --- autocast -------------------------------------------------------------------------------------


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype in which autocast computes matrix products on a type of device, or None if it is off."""
    # "meta" has no autocast, and asking whether it is on would raise
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def cast_once(x: Tensor) -> Tensor:
    """`x` in autocast's dtype for matrix products, which share one cast, forward and backward.

    The backward pass keeps one copy of it instead of three: in bfloat16, without it, models of 6+6 layers and width
    512 keep 6% more. On a GPU, where the launches of kernels determine the time of an update, it also saves 66 of
    2,489 operations of a forward and backward pass. A CPU takes the same time without it.
    """
    dtype = autocast_dtype(x.device.type) if x.dtype == torch.float32 else None
    return x if dtype is None else x.to(dtype)


class Cast(NamedTuple):
    """Where a module holds a weight or bias in autocast's dtype, and the parameters that are its rows, one or more."""

    holder: dict[str, Any]
    name: str
    parameters: list[tuple[dict[str, Any], str]]


def weights_cast_at_once(model: Any) -> AbstractContextManager[None]:
    """[`cast_at_once`] for an Admin model that trains on a GPU under autocast, except in compiled layers, where casts
    cost little."""
    weight = model.model.encoder.layers[0].fc1.weight
    dtype = autocast_dtype(weight.device.type)
    if (
        weight.device.type == "cpu"
        or dtype is None
        or torch.compiler.is_compiling()
        or model.model.encoder.gradient_checkpointing
        or type(weight) is not nn.Parameter  # sharded over processes, like one of another shape
        or weight.shape != (model.config.encoder_ffn_dim, model.config.d_model)
        or weight.dtype != torch.float32
        or getattr(model, "_is_replica", False)  # of DataParallel, which shares these places
    ):
        return nullcontext()
    return cast_at_once(kept_casts(model), dtype)


def kept_casts(model: Any) -> list[Cast]:
    """The result of [`weight_casts`], kept, and renewed if a projection of joined weights got an adapter or a hook."""
    attentions = getattr(model, "_joined", [])
    if "_casts" not in vars(model) or not all(is_plain(linear) for x in attentions for linear in x.projections):
        model._joined = list(joined_projections(model.model))
        model._casts = weight_casts(model.model)
    casts: list[Cast] = model._casts
    return casts


def is_plain(linear: Any) -> bool:
    """Whether only its weight and bias determine what a linear layer computes: no adapter and no hook."""
    hooks = linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks
    return type(linear) is nn.Linear and not any(hooks)


def joined_projections(model: nn.Module) -> dict[nn.Module, list[nn.Linear]]:
    """The attentions below `model` whose projections can be one product, and these projections."""
    found: dict[nn.Module, Any] = {x: x.projections for x in model.modules() if hasattr(x, "projections")}
    return {attention: linears for attention, linears in found.items() if all(map(is_plain, linears))}


def weight_casts(model: nn.Module) -> list[Cast]:
    """The casts of all linear layers below `model`."""
    joined = joined_projections(model)
    in_groups = {*chain.from_iterable(joined.values())}
    alone = [module for module in model.modules() if type(module) is nn.Linear and module not in in_groups]
    groups: list[tuple[dict[str, Any], str, list[nn.Linear]]] = [(x._parameters, "{}", [x]) for x in alone]
    groups += [(vars(attention), "joined_{}", linears) for attention, linears in joined.items()]
    return [
        Cast(holder, pattern.format(name), [(linear._parameters, name) for linear in linears])
        for holder, pattern, linears in groups
        for name in ("weight", "bias")
        if linears[0]._parameters[name] is not None
    ]


@contextmanager
def cast_at_once(casts: list[Cast], dtype: torch.dtype) -> Iterator[None]:
    """Let linear layers use weights of `dtype`, which few kernels cast, and likewise their gradients.

    Autocast would cast each weight and bias when it is used, and its gradient back. That is a fifth of all kernels of
    an update of Transformer-base, and Python launches them more slowly than a GPU computes them. Where weights are
    joined, one product replaces two or three, forward and backward.
    """
    before = [cast.holder.get(cast.name) for cast in casts]
    rows = [[holder[name] for holder, name in cast.parameters] for cast in casts]
    sizes = [[len(tensor) for tensor in tensors] for tensors in rows]
    for cast, tensor in zip(casts, _Cast.apply(dtype, sizes, *chain(*rows)), strict=True):
        cast.holder[cast.name] = tensor
    try:
        yield
    finally:
        for cast, tensor in zip(casts, before, strict=True):
            cast.holder[cast.name] = tensor


class _Cast(torch.autograd.Function):
    """Casts groups of tensors, joined as rows of one, and their gradients back; `sizes` are the rows of each group."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, sizes: list[list[int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sizes, left = sizes, iter(tensors)
        groups = [[next(left) for _ in group] for group in sizes]
        joined = [x.new_empty(sum(n), *x.shape[1:], dtype=dtype) for (x, *_), n in zip(groups, sizes, strict=True)]
        rows = [part for x, n in zip(joined, sizes, strict=True) for part in (x.split(n) if len(n) > 1 else [x])]
        torch._foreach_copy_(rows, list(tensors))
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        exact = [torch.empty_like(grad, dtype=torch.float32) for grad in given]
        torch._foreach_copy_(exact, given)
        left = iter(exact)
        of_groups = (
            [None] * len(n) if x is None else next(left).split(n) for x, n in zip(grads, ctx.sizes, strict=True)
        )
        return None, None, *chain.from_iterable(of_groups)


# --- dropout --------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """As `torch.nn.functional.dropout`, but on a CPU with 16 random bits per entry instead of a full random number.

    On a CPU, a mask of `bernoulli_` takes ten times as long as these bits (10 ms and 1 ms for 512,000 entries on one
    thread). If `relu_dropout` also used it, a training step of a small model would take 1.2 times as long in float32
    and 1.4 times in bfloat16. The mask follows PyTorch's global generator, but is not the one that
    `torch.nn.functional.dropout` draws.

    Args:
        x: of any shape and floating dtype.
        p: probability that an entry becomes 0, rounded to a multiple of 2⁻¹⁶; the others are divided by 1 − p.
        training: whether entries are dropped.
    """
    if not training:
        return x  # early: translation calls this three times per layer for every token
    if not _draws_bits(x, p):
        return nn.functional.dropout(x, p=p)
    return _Dropout.apply(x, p)


def relu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`dropout(relu(x))` that keeps one tensor for the backward pass instead of three: on a CPU, and compiled.

    Its output is positive exactly where the gradient passes, so neither the mask nor the output of ReLU is needed. In
    float32 this saves 800 of the 2,700 MB that 4,095 tokens keep in Transformer-base. A training step of a small model
    on a CPU takes about the same time without it. Without compilation, a GPU would wait for its Python code.
    """
    if training and _draws_bits(x, p):
        return _ReluDropout.apply(x, p)
    if training and torch.compiler.is_compiling() and 0 < p < 1:
        # As rows, in the form that the next product keeps, or the compiler would also keep y > 0
        return _ReluDropout.apply(x.flatten(0, -2), p).view(x.shape)
    return dropout(nn.functional.relu(x), p, training)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        bits = _draw(x)
        ctx.save_for_backward(bits)  # half of a mask in float32
        ctx.p = p
        return _kept(bits, x, p).mul_(x).mul_(_scale(p))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        return _kept(bits, grad, ctx.p).mul_(grad).mul_(_scale(ctx.p)), None


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        if _draws_bits(x, p):
            y = _kept(_draw(x), x, p).mul_(x).relu_().mul_(_scale(p))
            ctx.scale = _scale(p)
        else:
            y = nn.functional.dropout(nn.functional.relu(x), p)
            ctx.scale = 1 / (1 - p)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, y, 0).mul_(ctx.scale), None


def _draws_bits(x: Tensor, p: float) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and 0 < round(p * 2**16) < 2**16


def _draw(x: Tensor) -> Tensor:
    """16 random bits for each entry of `x`: integers between -2¹⁵ and 2¹⁵."""
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return bits.view(torch.int16)[: x.numel()].view(x.shape)


def _kept(bits: Tensor, x: Tensor, p: float) -> Tensor:
    """1 for an entry of `x` to keep, 0 for one to drop."""
    mask = torch.empty_like(x)  # a comparison writes to it directly: a bool mask would cost three more passes
    return torch.ge(bits, round(p * 2**16) - 2**15, out=mask)


def _scale(p: float) -> float:
    return 2**16 / (2**16 - round(p * 2**16))


# --- shortcut, ω and LayerNorm --------------------------------------------------------------------


def scaled_layer_norm(
    shortcut: Tensor, omega: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """``LN(x ⊙ ω + f)`` whose backward pass takes ω's gradient in one pass, where autograd takes three.

    Under autocast it overwrites the copies that casts make. Together this saves 26 to 56% of the time that ω adds to a
    connection's forward and backward pass (two threads, widths 128 to 512).
    """
    return _ScaledLayerNorm.apply(shortcut, omega, branch, weight, bias, eps)


class _ScaledLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shortcut: Tensor, omega: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        # under autocast f is a copy, which the sum overwrites
        f = branch.to(torch.promote_types(branch.dtype, shortcut.dtype))
        joined = torch.addcmul(f, shortcut, omega, out=_spare(f, branch))
        output, mean, rstd = torch.native_layer_norm(joined, weight.shape, weight, bias, eps)
        ctx.save_for_backward(shortcut, omega, joined, mean, rstd, weight, bias)
        ctx.branch_dtype = branch.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shortcut, omega, joined, mean, rstd, weight, bias = ctx.saved_tensors
        _, _, _, needs_weight, needs_bias, _ = ctx.needs_input_grad

        def layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, mask: list[bool]) -> Any:
            return torch.ops.aten.native_layer_norm_backward(grad, x, weight.shape, mean, rstd, weight, bias, mask)

        d_joined, d_weight, d_bias = layer_norm_backward(grad, joined, mean, rstd, [True, needs_weight, needs_bias])
        # Σ d_joined ⊙ x is the gradient of the weight of a LayerNorm whose mean is 0 and whose deviation is 1
        zero, one = torch.zeros_like(mean), torch.ones_like(rstd)
        _, d_omega, _ = layer_norm_backward(d_joined, shortcut, zero, one, [False, True, False])
        d_branch = d_joined.to(ctx.branch_dtype)
        d_shortcut = torch.mul(d_joined, omega, out=_spare(d_joined, d_branch))
        return d_shortcut, d_omega, d_branch, d_weight, d_bias, None


def _spare(tensor: Tensor, counterpart: Tensor) -> Tensor | None:
    """`tensor`, to be overwritten by a result; None (a new tensor) if the cast to another dtype did not copy it."""
    return None if tensor is counterpart else tensor

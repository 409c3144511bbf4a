"""Folds a trained model into the equivalent vanilla Transformer (Appendix C of the paper).

Scales on the shortcut and on the branch of a Post-LN connection, ``x_i = LN(s_i ⊙ x_{i-1} + r_i ⊙ f_i(x_{i-1}))``,
are only another way to write weights. s_i goes into the LayerNorm before and, as its inverse, into the projections
that read it. r_i goes into the projection that ends the branch. The result is stock Marian.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import adapted_layers, bare_model, check_mergeable, merge_adapters
from .architecture import MARIAN, PEGASUS, STACKS, Architecture, Sublayer
from .checkpoints import check_finite
from .positions import is_standard, position_tables, save_own_tables, standard_table
from .residual import PostLNConnection, PreLNConnection, ResidualConnection, residual_connections
from .verification import verify
from .vocabulary import fit_vocabulary


# Closer to zero, 1/ω does not fit half precision, and already earlier it ruins the scales of a quantised matrix.
MIN_SCALE = 1e-4

# Largest difference between logits of model and vanilla model, as a share of the largest, by the latter's dtype. Both
# run in float64, so only the rounding of the weights is left: seen are 2e-7, 2e-3 and 2e-2. A number on the first
# shortcut of a stack adds the ε of LayerNorm, 1e-5.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}


def stock_architecture(model: PreTrainedModel) -> Architecture:
    """Return the architecture of Transformers that computes the same function as this model.

    Raises:
        ValueError: there is none, because Post-LN is mixed with Pre-LN or a connection belongs to neither.
    """
    connections = [module for module in model.modules() if isinstance(module, ResidualConnection)]
    if all(isinstance(each, PostLNConnection) and not each.adds_layer_input for each in connections):
        return MARIAN
    if all(isinstance(connection, PreLNConnection) for connection in connections):
        if (model.config.decoder_vocab_size or model.config.vocab_size) != model.config.vocab_size:
            raise ValueError(
                "Transformers' Pre-LN model (Pegasus) has one vocabulary, but this model has one for each side. "
                + _UNFOLDED.format(name=type(model).__name__)
            )
        return PEGASUS
    raise ValueError(
        f"No architecture of Transformers computes encoder_residual={model.config.encoder_residual!r} with "
        f"decoder_residual={model.config.decoder_residual!r}: only Post-LN systems (Marian) and Pre-LN ones in both "
        "stacks (Pegasus) can be folded. " + _UNFOLDED.format(name=type(model).__name__)
    )


_UNFOLDED = (
    "It can be published unfolded, with its code: `{name}.register_for_auto_class()`, then `save_pretrained(folder)` "
    "or `push_to_hub(repo_id, reparameterize=False)`."
)


@torch.no_grad()
def reparameterize(
    model: PreTrainedModel, dtype: torch.dtype | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Return the vanilla model: a stock Transformers model that computes the same as `model`, without shortcut scales.

    The fold is computed in float64, rounded once, and verified. On random batches (with padding, and with a row of the
    greatest length, up to 1,024) the logits of both models are compared in float64. So are the tokens of greedy
    decoding, wherever no tie explains a difference. For half precision the fold is verified before and after rounding.
    The given model and all random states are not changed.

    Args:
        model: an [`AdminForConditionalGeneration`] or [`AdminModel`] whose stacks are all Post-LN (`admin`, `post_ln`,
            and any connection that differs only in its `shortcut_scale` and `branch_scale`) or both `pre_ln`; or a
            stock model with an ω from [`inject`]. Of the latter, a copy of the same class without ω is returned. It
            computes the same by construction, so only its weights are checked to be finite.
        dtype: floating-point type of the result; default: the model's own.
        tokenizer: if given, the result has the embeddings that converters expect for it (see [`fit_vocabulary`]).

    Returns:
        A `MarianMTModel` or `MarianModel` for the Post-LN family, a `PegasusForConditionalGeneration` or
        `PegasusModel` for `pre_ln`, in eval mode on the model's device, with its generation config.

    Raises:
        ValueError: no stock architecture computes the model; a weight is not finite, or overflows `dtype`; a shortcut
            scale has an entry within 1e-4 of zero; or the result differs from the model by more than the tolerance
            for `dtype` (1e-4 of the largest logit in float32, 1e-2 in float16, 1e-1 in bfloat16). The message names
            the parameter, or the first sub-layer that differs. Also if the model was not made for `tokenizer`
            (see [`check_tokenizer`]).

    Example:

    ```python
    >>> from admin_hf import AdminConfig, AdminForConditionalGeneration, reparameterize

    >>> config = AdminConfig(vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2)
    >>> type(reparameterize(AdminForConditionalGeneration(config))).__name__
    'MarianMTModel'

    ```
    """
    check_mergeable(model)
    model = bare_model(model)
    if dtype is not None and dtype not in TOLERANCES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(map(str, TOLERANCES))}.")
    if not hasattr(model, "injection") and any("injection" in vars(module) for module in model.modules()):
        raise ValueError(
            f"The ω of {type(model).__name__} belongs to a part of it: fold that part, or inject the whole model."
        )
    if hasattr(model, "injection"):
        model = _bare_copy(model)
        return cast(Any, model).injection.fold(model, dtype)
    stock = stock_architecture(model)
    dtype = dtype or model.dtype
    check_finite(model, "The model")
    original = _exact_copy(model)
    with torch.random.fork_rng(devices=[]):  # a constructor draws weights
        vanilla = _stock_model(_merged(original), stock).eval()
    for precision in dict.fromkeys((torch.float32, dtype)):
        rounded = copy.deepcopy(vanilla).to(precision)
        check_finite(rounded, f"The vanilla model, rounded to {precision},")
        verify(original, rounded.double(), TOLERANCES[precision])
    if model.can_generate():
        vanilla.generation_config = copy.deepcopy(model.generation_config)
    if tokenizer is not None:
        vanilla = fit_vocabulary(vanilla, tokenizer)
    save_own_tables(vanilla)
    return vanilla.to(model.device, dtype)


# --- folding --------------------------------------------------------------------------------------


def _exact_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself in float64 and eval mode, on the CPU, without hooks and autocast."""
    original = _bare_copy(model)
    original.cpu().double().eval()
    for _, table in position_tables(original):
        if is_standard(table.weight):  # possibly rounded, which the vanilla model's own is not
            table.weight.data = standard_table(*table.weight.shape).double()
    original.set_attn_implementation("sdpa")  # flash attention has no float64
    return original


def _bare_copy(model: PreTrainedModel) -> Any:
    """The model without hooks and autocast."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    # The memo of deepcopy: hooks belong to their owners, who may not support copying
    memo: dict[int, Any] = {id(getattr(module, kind)): OrderedDict() for module in model.modules() for kind in hooks}
    return extract_model_from_parallel(copy.deepcopy(model, memo), keep_fp32_wrapper=False)


def _merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy of it with its adapters in its weights."""
    if not any(adapted_layers(model)):
        return model
    merged = copy.deepcopy(model)
    merge_adapters(merged)
    return merged


def _stock_model(model: PreTrainedModel, stock: Architecture) -> PreTrainedModel:
    """The vanilla model, in float64 as `model` is."""
    own = {field.name for field in dataclasses.fields(type(model.config))}
    foreign = own - {field.name for field in dataclasses.fields(stock.config)}
    foreign |= {"model_type", "architectures", "auto_map", "dtype", "transformers_version"}
    values = {name: value for name, value in model.config.to_dict().items() if name not in foreign}
    is_base = model.base_model is model
    if stock is PEGASUS:  # as Google's own checkpoints say; CTranslate2's converter asks for it
        values |= {"normalize_before": True, "normalize_embedding": False}
        # Its embeddings are all tied, or none is
        values["tie_word_embeddings"] &= model.config.share_encoder_decoder_embeddings
    vanilla = (stock.base if is_base else stock.translation)(stock.config(**values)).double()
    weights, prefix = folded_weights(model), "" if is_base else f"{model.base_model_prefix}."
    if stock is PEGASUS:  # which has this matrix even where it reads those of its stacks
        weights.setdefault(f"{prefix}shared.weight", weights[f"{prefix}encoder.embed_tokens.weight"])
    _load(vanilla, weights)
    return vanilla


def _load(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    result = model.load_state_dict(weights, strict=False)
    if wrong := result.unexpected_keys + result.missing_keys:
        raise ValueError(
            f"{', '.join(wrong)}: not in both the model and {type(model).__name__}, so there is no vanilla checkpoint."
        )


def folded_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of `model` under Marian's names, with all scales folded into them, in the model's dtype.

    Raises:
        ValueError: a scale has an entry that is too close to zero, or the first shortcut of a stack, which no
            LayerNorm precedes, is scaled by a vector.
    """
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    weights.pop(f"{prefix}omega_profiled", None)
    for stack in STACKS.values():
        before, total = None, torch.ones(())
        for path, connection in residual_connections(getattr(model.base_model, stack.name)):
            name = f"{prefix}{stack.name}.{path}"
            if isinstance(connection, PostLNConnection):
                _fold(weights, name, connection, stack.sublayer(path), before)
            else:
                total = _fold_pre_ln(weights, name, connection, stack.sublayer(path), total)
            for parameter, _ in connection.named_parameters():
                if parameter not in ("weight", "bias"):
                    del weights[f"{name}.{parameter}"]
            before = name
        if f"{prefix}{stack.name}.layer_norm.weight" in weights:
            weights[f"{prefix}{stack.name}.layer_norm.weight"] *= total.sign()
    return weights


def _fold(
    weights: dict[str, Tensor], name: str, connection: PostLNConnection, sublayer: Sublayer, before: str | None
) -> None:
    """Fold the scales s and r of ``LN(s ⊙ x + r ⊙ f(x))`` into the weights around it.

    Args:
        weights: all weights, changed in place.
        name: of the connection.
        sublayer: what stands around it.
        before: name of the LayerNorm that x comes from; unset for the first sub-layer of a stack.
    """
    layer = name.rpartition(".")[0]
    s, r = _scale(connection, "shortcut_scale", name), _scale(connection, "branch_scale", name)
    if before is None:
        if bool((s != s[0]).any()):
            raise ValueError(
                f"{name} scales the first shortcut of the stack by a vector, and no LayerNorm precedes it into which "
                "the vector could be folded: use a single number there."
            )
        s, r = torch.ones_like(s), r / s  # LN(s x + r f) = LN(x + r/s f), except for the ε of LN
    else:
        weights[f"{before}.weight"] *= s  # γ ← γ s
        weights[f"{before}.bias"] *= s  # ν ← ν s
    for projection in sublayer.reads:
        weights[f"{layer}.{projection}.weight"] /= s  # W ← W / s, along the input dimension
    _scale_branch(weights, f"{layer}.{sublayer.ends}", r)


def _fold_pre_ln(
    weights: dict[str, Tensor], name: str, connection: ResidualConnection, sublayer: Sublayer, total: Tensor
) -> Tensor:
    """Fold the scales s, r and n of ``x_i = s x_{i-1} + r ⊙ f(n LN(x_{i-1}))`` into the weights around it.

    With c_i = s_i c_{i-1}, y_i = x_i / c_i is the plain chain of branches r_i / c_i ⊙ f_i. A LayerNorm normalises x_i
    to what it makes of y_i, times the sign of c_i, except for its ε.

    Args:
        total: c_{i-1}.

    Returns:
        c_i.
    """
    weights[f"{name}.weight"] *= connection.input_scale * total.sign()  # γ ← ±n γ
    weights[f"{name}.bias"] *= connection.input_scale  # ν ← n ν
    total = total * _scale(connection, "shortcut_scale", name)
    r = _scale(connection, "branch_scale", name) / total
    _scale_branch(weights, f"{name.rpartition('.')[0]}.{sublayer.ends}", r)
    return total


def _scale_branch(weights: dict[str, Tensor], matrix: str, r: Tensor) -> None:
    """W ← r W, along the output dimension of the matrix that ends a branch, and its bias."""
    weights[f"{matrix}.weight"] *= r.reshape(-1, 1)
    weights[f"{matrix}.bias"] *= r


def _scale(connection: Any, attribute: str, name: str) -> Tensor:
    value = getattr(connection, attribute)
    scale = torch.as_tensor(value, dtype=torch.float64, device=connection.weight.device).reshape(-1)
    if attribute == "shortcut_scale":
        parameter = next((n for n, p in connection.named_parameters() if p is value), attribute)
        check_scale(scale, f"{name}.{parameter}", "export an earlier checkpoint, or publish the model with its ω")
    return scale


def check_scale(scale: Tensor, name: str, advice: str) -> None:
    """Raise a ValueError for a shortcut scale, `(n,)`, with an entry that is too close to zero to be folded."""
    if bool((scale.abs() < MIN_SCALE).any()):
        index = int(scale.abs().argmin())
        raise ValueError(
            f"{name} has the entry {float(scale[index]):.3g} at {index}, too close to zero to be folded (|entry| must "
            f"be at least {MIN_SCALE:g}): {advice}."
        )


__all__ = ["reparameterize"]

"""Post-LN models of Transformers that can have an ω: their architectures by model type, and why others cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .architecture import DECODER, ENCODER, Stack, Sublayer


def _bert(kind: str, block: str, reads: tuple[str, ...]) -> Sublayer:
    return Sublayer(
        kind, f"{block}.output.LayerNorm", tuple(f"{block}.self.{name}" for name in reads), f"{block}.output.dense"
    )


BERT = Stack(
    "encoder",
    (
        _bert("self-attention", "attention", ("query", "key", "value")),
        _bert("encoder-attention", "crossattention", ("query",)),
        Sublayer("feed-forward", "output.LayerNorm", ("intermediate.dense",), "output.dense"),
    ),
    layers="layer",
    front="embeddings.LayerNorm",
)
DISTILBERT = Stack(
    "encoder",
    (
        Sublayer(
            "self-attention",
            "sa_layer_norm",
            ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "attention.out_lin",
        ),
        Sublayer("feed-forward", "output_layer_norm", ("ffn.lin1",), "ffn.lin2"),
    ),
    layers="layer",
    front="embeddings.LayerNorm",
    module="transformer",
)
GPT = Stack(
    "decoder",
    (
        Sublayer("self-attention", "ln_1", ("attn.c_attn",), "attn.c_proj"),
        Sublayer("feed-forward", "ln_2", ("mlp.c_fc",), "mlp.c_proj"),
    ),
    layers="h",
    module="",
)
WAV2VEC2 = Stack(
    "encoder",
    (
        Sublayer(
            "self-attention",
            "layer_norm",
            ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "attention.out_proj",
        ),
        Sublayer(
            "feed-forward", "final_layer_norm", ("feed_forward.intermediate_dense",), "feed_forward.output_dense"
        ),
    ),
    front="encoder.layer_norm",
)
# Only a decoder, whose tokens are those of `input_ids`
OPT = Stack("decoder", (DECODER.sublayers[0], DECODER.sublayers[2]))
MARIAN = (ENCODER, DECODER)
BART = tuple(replace(stack, front=f"{stack.name}.layernorm_embedding") for stack in MARIAN)

# Its decoder adds positions after the LayerNorm of the embeddings
BLENDERBOT_SMALL = (BART[0], DECODER)

# By model type
FAMILIES: dict[str, tuple[Stack, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text"), (BERT,)),
    "distilbert": (DISTILBERT,),
    **dict.fromkeys(("bart", "mvp", "plbart", "time_series_transformer"), BART),
    "blenderbot-small": BLENDERBOT_SMALL,
    "marian": MARIAN,
    "fsmt": tuple(replace(stack, time_first=True) for stack in MARIAN),
    "opt": (OPT,),
    "openai-gpt": (GPT,),
    **dict.fromkeys(("wav2vec2", "hubert"), (WAV2VEC2,)),
}
# Required values of configurations, and why: otherwise a model of these families is Pre-LN, or cannot be folded
REQUIRED: dict[str, tuple[Any, str]] = {
    "do_layer_norm_before": (False, "it is Pre-LN otherwise"),
    "do_stable_layer_norm": (False, "it is Pre-LN otherwise"),
    "use_weighted_layer_sum": (False, "it reads the outputs of all layers, which ω scales"),
    "chunk_size_feed_forward": (0, "profiling sees whole sequences"),
    "layerdrop": (0, "the LayerNorm before a skipped layer contains that layer's ω"),
    "encoder_layerdrop": (0, "the LayerNorm before a skipped layer contains that layer's ω"),
    "decoder_layerdrop": (0, "the LayerNorm before a skipped layer contains that layer's ω"),
}
PRE_LN = "it is Pre-LN: its shortcuts pass no LayerNorm into which ω could be folded, and it needs no ω to train"
# Why others cannot have an ω, by model type
REFUSED: dict[str, str] = {
    "admin": "an Admin model has its ω already",
    "albert": "its layers share their weights, so that one LayerNorm would hold the ω of several sub-layers",
    "detr": "it adds positions to the input of queries and keys, after the LayerNorm that would contain ω",
    **dict.fromkeys(
        ("bloom", "gemma", "gpt2", "gpt_neo", "gpt_neox", "llama", "m2m_100", "mbart", "mistral", "pegasus"), PRE_LN
    ),
    **dict.fromkeys(("mt5", "phi", "qwen2", "qwen3", "speech_to_text", "t5", "vit", "whisper", "xglm"), PRE_LN),
}


def stacks_of(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of a model that can have ω, without the sub-layers that its layers lack.

    Raises:
        ValueError: it belongs to no known family, or its configuration is not Post-LN; the message says why.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        why = REFUSED.get(str(model_type), "its architecture is not known")
        raise ValueError(
            f"{type(model).__name__} ({model_type}) gets no ω: {why}. Known are {', '.join(sorted(FAMILIES))}; "
            "describe a Post-LN model of your own with `stacks=`."
        )
    for field, (value, why) in REQUIRED.items():
        if (given := getattr(config, field, value)) != value:
            raise ValueError(
                f"{type(model).__name__} gets no ω with {field}={given!r}: {why}. Make it with {field}={value!r}."
            )
    return tuple(without_missing(base_of(model), stack) for stack in FAMILIES[model_type])


def base_of(model: nn.Module) -> nn.Module:
    """The model without its head, where the paths of stacks begin; for a plain module, the module itself."""
    return getattr(model, "base_model", model)


def without_missing(base: nn.Module, stack: Stack) -> Stack:
    """The stack without sub-layers that its layers lack, and without a first norm if a projection follows it."""
    try:
        first = stack_layers(base, stack)[0]
    except (AttributeError, IndexError) as error:
        raise ValueError(f"{type(base).__name__} gets no ω, because it has no {stack.name} with layers.") from error
    modules = {name for name, _ in first.named_modules()}
    sublayers = tuple(sublayer for sublayer in stack.sublayers if sublayer.norm in modules)
    return replace(stack, sublayers=sublayers, front="" if hasattr(base, "embeddings_project") else stack.front)


def stack_layers(base: nn.Module, stack: Stack) -> Any:
    """The list of the stack's layers."""
    return base.get_submodule(stack.path)


__all__ = ["FAMILIES", "stacks_of"]

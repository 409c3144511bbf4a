"""Converts a fairseq model to the Admin model that computes the same.

This module contains the differences: the names, the positions, the decoder's start, the layout of the vocabulary, and
ω_1, the shortcut scale of a stack's first sub-layer, which Admin models here do not have.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..architecture import STACKS
from ..checkpoints import check_finite
from ..configuration_admin import AdminConfig
from ..modeling_admin import AdminForConditionalGeneration
from ..reparameterization import check_scale
from ..special_tokens import BANNING_BIAS
from .reading import FairseqCheckpoint
from .vocabulary import EOS, PAD, Vocabulary


# Words that the target's dictionary lacks are almost never predicted. No ban: further training can learn them.
LACKING_BIAS = -30.0

# fairseq counts positions from here, after the id of `<pad>`
FIRST_POSITION = 2

# The longest translation of fairseq's own command, and the decoder's start
MAX_LENGTH = 201

# No Transformer of fairseq has longer tables: the file is wrong
_MAX_POSITIONS = 100_000

# Options that change the model and leave no trace among the names of its weights
_REFUSED = (
    *("adaptive_softmax_cutoff", "adaptive_input", "char_inputs", "cross_self_attention", "layer_wise_attention"),
    *("no_cross_attention", "no_decoder_final_norm"),
)
_INIT_TYPES = ("default", "adaptive", "looklinear", "rezero", "rezero_postln", "deepnet")

_ACTIVATIONS = {"gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}

# The parameters of Transformer-Clinic's residual connections
_SCALES = {
    "attention_ratio_change": "self_attn_layer_norm.omega",
    "self_ratio_change": "self_attn_layer_norm.omega",
    "encoder_ratio_change": "encoder_attn_layer_norm.omega",
    "fc_ratio_change": "final_layer_norm.omega",
    "rezero_weight": "self_attn_layer_norm.alpha",
}


@torch.no_grad()
def convert(
    checkpoint: FairseqCheckpoint,
    source: Sequence[str],
    target: Sequence[str],
    merges: Sequence[tuple[str, str]] | None = None,
) -> tuple[AdminForConditionalGeneration, PreTrainedTokenizerFast]:
    """Convert a translation model of fairseq to an Admin model, and its dictionaries to a tokenizer.

    The model computes the same logits, up to rounding, except that of `<pad>`, which is never predicted here. Its
    position table is its own, and is saved with the weights. ω_1 is multiplied into embeddings and positions, and
    divided out of the first projections, and of the decoder's last LayerNorm if the output layer is tied to its
    embeddings. The decoder starts from `<pad>`, a row of zeros; the embedding of `</s>`, which fairseq starts from, is
    in the first row of its positions.

    Args:
        checkpoint: the result of [`read_checkpoint`].
        source, target: the dictionaries, from [`read_dictionary`]; the same one twice if it is joint.
        merges: the merges of the BPE codes, from [`read_codes`]. Without them, the tokenizer's input is text that is
            already split into `sub@@ words`.

    Returns:
        The model in float64 and eval mode, and the tokenizer.

    Raises:
        ValueError: models of this kind are not converted, or the model does not belong to the dictionaries.
    """
    _check_options(checkpoint)
    vocabulary = Vocabulary.of(source, target, merges)
    weights = dict(_renamed(checkpoint.weights))
    try:
        fields = _fields(checkpoint, weights)
        is_shared = checkpoint.option("share_all_embeddings", False)
        if is_shared and list(source) != list(target):
            raise ValueError(
                "The checkpoint shares all embeddings, so both sides have one dictionary: name only that one."
            )
        sizes = {"encoder": len(source), "decoder": len(target)}
        for stack, size in sizes.items():
            if (rows := len(weights[f"model.{stack}.embed_tokens.weight"])) != size:
                raise ValueError(
                    f"{stack}.embed_tokens.weight has {rows:,} rows, but the dictionary of this side {size:,} entries "
                    "with the four special ones: they do not belong together."
                )
        _place_embeddings(checkpoint, weights, vocabulary, fields)
    except KeyError as error:
        raise ValueError(f"The checkpoint is not a Transformer for translation: it lacks {error}.") from error
    except (IndexError, TypeError) as error:  # of matrices without rows or columns
        raise ValueError(f"The checkpoint is not a Transformer for translation: {error}.") from error
    bias = weights["final_logits_bias"] = torch.zeros(1, len(vocabulary.tokens), dtype=torch.float64)
    bias[:, vocabulary.lacking] = LACKING_BIAS
    bias[:, vocabulary.tokens.index(PAD)] = BANNING_BIAS
    tokenizer = vocabulary.tokenizer(merges)
    tokenizer.model_max_length = fields["max_position_embeddings"]
    return _model(AdminConfig.for_tokenizer(tokenizer, **fields), weights), tokenizer


def _check_options(checkpoint: FairseqCheckpoint) -> None:
    for name in _REFUSED:
        if checkpoint.options.get(name):
            raise ValueError(f"The checkpoint was trained with --{name.replace('_', '-')}, which is not converted.")
    if not (arch := checkpoint.option("arch", "transformer")).startswith("transformer"):
        raise ValueError(f"The checkpoint's architecture is {arch!r:.100}; expected fairseq's Transformer.")
    if (init_type := checkpoint.option("init_type", "default")) == "adaptive-profiling":
        raise ValueError(
            "The checkpoint is of the profiling pass (--init-type adaptive-profiling), not of the training after it: "
            "name one of --init-type adaptive."
        )
    if init_type not in _INIT_TYPES:
        raise ValueError(
            f"The checkpoint has --init-type {init_type!r:.50}; expected one of {', '.join(_INIT_TYPES)}."
        )


def _renamed(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights by Marian's names, in float64, except those that fairseq computes itself."""
    for name, value in weights.items():
        prefix, _, last = f"model.{name}".rpartition(".")
        value = value.double()
        if last in ("version", "_float_tensor") or name.endswith("embed_positions.weights"):
            continue
        if last in ("in_proj_weight", "in_proj_bias"):
            for projection, third in zip("qkv", value.chunk(3), strict=False):
                yield f"{prefix}.{projection}_proj.{last.removeprefix('in_proj_')}", third.clone()
        elif re.fullmatch(r"[qkv]_proj_weight", last):
            yield f"{prefix}.{last[0]}_proj.weight", value
        elif name in ("decoder.embed_out", "decoder.output_projection.weight"):
            yield "lm_head.weight", value
        else:
            yield f"{prefix}.{_SCALES.get(last, last)}", value


# --- configuration --------------------------------------------------------------------------------


def _fields(checkpoint: FairseqCheckpoint, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of the configuration that the tokenizer does not say."""
    option = checkpoint.option
    lengths = [option(f"max_{side}_positions", option("max_positions", 1024)) for side in ("source", "target")]
    if not 1 <= (length := max(lengths)) <= _MAX_POSITIONS:
        raise ValueError(f"The checkpoint's longest sentence has {length} tokens; expected 1 to {_MAX_POSITIONS:,}.")
    activation = option("activation_fn", "relu")
    fields: dict[str, Any] = {
        "max_position_embeddings": length,
        "activation_function": _ACTIVATIONS.get(activation, activation),
        "dropout": option("dropout", 0.1),
        "attention_dropout": option("attention_dropout", 0.0),
        "activation_dropout": option("activation_dropout", 0.0) or option("relu_dropout", 0.0),
        "label_smoothing": option("label_smoothing", 0.0),
        "scale_embedding": not option("no_scale_embedding", False),
    }
    for stack in STACKS:
        depth, (_, width) = _depth(checkpoint, weights, stack), weights[f"model.{stack}.embed_tokens.weight"].shape
        if fields.setdefault("d_model", width) != width:
            raise ValueError("Encoder and decoder are of unequal widths, which is not converted.")
        if not (heads := option(f"{stack}_attention_heads", 0)):
            raise ValueError(f"The checkpoint's arguments do not say {stack}_attention_heads.")
        fields |= {
            f"{stack}_layers": depth,
            f"{stack}_attention_heads": heads,
            f"{stack}_ffn_dim": len(weights[f"model.{stack}.layers.0.fc1.weight"]),
            f"{stack}_residual": _system(checkpoint, weights, stack),
        }
    return fields


def _depth(checkpoint: FairseqCheckpoint, weights: Mapping[str, Tensor], stack: str) -> int:
    found = {int(match[1]) for name in weights if (match := re.match(rf"model\.{stack}\.layers\.(\d{{1,6}})\.", name))}
    depth = checkpoint.option(f"{stack}_layers", len(found))
    if not found or found != set(range(depth)):
        raise ValueError(f"The checkpoint has weights of {len(found)} {stack} layers, but its arguments say {depth}.")
    return depth


def _system(checkpoint: FairseqCheckpoint, weights: Mapping[str, Tensor], stack: str) -> str:
    """The residual system of a stack, by its weights where they say it."""
    layer = f"model.{stack}.layers.0"
    if f"{layer}.{_SCALES['fc_ratio_change']}" in weights:
        system = "admin"
    elif f"{layer}.{_SCALES['rezero_weight']}" in weights:
        system = "rezero_post_ln" if f"{layer}.final_layer_norm.weight" in weights else "rezero"
    elif checkpoint.option("init_type", "default") == "deepnet":
        system = "deepnorm"
    else:
        system = "post_ln"
    if not checkpoint.option(f"{stack}_normalize_before", False):
        return system
    if system != "post_ln":
        raise ValueError(f"The {stack} is {system} with --{stack}-normalize-before, which is not converted.")
    version = checkpoint.weights.get(f"{stack}.version")
    if version is None or version.numel() != 1 or float(version) < (2 if stack == "encoder" else 3):
        raise ValueError(
            f"The {stack} is Pre-LN of an early fairseq, without a LayerNorm after it, which is not converted."
        )
    return "pre_ln"


# --- embeddings, positions and ω_1 ----------------------------------------------------------------


def _place_embeddings(
    checkpoint: FairseqCheckpoint, weights: dict[str, Tensor], vocabulary: Vocabulary, fields: dict[str, Any]
) -> None:
    """Put embeddings into the vocabulary's layout, make the tables of positions, and fold ω_1 into both."""
    sides = {"encoder": vocabulary.source_rows, "decoder": vocabulary.target_rows}
    is_shared = checkpoint.option("share_all_embeddings", False)
    is_tied = is_shared or checkpoint.option("share_decoder_input_output_embed", False)
    embeddings = {stack: weights[f"model.{stack}.embed_tokens.weight"] for stack in sides}
    if is_tied and not weights.pop("lm_head.weight", embeddings["decoder"]).equal(embeddings["decoder"]):
        raise ValueError("The checkpoint's output layer is not its decoder's embeddings, as its arguments say.")
    if is_shared and not embeddings["encoder"].equal(embeddings["decoder"]):
        raise ValueError("The checkpoint's embeddings are not shared, as its arguments say.")
    output = embeddings["decoder"] if is_tied else weights["lm_head.weight"]
    for stack, rows in sides.items():
        table = _positions(checkpoint, weights, stack, fields["max_position_embeddings"], fields["d_model"])
        omega = weights.pop(f"model.{stack}.layers.0.self_attn_layer_norm.omega", None)
        if omega is not None:
            check_scale(omega, f"ω_1 of the {stack}", "import another checkpoint")
            embeddings[stack], table = embeddings[stack] * omega, table * omega
            for read in STACKS[stack].sublayers[0].reads:
                weights[f"model.{stack}.layers.0.{read}.weight"] /= omega
            if stack == "decoder" and is_tied:
                output = embeddings[stack]
                for name in ("weight", "bias"):
                    weights[f"model.decoder.layers.{fields['decoder_layers'] - 1}.final_layer_norm.{name}"] /= omega
        weights[f"model.{stack}.embed_tokens.weight"] = _laid_out(embeddings[stack], rows)
        weights[f"model.{stack}.embed_positions.weight"] = table
    weights["lm_head.weight"] = _laid_out(output, vocabulary.target_rows)
    scale = math.sqrt(fields["d_model"]) if fields["scale_embedding"] else 1.0
    start = weights["model.decoder.embed_tokens.weight"][vocabulary.tokens.index(EOS)]
    weights["model.decoder.embed_positions.weight"][0] += scale * start
    fields["share_encoder_decoder_embeddings"] = is_shared and torch.equal(*embeddings.values())
    fields["tie_word_embeddings"] = is_tied
    if fields["share_encoder_decoder_embeddings"]:
        weights["model.shared.weight"] = weights["model.encoder.embed_tokens.weight"]


def _laid_out(matrix: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows of a matrix of fairseq's by the ids of the vocabulary, with zeros for `<pad>`."""
    return torch.cat([matrix[list(rows)], matrix.new_zeros(1, matrix.shape[1])])


def _positions(
    checkpoint: FairseqCheckpoint, weights: dict[str, Tensor], stack: str, length: int, width: int
) -> Tensor:
    """What fairseq adds to the embeddings of a stack, `(length, width)`."""
    learnt = weights.pop(f"model.{stack}.embed_positions.weight", None)
    if (learnt is not None) != checkpoint.option(f"{stack}_learned_pos", False):
        raise ValueError(
            f"The checkpoint's arguments and weights disagree on whether positions of the {stack} are learnt."
        )
    if learnt is not None:
        if (rows := len(learnt) - FIRST_POSITION) < length:
            raise ValueError(f"The {stack} has learnt {rows} positions, but sentences may have {length} tokens.")
        return learnt[FIRST_POSITION : FIRST_POSITION + length].clone()
    if checkpoint.option("no_token_positional_embeddings", False):
        return torch.zeros(length, width, dtype=torch.float64)
    if (half := width // 2) < 2:
        raise ValueError(f"The model's width is {width}; expected 4 or more.")
    # In float32 as fairseq has them: at position 1,000 that is 1e-5 from the exact ones
    frequencies = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
    angles = torch.outer(torch.arange(FIRST_POSITION, FIRST_POSITION + length).float(), frequencies)
    table = torch.cat([angles.sin(), angles.cos(), angles.new_zeros(length, width - 2 * half)], dim=1)
    return table.double()


# --- the model ------------------------------------------------------------------------------------


def _model(config: AdminConfig, weights: dict[str, Tensor]) -> AdminForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):  # a constructor draws weights
        model = AdminForConditionalGeneration(config).double().eval()
    expected = model.state_dict()
    if "model.omega_profiled" in expected:
        weights["model.omega_profiled"] = torch.ones(())  # ω of every such checkpoint started from a profile
    for name in sorted(expected.keys() ^ weights.keys()):
        kind = "lacks" if name in expected else "has weights that are not converted:"
        raise ValueError(f"The checkpoint {kind} {name}.")
    for name, value in expected.items():
        if (shape := tuple(weights[name].shape)) != tuple(value.shape):
            raise ValueError(f"The checkpoint has {name} of the shape {shape}; expected {tuple(value.shape)}.")
    model.load_state_dict(weights)
    check_finite(model, "The checkpoint")
    model.generation_config.max_length = min(MAX_LENGTH, config.max_position_embeddings)
    return cast(AdminForConditionalGeneration, model)

"""The base of all Admin models, apart from the network: initialisation, loading, and the state of ω."""

import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.marian.modeling_marian import MarianPreTrainedModel, MarianSinusoidalPositionalEmbedding
from transformers.utils import logging

from .attention import ADMIN_ATTENTION
from .checkpoints import check_finite, check_weight_files, explained_errors
from .configuration_admin import AdminConfig
from .omega_state import OmegaState
from .positions import position_tables
from .publishing import PublishableModel
from .residual import AdminConnection, ScaleModule, profiled_connections
from .special_tokens import BANNING_BIAS


logger = logging.get_logger(__name__)


def embedding_init(weight: Tensor, padding_idx: int | None) -> None:
    """fairseq's N(0, D^-1/2), with a zero row for padding."""
    init.normal_(weight, mean=0.0, std=weight.shape[1] ** -0.5)
    # The slice below loses the mark of a loaded tensor
    if padding_idx is not None and not getattr(weight, "_is_hf_initialized", False):
        init.zeros_(weight[padding_idx])


def logits_bias_init(bias: Tensor, pad_token_id: int) -> None:
    """Padding is never predicted."""
    value = torch.zeros_like(bias)
    value[:, pad_token_id] = BANNING_BIAS
    init.copy_(bias, value)


class AdminPreTrainedModel(OmegaState, PublishableModel, MarianPreTrainedModel):
    """The base of all Admin models."""

    config: AdminConfig
    _no_split_modules = ["AdminEncoderLayer", "AdminDecoderLayer"]
    # A Pegasus whose embeddings are not tied has this matrix too, and does not use it
    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?shared\.weight$"]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The requested attention, or the models' own."""
        return super().get_correct_attn_implementation(requested_attention or ADMIN_ATTENTION, is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The standard initialisation (fairseq's), which residual systems refine by marking projections."""
        if isinstance(module, nn.Linear):
            getattr(module, "initializer", init.xavier_uniform_)(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and not isinstance(module, MarianSinusoidalPositionalEmbedding):
            embedding_init(module.weight, module.padding_idx)
        else:
            super()._init_weights(module)
        if isinstance(module, ScaleModule):
            for name, value in module.initial_scales.items():
                init.constant_(module.get_parameter(name), value)
        if hasattr(module, "final_logits_bias"):
            logits_bias_init(cast(Tensor, module.final_logits_bias), self.padding_id)
        if hasattr(module, "omega_profiled"):
            init.zeros_(cast(Tensor, module.omega_profiled))

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """The last step of loading: from here on ω counts as initialised.

        A checkpoint without any ω is plain Post-LN, where ω = 1. One of an earlier version does not say whether it was
        profiled: it was if an ω is not 1. Positions are frozen again, which loading forgets and
        DistributedDataParallel would mistake for parameters without a gradient.
        """
        is_silent = any(name.rpartition(".")[2] == "omega_profiled" for name in loading_info.missing_keys)
        super()._adjust_missing_and_unexpected_keys(loading_info)
        profiled = {f"{name}.omega": connection for name, connection in profiled_connections(self)}
        if profiled and profiled.keys() == set(loading_info.missing_keys):
            loading_info.missing_keys = set()
            self._said_unprofiled = True
            logger.warning(
                "The checkpoint has no shortcut scales: it is plain Post-LN, and training continues from it with ω = "
                "1."
            )
        for name, connection in profiled.items():
            connection.initialized = name not in loading_info.missing_keys
        if is_silent:
            self.set_profiled(any(bool((connection.omega != 1).any()) for connection in profiled.values()))
        for _, table in position_tables(self):
            table.weight.requires_grad_(False)

    def complete_generation_config(self) -> None:
        """Let `generate` continue to the end of a sentence: by default, Transformers cuts at 20 tokens."""
        if self.can_generate() and self.generation_config.max_length is None:
            self.generation_config.max_length = self.config.max_position_embeddings

    @property
    def padding_id(self) -> int:
        return cast(int, self.config.pad_token_id)  # never None: AdminConfig fills it in

    def profiled_connections(self) -> Iterator[AdminConnection]:
        return (connection for _, connection in profiled_connections(self))

    @property
    def _profiled_flag(self) -> Tensor | None:
        return getattr(self.base_model, "omega_profiled", None)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        use_safetensors: bool = True,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load an Admin checkpoint, or one of Marian, such as a vanilla model, whose ω then is 1.

        As [`~transformers.PreTrainedModel.from_pretrained`], except for checkpoints that cannot be used: pickles are
        refused unless `use_safetensors=False`, and a damaged checkpoint raises an error of one sentence.

        Raises:
            OSError: there are no weights, or they are truncated, damaged or pickled.
            ValueError: config.json belongs to another model or has wrong values, or weights are NaN or infinite.
            RuntimeError: weights do not have the shapes of config.json.
        """
        source = pretrained_model_name_or_path
        with explained_errors(source):
            odd = check_weight_files(source, **kwargs) if source is not None and use_safetensors else {}
            model, info = cast(Any, super()).from_pretrained(
                source,
                *model_args,
                use_safetensors=use_safetensors,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            name, found, expected = min(info["mismatched_keys"])
            raise RuntimeError(
                f"The weights of {source} do not fit its config.json: {name} has the shape {tuple(found)}, expected "
                f"{tuple(expected)}{_and_others(info['mismatched_keys'])}."
            )
        for name in odd.keys() - set(info["unexpected_keys"]):
            raise OSError(f"{source} contains {name} as {odd[name]}; expected a floating-point tensor.")
        check_finite(model, f"The checkpoint {source}")
        model.complete_generation_config()
        return (model, info) if output_loading_info else model


def load_complete(model_class: type[AdminPreTrainedModel], source: str | os.PathLike, config: AdminConfig) -> Any:
    """Load a model whose checkpoint has all of its weights, and no others.

    Raises:
        OSError, ValueError, RuntimeError: as `from_pretrained`; also if weights are missing or unexpected.
    """
    model, info = model_class.from_pretrained(source, config=config, output_loading_info=True)
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        kind = "lacks" if info["missing_keys"] else "has no place for"
        raise ValueError(f"{source} {kind} {min(wrong)}: config.json and weights do not belong together.")
    return model


def _and_others(items: Any) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


__all__ = ["AdminPreTrainedModel", "load_complete"]

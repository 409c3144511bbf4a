"""Sharded weights: whether training will shard them, and a model that FSDP can shard."""

from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainingArguments

from .pretrained import AdminPreTrainedModel


def sharding(args: TrainingArguments) -> str | None:
    """What shards the model's weights over the processes when training begins: "FSDP", "DeepSpeed" or None.

    A training argument or `accelerate launch` chooses it.
    """
    for kind, argument in (("DeepSpeed", args.deepspeed), ("FSDP", args.fsdp)):
        launched = parse_flag_from_env(f"ACCELERATE_USE_{kind.upper()}")
        # On a CPU, Trainer turns both into DistributedDataParallel
        if (argument or launched) and not args.use_cpu:
            return kind
    return None


def make_embedding_one_module(model: AdminPreTrainedModel) -> None:
    """Keep the embedding in one module, under one name. Marian has three modules that share its weight.

    accelerate shards only one of them, and PyTorch then refuses the others. Also, a checkpoint of FSDP2 cannot be
    loaded again if the weight of one module has several names.
    """
    base: Any = model.base_model
    if hasattr(model, "injection") or not base.config.share_encoder_decoder_embeddings:
        return
    base.set_input_embeddings(base.get_input_embeddings())
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

    def leave_out_aliases(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        for alias in aliases:
            state_dict.pop(prefix + alias)

    def add_aliases(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (name := f"{prefix}shared.weight") in state_dict:
            state_dict.update({prefix + alias: state_dict[name] for alias in aliases})

    base.register_state_dict_post_hook(leave_out_aliases)
    base.register_load_state_dict_pre_hook(add_aliases)

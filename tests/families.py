"""Tiny stock models of every family that can have an ω, and what an ω does to them, computed by other means."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from conftest import randomize
from torch import Tensor, nn

from admin_hf.families import base_of, stack_layers


_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_BERT |= {"vocab_size": 50, "max_position_embeddings": 40}
_BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 40}
_MARIAN = {"pad_token_id": 49, "decoder_start_token_id": 49, "eos_token_id": 0, "forced_eos_token_id": 0}
_OPT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 50}
_OPT |= {"word_embed_proj_dim": 16, "max_position_embeddings": 40, "do_layer_norm_before": False}
_SOUND = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_SOUND |= {"vocab_size": 50, "conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (5,), "layerdrop": 0.0}
_SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
_SERIES = {"prediction_length": 4, "context_length": 8, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}

# The class of Transformers and its configuration, by family
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", _BERT),
    "bert-decoder": ("BertLMHeadModel", _BERT | {"is_decoder": True, "add_cross_attention": True}),
    "roberta": ("RobertaForMaskedLM", _BERT),
    "xlm-roberta": ("XLMRobertaForMaskedLM", _BERT),
    "camembert": ("CamembertForMaskedLM", _BERT),
    "electra": ("ElectraForMaskedLM", _BERT | {"embedding_size": 16}),
    "electra-projected": ("ElectraForMaskedLM", _BERT | {"embedding_size": 8}),
    "data2vec-text": ("Data2VecTextForMaskedLM", _BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50},
    ),
    "bart": ("BartForConditionalGeneration", _BART),
    "mvp": ("MvpForConditionalGeneration", _BART),
    "plbart": ("PLBartForConditionalGeneration", _BART),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", _BART),
    "marian": ("MarianMTModel", _BART | _MARIAN),
    "fsmt": (
        "FSMTForConditionalGeneration",
        _BART | {"src_vocab_size": 50, "tgt_vocab_size": 50, "langs": ["a", "b"]},
    ),
    "opt": ("OPTForCausalLM", _OPT),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}),
    "wav2vec2": ("Wav2Vec2ForCTC", _SOUND),
    "hubert": ("HubertForCTC", _SOUND),
    "time-series": ("TimeSeriesTransformerForPrediction", _BART | _SERIES),
}
_DROPOUTS = ("dropout", "activation_dropout", "attention_dropout")


def family_model(family: str, random: bool = False, **changes: Any) -> Any:
    """A stock model in evaluation mode, fresh; or with all weights, biases and LayerNorms moved at random."""
    name, values = FAMILIES[family]
    return stock_model(name, random, **values | changes)


def stock_model(name: str, random: bool = False, **values: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**values)).eval()
    return randomize(model, scale=0.3) if random else model


def family_batch(model: Any) -> dict[str, Tensor]:
    """Random inputs with labels; sentences are padded on the right, but for the first."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    if config.model_type in ("wav2vec2", "hubert"):
        sound = torch.randn(2, 400, generator=generator).to(model.dtype)
        mask = torch.ones(2, 400, dtype=torch.long)
        mask[1, 300:] = 0
        return {"input_values": sound, "attention_mask": mask, "labels": torch.randint(1, 49, (2, 5))}
    if config.model_type == "time_series_transformer":
        shapes = {"past_values": (2, 15), "past_time_features": (2, 15, 0), "future_values": (2, 4)}
        shapes |= {"past_observed_mask": (2, 15), "future_time_features": (2, 4, 0)}
        return {name: torch.rand(shape, generator=generator).to(model.dtype) for name, shape in shapes.items()}
    ids, labels = torch.randint(5, 48, (2, 3, 9), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    for row in (1, 2):
        batch["attention_mask"][row, -row:] = 0
        labels[row, -row:] = -100
    if getattr(config, "add_cross_attention", False):
        batch["encoder_hidden_states"] = torch.randn(3, 5, 16, generator=generator).to(model.dtype)
    return batch


def outputs(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Everything that a pass in evaluation mode returns, but for caches."""
    torch.manual_seed(0)  # of the classes that draw in their loss
    with torch.no_grad():
        return _tensors(model.eval()(**batch))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.to_tuple() if hasattr(value, "to_tuple") else value if isinstance(value, tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two outputs."""
    assert len(one) == len(other) > 0
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def without_dropout(model: nn.Module) -> Any:
    """Switch all dropout off, so that train mode is deterministic."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def set_random_omega(model: Any, seed: int = 2) -> None:
    """Give every ω entries between 0.5 and 3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for connection in connections(model):
            if hasattr(connection, "omega"):
                omega = torch.rand(connection.omega.shape, generator=generator) * 2.5 + 0.5
                connection.omega.copy_(omega)


def connections(model: Any) -> list[Any]:
    return [connection for stack in model.injection.stacks.values() for connection in stack]


# --- the same by other means ----------------------------------------------------------------------


@dataclass
class Seen:
    """What passed a stack: x_i now, and the shortcut x_{i-1} and branch f_i of every sub-layer."""

    x: Tensor | None = None
    parts: list[tuple[Tensor, Tensor]] | None = None

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.x, self.parts = args[0] if args else kwargs["hidden_states"], []


class ScaledShortcut(nn.Module):
    """In place of a LayerNorm: LN(x_{i-1} + f_i + (ω_i − 1) ⊙ x_{i-1}), from the sum that the model hands to it."""

    def __init__(self, norm: nn.Module, seen: Seen, omega: Tensor | float) -> None:
        super().__init__()
        self.norm, self.seen, self.omega = norm, (seen,), omega

    def forward(self, b: Tensor) -> Tensor:
        (seen,) = self.seen
        seen.parts.append((seen.x, b - seen.x))
        seen.x = self.norm(b + (self.omega - 1) * seen.x)
        return seen.x


def reference(stock: nn.Module, injected: Any) -> tuple[Any, dict[str, Seen]]:
    """A copy of the stock model that has the other's ω on its shortcuts, and what passes its stacks."""
    model = copy.deepcopy(stock)
    base, everything = base_of(model), {}
    for name, stack in injection_of(injected).descriptions.items():
        seen = everything[name] = Seen()
        layers = stack_layers(base, stack)
        layers[0].register_forward_pre_hook(seen.enter, with_kwargs=True)
        omegas = iter(injection_of(injected).stacks[name])
        for layer in layers:
            for sublayer in stack.sublayers:
                path, _, last = sublayer.norm.rpartition(".")
                parent = layer.get_submodule(path)
                scale = torch.as_tensor(next(omegas).shortcut_scale).detach().clone()
                setattr(parent, last, ScaledShortcut(getattr(parent, last), seen, scale))
    return model, everything


def injection_of(model: Any) -> Any:
    return model.injection

"""Admin Transformers: Marian with other residual connections. Everything that is not written here is Marian's."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.marian.modeling_marian import (
    MarianAttention,
    MarianDecoder,
    MarianDecoderLayer,
    MarianEncoder,
    MarianEncoderLayer,
    MarianModel,
    MarianMTModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_admin import AdminConfig
from .kernels import cast_once, dropout, relu_dropout, weights_cast_at_once
from .loss import cross_entropy, linear_cross_entropy
from .pretrained import AdminPreTrainedModel, embedding_init, logits_bias_init
from .residual import ResidualSystem, profiled_connections, residual_system
from .special_tokens import MENDED, check_padding


logger = logging.get_logger(__name__)


CACHE_NAMES = "cache", "past_key_values"  # up to Transformers 5.23 the second


def given_cache(inputs: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward."""
    return next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)


# Differences to MarianAttention:
# - projections that read one input are one product, where `cast_at_once` has joined their weights
class AdminAttention(MarianAttention):
    joined_weight: Tensor | None = None
    joined_bias: Tensor | None = None

    @property
    def projections(self) -> list[nn.Module]:
        """Those of keys and values, and in self-attention of queries."""
        is_cross_attention = self.is_decoder and not self.is_causal
        return [self.k_proj, self.v_proj] if is_cross_attention else [self.q_proj, self.k_proj, self.v_proj]

    def forward(  # type: ignore[override]  # the cache has another name in each version, and stays in kwargs
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Marian's, of `hidden_states`, `(batch_size, target_length, d_model)`."""
        if self.joined_weight is None or given_cache(kwargs) is not None:
            return super().forward(hidden_states, key_value_states, **kwargs)
        for name in CACHE_NAMES:
            kwargs.pop(name, None)
        x = hidden_states if key_value_states is None else key_value_states
        projected = nn.functional.linear(x, self.joined_weight, self.joined_bias).chunk(len(self.projections), dim=-1)
        if key_value_states is not None:
            projected = self.q_proj(hidden_states), *projected
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in projected)
        implementation, mask = cast(AdminConfig, self.config)._attn_implementation, kwargs.pop("attention_mask", None)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(self, q, k, v, mask, dropout=self.dropout, scaling=self.scaling, **kwargs)
        return self.out_proj(output.flatten(2)), weights


class _ResidualLayer(nn.Module):
    """What encoder and decoder layers share: a residual connection around a branch, and the feed-forward branch."""

    dropout: float
    activation_dropout: float
    activation_fn: nn.Module
    fc1: nn.Linear
    fc2: nn.Linear

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for module in self.children():
            if isinstance(module, MarianAttention):
                module.__class__ = AdminAttention

    def residual(
        self, connection: Any, x: Tensor, branch: Callable[[Tensor], Tensor], layer_input: Tensor | None = None
    ) -> Tensor:
        # x_i = f_LN(x_{i-1} ⊙ ω_i + f_i(x_{i-1})); the dropout after the branch is part of f_i
        f = branch(cast_once(connection.branch_input(x)))
        shortcut = x + layer_input if layer_input is not None and connection.adds_layer_input else x
        return connection(shortcut, dropout(f, self.dropout, self.training))

    def feed_forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if isinstance(self.activation_fn, nn.ReLU):
            x = relu_dropout(x, self.activation_dropout, self.training)
        else:
            x = dropout(self.activation_fn(x), self.activation_dropout, self.training)
        return self.fc2(x)


# Differences to MarianEncoderLayer:
# - the residual system replaces the layer norms by residual connections, under Marian's names
# - no clamp of infinite float16 values: it would make every step of a GPU wait, and LayerNorm outputs are bounded
class AdminEncoderLayer(_ResidualLayer, MarianEncoderLayer):
    def __init__(self, config: AdminConfig, layer_idx: int, system: ResidualSystem) -> None:
        super().__init__(config, layer_idx)
        system.connect(self, layer_idx)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Transform `hidden_states`, `(batch_size, source_length, d_model)`."""

        def self_attention(x: Tensor) -> Tensor:
            return self.self_attn(x, attention_mask=attention_mask, **kwargs)[0]

        x = self.residual(self.self_attn_layer_norm, hidden_states, self_attention)
        return self.residual(self.final_layer_norm, x, self.feed_forward, hidden_states)


class AdminDecoderLayer(_ResidualLayer, MarianDecoderLayer):
    def __init__(self, config: AdminConfig, layer_idx: int, system: ResidualSystem) -> None:
        super().__init__(config, layer_idx)
        system.connect(self, layer_idx)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        """Transform `hidden_states`, `(batch_size, target_length, d_model)`; `kwargs` are passed to attention."""

        def self_attention(x: Tensor) -> Tensor:
            return self.self_attn(x, attention_mask=attention_mask, **kwargs)[0]

        def encoder_attention(x: Tensor) -> Tensor:
            source = {"key_value_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            return self.encoder_attn(x, **source, **kwargs)[0]

        x = self.residual(self.self_attn_layer_norm, hidden_states, self_attention)
        if encoder_hidden_states is not None:
            x = self.residual(self.encoder_attn_layer_norm, x, encoder_attention)
        return self.residual(self.final_layer_norm, x, self.feed_forward, hidden_states)


@contextmanager
def _stock_constructor(config: AdminConfig) -> Iterator[None]:
    """Around Marian's constructor, whose stacks or layers are replaced at once: it builds no layers (else making a
    model takes three times as long), draws no weights, and spares `config.gradient_checkpointing`, used once."""
    legacy = config.__dict__.pop("gradient_checkpointing", None)
    layers = config.encoder_layers, config.decoder_layers
    config.encoder_layers = config.decoder_layers = 0
    try:
        with init.no_init_weights():
            yield
    finally:
        config.encoder_layers, config.decoder_layers = layers
        if legacy is not None:
            config.gradient_checkpointing = legacy


def _check_ids(name: str, ids: Tensor | None, vocab_size: int) -> None:
    """Refuse token ids outside the vocabulary, on the CPU only: on a GPU looking at them would stop the step.

    Raises:
        ValueError: an id below 0 (but −100, "no label") or not below `vocab_size`.
    """
    if ids is None or ids.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    ids = ids[ids != -100] if name == "labels" else ids
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < vocab_size):
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(
            f"{name} contains the id {int(wrong)}, but the vocabulary has the ids 0 to {vocab_size - 1}: "
            "tokenizer and model do not belong together."
        )


class _StackMixin(AdminPreTrainedModel):
    """What the two stacks share: their residual system's layers, what follows them, and the checks of their input."""

    embed_tokens: nn.Embedding

    def _backward_compatibility_gradient_checkpointing(self) -> None:
        """Left to the whole model: here one stack would use up the configuration's attribute before the other."""

    def _build(self, stack: str, layer_class: type[nn.Module]) -> None:
        system = residual_system(self.config, stack)
        layers = range(getattr(self.config, f"{stack}_layers"))
        self.layers = nn.ModuleList(layer_class(self.config, i, system) for i in layers)
        self.layer_norm = system.after_stack()
        self.post_init()

    def _check_input(self, name: str, input_ids: Tensor | None, inputs_embeds: Tensor | None, past: int = 0) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"Give exactly one of {name}_ids and {name}s_embeds.")
        shape = cast(Tensor, input_ids if input_ids is not None else inputs_embeds).shape
        length, longest = past + shape[1], self.config.max_position_embeddings
        if length > longest:
            raise ValueError(f"{name} has {length} tokens, but max_position_embeddings is {longest}: cut or split it.")
        _check_ids(f"{name}_ids", input_ids, self.embed_tokens.weight.shape[0])

    def _after_stack(self, outputs: Any) -> Any:
        outputs.last_hidden_state = self.layer_norm(outputs.last_hidden_state)
        if outputs.hidden_states is not None and outputs.hidden_states[-1] is not None:
            outputs.hidden_states = (*outputs.hidden_states[:-1], outputs.last_hidden_state)
        return outputs


# Differences to MarianEncoder: residual connections, a module after the stack, and inputs_embeds that are scaled as
# the embeddings of input_ids are, so that both mean the same (MarianDecoder does that already).
class AdminEncoder(_StackMixin, MarianEncoder):
    def __init__(self, config: AdminConfig) -> None:
        with _stock_constructor(config):
            super().__init__(config)
        self._build("encoder", AdminEncoderLayer)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Encode `input_ids`, `(batch_size, source_length)`, where `attention_mask` is 1 except at padding."""
        self._check_input("input", input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        inputs_embeds = inputs_embeds * self.embed_scale
        outputs = super().forward(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        return self._after_stack(outputs)


class AdminDecoder(_StackMixin, MarianDecoder):
    def __init__(self, config: AdminConfig) -> None:
        with _stock_constructor(config):
            super().__init__(config)
        self._build("decoder", AdminDecoderLayer)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Decode `input_ids`, `(batch_size, target_length)`, which follow the positions in the cache of `kwargs`."""
        cache = given_cache(kwargs)
        past = cache.get_seq_length() if cache is not None else 0
        # A static cache has its length in a tensor; to read it, the GPU would have to wait
        if isinstance(past, Tensor):
            past = int(past) if past.device.type == "cpu" and not torch.compiler.is_compiling() else 0
        self._check_input("decoder_input", input_ids, inputs_embeds, past)
        if encoder_hidden_states is not None:
            encoder_hidden_states = cast_once(encoder_hidden_states)  # once, for the keys of all layers
        outputs = super().forward(
            input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return self._after_stack(outputs)


class AdminModel(AdminPreTrainedModel, MarianModel):
    """The bare encoder-decoder, without the output layer. See [`~transformers.MarianModel`] for its arguments."""

    _keys_to_ignore_on_load_missing = [*MarianModel._keys_to_ignore_on_load_missing, "omega_profiled"]

    def __init__(self, config: AdminConfig) -> None:
        with _stock_constructor(config):
            super().__init__(config)
        self.encoder = AdminEncoder(config)
        self.decoder = AdminDecoder(config)
        if any(profiled_connections(self)):
            self.omega_profiled = nn.Buffer(torch.zeros(()))  # 1 once a profile has set ω
        self.post_init()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint of an earlier version does not say whether it was profiled: it was if an ω is not 1."""
        name = f"{prefix}omega_profiled"
        if hasattr(self, "omega_profiled") and name not in state_dict:
            names = [f"{prefix}{path}.omega" for path, _ in profiled_connections(self)]
            omegas = [state_dict[name] for name in names if name in state_dict]
            profiled = any(bool((omega != 1).any()) for omega in omegas) if omegas else self.is_profiled
            state_dict[name] = torch.tensor(float(profiled))
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass
class AdminSeq2SeqLMOutput(Seq2SeqLMOutput):
    """The output of a model in train mode: `loss` is smoothed, `logits` is None.

    Attributes:
        nll_loss: the loss without label smoothing, a scalar without a gradient.
    """

    nll_loss: Tensor | None = None


class AdminForConditionalGeneration(AdminPreTrainedModel, MarianMTModel):
    """An Admin Transformer for translation, used like any sequence-to-sequence model of Transformers.

    A new model has ω = 1, which is plain Post-LN. Profile it before training, with [`AdminProfilingCallback`] in a
    Trainer, or with [`profile_residuals`] and [`initialize_omega`].

    Example:

    ```python
    >>> import torch
    >>> from admin_hf import AdminConfig, AdminForConditionalGeneration, initialize_omega, profile_residuals

    >>> config = AdminConfig(vocab_size=100, d_model=32, encoder_layers=4, decoder_layers=4)
    >>> model = AdminForConditionalGeneration(config)
    >>> batch = {"input_ids": torch.randint(2, 99, (4, 10)), "labels": torch.randint(2, 99, (4, 12))}
    >>> initialize_omega(model, profile_residuals(model, batch))
    >>> model(**batch).loss.shape
    torch.Size([])

    ```
    """

    _default_auto_class = "AutoModelForSeq2SeqLM"
    _keys_to_ignore_on_load_missing = [*MarianMTModel._keys_to_ignore_on_load_missing, "omega_profiled"]
    _has_trained = False

    def __init__(self, config: AdminConfig) -> None:
        with _stock_constructor(config):
            super().__init__(config)
        self.model = AdminModel(config)
        logits_bias_init(self.final_logits_bias, self.padding_id)
        system = residual_system(config, "decoder")
        standard = partial(embedding_init, padding_idx=config.pad_token_id)
        self.lm_head.initializer = system.initializers.get("lm_head", standard)
        if not system.ties_output:
            tied = self._tied_weights_keys.items()
            self._tied_weights_keys = {name: source for name, source in tied if name != "lm_head.weight"}
        self.post_init()
        self.complete_generation_config()

    def _resize_token_embeddings(self, *args: Any) -> nn.Embedding:
        new: nn.Embedding = super()._resize_token_embeddings(*args)
        if self.config.share_encoder_decoder_embeddings:
            # Three modules of one weight again: of one module, PEFT would adapt `shared`, which nothing calls
            self.model.shared, self.model.decoder.embed_tokens = (
                copy.deepcopy(new, {id(new.weight): new.weight}) for _ in range(2)
            )
        return new

    def _resize_final_logits_bias(self, new_num_tokens: int) -> None:
        # Marian has resized the output layer if it is tied, or untied by the configuration, but not by a system
        rows = self.model.decoder.embed_tokens.weight.shape[0]
        if self.lm_head.weight.shape[0] != rows:
            self.lm_head = self._get_resized_lm_head(self.lm_head, rows)
        # The output layer has the new size, which `pad_to_multiple_of` may have rounded up
        old = self.final_logits_bias
        new = old.new_zeros(1, self.lm_head.weight.shape[0])
        kept = min(old.shape[1], new.shape[1])
        new[:, :kept] = old[:, :kept]
        self.final_logits_bias = nn.Buffer(new)

    def _check_training(self, batch: dict[str, Any]) -> None:
        """Find what would spoil training without an error, in the first pass; on a CPU, padding in every one.

        Not in compiled passes, where [`AdminProfilingCallback`] looks at the first batch.

        Raises:
            ValueError: as [`check_padding`], or the configuration has got another padding id.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or getattr(self, "_is_replica", False):
            return
        if self._has_trained and self.device.type != "cpu":
            return
        padding_id: Any = self.config.pad_token_id
        check_padding(batch, padding_id)
        if self._has_trained:
            return
        self._has_trained = True
        padding_idx = getattr(self.get_input_embeddings(), "padding_idx", None)
        if padding_idx not in (None, padding_id):
            raise ValueError(
                f"config.pad_token_id is {padding_id} now, but the model was made with {padding_idx}, which it treats "
                f"as padding and never predicts. {MENDED}"
            )
        self.warn_unprofiled()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: tuple[Tensor] | BaseModelOutput | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """As [`~transformers.MarianMTModel`], with another loss.

        The loss is averaged over targets, or divided by `num_items_in_batch` if given. In train mode it is smoothed
        by `config.label_smoothing` and computed without the full logits, so `logits` is None.

        Args:
            input_ids: source ids, `(batch_size, source_length)`.
            attention_mask: 1 for source tokens and 0 for padding, of the same shape.
            labels: target ids, `(batch_size, target_length)`, −100 at padding. Shifted right by one, they are also the
                decoder's input, unless `decoder_input_ids` is given.
            kwargs: `num_items_in_batch`, the number of targets in the whole update, as Trainer passes it; the cache;
                and arguments of attention.

        Raises:
            ValueError: an id is outside the vocabulary (checked on the CPU only), or a sequence is longer than
                `config.max_position_embeddings`; or, in training, labels contain the padding id, or sources are
                padded on the left (on a GPU checked in the first pass only).
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        padding_id: Any = self.config.pad_token_id
        if self.training and torch.is_grad_enabled():
            self._check_training({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
        _check_ids("labels", labels, self.lm_head.weight.shape[0])
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "use_cache": use_cache,
            "return_dict": True,
            **kwargs,
        }
        if labels is not None and self.training:
            with weights_cast_at_once(self):
                decoded = self.model(**inputs)
            hidden, bias = decoded.last_hidden_state, self.final_logits_bias
            of_loss = labels, padding_id, self.config.label_smoothing, num_items_in_batch
            if type(self.lm_head).forward is nn.Linear.forward:
                loss, nll = linear_cross_entropy(hidden, self.lm_head.weight, bias, *of_loss)
            else:  # an adapter's
                loss, nll = cross_entropy(self.lm_head(hidden) + bias, *of_loss)
            rest = {name: value for name, value in decoded.items() if name != "last_hidden_state"}
            return AdminSeq2SeqLMOutput(loss=loss, nll_loss=nll, **rest)

        outputs = super().forward(**inputs)
        if torch.is_grad_enabled():
            # With a loss of the caller, too, the output layer's padding row gets no gradient, and stays zero
            is_pad = torch.arange(outputs.logits.shape[-1], device=outputs.logits.device).eq(padding_id)
            outputs.logits = torch.where(is_pad, outputs.logits.detach(), outputs.logits)
        if labels is None:
            return outputs
        loss = fixed_cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(), num_items_in_batch)
        return Seq2SeqLMOutput(loss=loss, **outputs)


__all__ = ["AdminForConditionalGeneration", "AdminModel"]

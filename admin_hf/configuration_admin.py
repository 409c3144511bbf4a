"""Configuration of Admin Transformers."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MarianConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from .architecture import ARCHITECTURES, PEGASUS, STACKS
from .residual import residual_system
from .special_tokens import required_ids, vocabulary_size


@strict
class AdminConfig(MarianConfig):
    r"""
    Configuration of an [`AdminForConditionalGeneration`]: Marian's, with the choice of the residual connections and
    the defaults of Transformer-base in the Admin paper. Only the differences to [`~transformers.MarianConfig`] are
    documented here.

    Attributes:
        encoder_residual: the residual system of the encoder: `"admin"` (the default), `"post_ln"`, `"pre_ln"`,
            `"deepnorm"`, or another one of `admin_hf.residual.SYSTEMS`; docs/systems.md lists them all, and says how
            to add your own.
        decoder_residual: the same for the decoder. Any mix is possible; Table 1 of the paper needs Post-LN with
            Pre-LN. A decoder of `"fixup"` has an output layer of its own, whatever `tie_word_embeddings` says.
        label_smoothing: share of the target probability that the training loss spreads evenly over the vocabulary
            without padding; 0 by default. Used in train mode only: an evaluation loss is the negative log-likelihood.
            It replaces the Trainer's `label_smoothing_factor`, which also smooths over the padding token.
        pad_token_id: default: `vocab_size - 1`, as in Marian's vocabulary layout, in which `</s>` is 0 and `<pad>`
            is last. For any other layout, use [`for_tokenizer`].
        decoder_start_token_id: the token that decoding starts from; default: padding.

    Raises:
        ValueError: an unknown residual system, or one that cannot work with the rest (see its class), a size below 1,
            a `d_model` that the heads do not divide, or a special token outside the vocabulary.

    Example:

    ```python
    >>> from admin_hf import AdminConfig

    >>> config = AdminConfig(encoder_layers=18, decoder_layers=18, vocab_size=32_000)
    >>> config.encoder_residual, config.d_model, config.pad_token_id
    ('admin', 512, 31999)

    ```
    """

    model_type = "admin"

    encoder_residual: str = "admin"
    decoder_residual: str = "admin"
    label_smoothing: float | int = 0.0

    encoder_layers: int = 6
    decoder_layers: int = 6
    d_model: int = 512
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    activation_function: str = "relu"
    scale_embedding: bool = True
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None  # type: ignore[assignment]  # Marian's own has no unset value
    forced_eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pad_token_id is None:
            self.pad_token_id = self.vocab_size - 1
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id
        super().__post_init__(**kwargs)
        self._check_sizes()
        self._check_special_tokens()
        for stack in STACKS:
            residual_system(self, stack)  # it refuses configurations that it cannot work with

    def _check_sizes(self) -> None:
        sizes = ("layers", "ffn_dim", "attention_heads")
        fields = [f"{stack}_{size}" for stack in STACKS for size in sizes]
        for field in ("vocab_size", "d_model", "max_position_embeddings", *fields):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"{field}={value} must be at least 1.")
        for field in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % (heads := getattr(self, field)):
                raise ValueError(f"d_model={self.d_model} must be divisible by {field}={heads}.")
        if self.activation_function not in ACT2FN:
            raise ValueError(f"activation_function={self.activation_function!r} is not one of {', '.join(ACT2FN)}.")
        rates = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
        for field in (*rates, "label_smoothing"):
            if not 0 <= (value := getattr(self, field)) < 1:
                raise ValueError(f"{field}={value} must be at least 0 and below 1.")

    def _check_special_tokens(self) -> None:
        vocab_size = min(self.vocab_size, self.decoder_vocab_size or self.vocab_size)
        for field in ("pad_token_id", "decoder_start_token_id"):
            if not 0 <= (token_id := getattr(self, field)) < vocab_size:
                raise ValueError(f"{field}={token_id} must be an id of the vocabulary, 0 to {vocab_size - 1}.")

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> "AdminConfig":
        """The configuration of a new model with the special tokens of the tokenizer, whatever their ids are.

        Args:
            tokenizer: with a padding and an end-of-sentence token. Decoding starts from padding, whose embedding is
                zero; nothing is forced.
            fields: further fields of the configuration. A `vocab_size` above the tokenizer's own, such as a multiple
                of 64, moves no special token.

        Raises:
            ValueError: the tokenizer lacks one of the two tokens, or one token is both; `vocab_size` is below its
                number of entries; or as for every configuration.

        Example:

        ```python
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast

        >>> words = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "Boot": 4}, "<unk>"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
        >>> config = AdminConfig.for_tokenizer(tokenizer, encoder_layers=18, decoder_layers=18)
        >>> config.vocab_size, config.pad_token_id, config.eos_token_id, config.decoder_start_token_id
        (5, 1, 2, 1)

        ```
        """
        pad, eos = required_ids(tokenizer)
        if given := fields.keys() & {"pad_token_id", "eos_token_id", "bos_token_id"}:
            raise ValueError(f"{min(given)}={fields[min(given)]} is taken from the tokenizer: leave it out.")
        entries = vocabulary_size(tokenizer)
        if (size := fields.setdefault("vocab_size", entries)) < entries:
            raise ValueError(f"vocab_size={size} is too small for the tokenizer, which has {entries:,} entries.")
        fields.setdefault("decoder_start_token_id", pad)
        return cls(pad_token_id=pad, eos_token_id=eos, bos_token_id=tokenizer.bos_token_id, **fields)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json; that of a stock model is completed with the defaults of its own class, not with ours.

        Raises:
            OSError: there is no config.json, or it contains no JSON object.
            ValueError: it belongs to a model of another type.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict or not isinstance(config_dict, dict):
            raise OSError(f"{pretrained_model_name_or_path} has no config.json with the fields of a model.")
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type in ARCHITECTURES:
            config_dict = admin_fields(ARCHITECTURES[model_type].config.from_dict(config_dict))
        elif model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} contains a {model_type!r} model; expected an Admin, Marian or "
                "Pegasus model. Load a checkpoint of a model with an injected ω with `load_injected`."
            )
        return config_dict, kwargs


def admin_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of an Admin configuration that are made from those of a stock model."""
    stock, fields = ARCHITECTURES[config.model_type], config.to_dict()
    fields |= {f"{stack}_residual": stock.residual for stack in STACKS} | {"model_type": AdminConfig.model_type}
    if stock is PEGASUS:  # either all of its embeddings are tied, or none
        fields["share_encoder_decoder_embeddings"] = fields["tie_word_embeddings"]
    return fields


__all__ = ["AdminConfig", "admin_fields"]

"""Configuration, tokenizer and generation settings of the model that run_translation.py trains."""

import dataclasses
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from admin_hf.checkpoints import one_line

from .arguments import ModelArguments
from .encoding import read_control_tokens_as_text
from .errors import InputError


# What the script sets in the configuration, and from where
NOT_OF_THE_CONFIGURATION = dict.fromkeys(
    ("vocab_size", "decoder_vocab_size", "pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"),
    "the tokenizer (--vocab_size, --tokenizer_name)",
) | {"label_smoothing": "--label_smoothing_factor"}


def config_changes(arguments: ModelArguments, config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """The new model's configuration, as keyword arguments of `config_class`: --config_name, then --config_overrides.

    Vocabulary size and special tokens are left out: the tokenizer says them.

    Raises:
        InputError: the configuration cannot be read, is another model's, or an override has no such field or a value
            of another type.
    """
    values: dict[str, Any] = {}
    if arguments.config_name:
        try:
            config = AutoConfig.from_pretrained(arguments.config_name, cache_dir=arguments.cache_dir)
        except (OSError, ValueError, StrictDataclassError) as error:
            raise InputError(f"--config_name {arguments.config_name} cannot be used: {error}") from error
        if not isinstance(config, config_class):
            raise InputError(
                f"--config_name {arguments.config_name} is a {config.model_type!r} model; expected "
                f"{config_class.model_type!r}."
            )
        values = config.to_diff_dict()
    values = {name: value for name, value in values.items() if name not in NOT_OF_THE_CONFIGURATION}
    return values | _parse_overrides(arguments.config_overrides or "", config_class)


def _parse_overrides(text: str, config_class: type[PretrainedConfig]) -> dict[str, Any]:
    defaults = config_class()
    fields = {field.name for field in dataclasses.fields(config_class)} & vars(defaults).keys()
    values: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name in NOT_OF_THE_CONFIGURATION:
            raise InputError(f"--config_overrides: {name} is set by {NOT_OF_THE_CONFIGURATION[name]}.")
        if not equals or name not in fields:
            raise InputError(
                f"--config_overrides: {item!r} is not a field and its value; expected e.g. 'd_model=128,dropout=0.3'."
            )
        default = getattr(defaults, name)
        try:
            if isinstance(default, bool):
                values[name] = {"true": True, "false": False}[value.lower()]
            elif isinstance(default, (int, float)):
                values[name] = float(value) if isinstance(default, float) or not value.isdigit() else int(value)
            else:
                values[name] = value
        except (KeyError, ValueError):
            raise InputError(
                f"--config_overrides: {name}={value!r} is not of the type {type(default).__name__}."
            ) from None
    return values


def load_tokenizer(name: str, arguments: ModelArguments, prefix: str = "") -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub, for text in which nothing acts as a control token.

    It pads on the right, since Marian counts positions from the left, and it is saved with these settings.

    Args:
        name: folder or Hub id.
        arguments: where to store it, and which revision.
        prefix: comes before every source. If it has control tokens, the tokenizer that is saved goes on to read them
            in text, for whoever translates with the model.

    Raises:
        InputError: there is none, or its layout cannot be trained with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            cache_dir=arguments.cache_dir,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
            padding_side="right",
            truncation_side="right",
        )
    except Exception as error:  # a damaged file raises whatever the library that reads it does
        raise InputError(f"The tokenizer {name} cannot be loaded: {one_line(error)}") from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer {name} needs a padding and an end-of-sentence token.")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError(f"The tokenizer {name} pads with its end-of-sentence token, which could never be learnt.")
    if tokenizer.pad_token_id == tokenizer.unk_token_id:
        raise InputError(
            f"The tokenizer {name} pads with its token for unknown text, which would be taken for padding."
        )
    ids = [*tokenizer.get_vocab().values()]
    for side in ("text", "text_target"):
        ids += (sentence := tokenizer(**{side: "a"})["input_ids"])
        if sentence[-1:] != [tokenizer.eos_token_id]:
            raise InputError(
                f"The tokenizer {name} does not end sentences with {tokenizer.eos_token}: give it a post-processor "
                "that does, such as TemplateProcessing of the package tokenizers, and save it."
            )
    if max(ids) >= len(tokenizer):
        raise InputError(f"The tokenizer {name} has {len(tokenizer):,} entries but ids up to {max(ids):,}.")
    return read_control_tokens_as_text(tokenizer, prefix)


def set_generation(model: Any, max_length: int, num_beams: int | None, length_penalty: float | None) -> None:
    """Make the settings of this run those of `model.generate`, which are saved with the model.

    A stock generation config cuts every translation at 20 tokens.

    Raises:
        InputError: they cannot be saved, for they contradict each other or what the model was saved with.
    """
    generation_config: GenerationConfig = model.generation_config
    generation_config.max_length = max_length
    generation_config.num_beams = num_beams or generation_config.num_beams or 1
    if generation_config.num_beams == 1:  # settings of beams, which a model may come with
        generation_config.length_penalty, generation_config.early_stopping = 1.0, False
    if length_penalty is not None:
        generation_config.length_penalty = length_penalty
    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        raise InputError(f"The settings of generation cannot be used: {one_line(error)}") from error

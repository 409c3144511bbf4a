"""The model that run_translation.py trains: its configuration, checked early, its weights and generation settings."""

import dataclasses
import logging
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from admin_hf import (
    AdminConfig,
    AdminForConditionalGeneration,
    ResidualProfile,
    check_tokenizer,
    deepen,
    initialize_omega,
)
from admin_hf.allocator import map_large_buffers
from admin_hf.checkpoints import one_line
from admin_hf.deepening import new_depths
from admin_hf.reparameterization import stock_architecture

from . import runs
from .arguments import Arguments, DataTrainingArguments, ModelArguments
from .batching import round_up
from .errors import InputError, refusing


logger = logging.getLogger(__name__)


# What the script sets in the configuration, and from where
NOT_OF_THE_CONFIGURATION = dict.fromkeys(
    ("vocab_size", "decoder_vocab_size", "pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"),
    "the tokenizer (--vocab_size, --tokenizer_name)",
) | {"label_smoothing": "--label_smoothing_factor"}

# Those of lengths in tokens, where the model has as many positions
DEFAULT_LENGTHS = {name: getattr(DataTrainingArguments, name) for name in ("max_source_length", "max_target_length")}
DEFAULT_LENGTHS["val_max_target_length"] = DEFAULT_LENGTHS["max_target_length"]


def config_changes(arguments: ModelArguments, config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """The new model's configuration, as keyword arguments of `config_class`: --config_name, then --config_overrides.

    Vocabulary size and special tokens are left out: they come from the tokenizer.

    Raises:
        InputError: the configuration cannot be read, is another model's, or an override has no such field or a value
            of another type.
    """
    values: dict[str, Any] = {}
    if arguments.config_name:
        with refusing(f"--config_name {arguments.config_name} cannot be used"):
            config = AutoConfig.from_pretrained(arguments.config_name, cache_dir=arguments.cache_dir)
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


def set_generation(model: Any, max_length: int, num_beams: int | None, length_penalty: float | None) -> None:
    """Set this run's settings for `model.generate`, which are saved with the model.

    A stock generation config cuts every translation at 20 tokens.

    Raises:
        InputError: they cannot be saved, because they contradict each other or the model's saved settings.
    """
    generation_config: GenerationConfig = model.generation_config
    generation_config.max_length = max_length
    generation_config.num_beams = num_beams or generation_config.num_beams or 1
    if generation_config.num_beams == 1:  # settings of beams, which a model may come with
        generation_config.length_penalty, generation_config.early_stopping = 1.0, False
    if length_penalty is not None:
        generation_config.length_penalty = length_penalty
    with refusing("The settings of generation cannot be used"):
        generation_config.validate(strict=True)


def check_model(arguments: Arguments) -> None:
    """Find mistakes in the model's arguments before the data is touched."""
    given = arguments.model
    try:
        config = AdminConfig(**config_changes(given, AdminConfig), vocab_size=given.vocab_size)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(one_line(error)) from error
    if profile := given.residual_profile:
        with refusing(f"--residual_profile {profile}"):
            ResidualProfile.load(profile)
    source = given.model_name_or_path
    if not source and not arguments.training.do_train:
        source = runs.finished_checkpoint(arguments.training)
    if source:
        with refusing(f"The model {source} cannot be loaded"):
            config = AdminConfig.from_pretrained(source, cache_dir=given.cache_dir, revision=given.model_revision)
        with refusing(f"The model {source} cannot be deepened"):
            new_depths(config, given.encoder_layers, given.decoder_layers)
    check_lengths(arguments, config)


def check_lengths(arguments: Arguments, config: AdminConfig) -> None:
    """Lower default lengths to the positions of the model, and refuse given lengths that are longer."""
    data, positions = arguments.data, config.max_position_embeddings
    multiple_of = arguments.training.length_multiple if arguments.training.do_train else 1
    for name, default in DEFAULT_LENGTHS.items():
        if getattr(data, name) == default > (most := positions - positions % multiple_of):
            logger.info(f"--{name} is {most} here, because the model has {positions} positions.")
            setattr(data, name, most)
    longest = round_up(max(getattr(data, name) for name in DEFAULT_LENGTHS), multiple_of)
    if longest > positions:
        multiple = f"; lengths are multiples of {multiple_of} (--pad_to_multiple_of)"
        raise InputError(
            f"The arguments allow sequences of up to {longest} tokens, but the model's max_position_embeddings is "
            f"{positions}{multiple if multiple_of > 1 else ''}."
        )


def build_model(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> AdminForConditionalGeneration:
    """Load the model to start from, or make a new one for this tokenizer."""
    given, data, training = arguments
    if training.use_cpu and training.keep_freed_memory:
        map_large_buffers()
    model = _new_or_loaded_model(arguments, tokenizer)
    try:
        check_tokenizer(model, tokenizer)
    except ValueError as error:
        raise InputError(one_line(error)) from error
    check_lengths(arguments, model.config)
    if training.push_to_hub:
        with refusing("--push_to_hub"):
            stock_architecture(model)
    if training.use_cpu and training.fp16:
        logger.warning("--fp16: a CPU has no float16 here, so this computes in float32; --bf16 is faster.")
    model.config.label_smoothing = training.label_smoothing_factor
    num_beams = training.generation_num_beams or data.num_beams
    set_generation(model, data.val_max_target_length, num_beams, data.length_penalty)
    if given.residual_profile:
        with refusing(f"--residual_profile {given.residual_profile}"):
            initialize_omega(model, ResidualProfile.load(given.residual_profile))
    return model


def _new_or_loaded_model(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> AdminForConditionalGeneration:
    given, finished = arguments.model, None
    if arguments.training.do_train or not given.model_name_or_path:
        finished = runs.finished_checkpoint(arguments.training)
    source = finished or given.model_name_or_path
    if not source:
        return AdminForConditionalGeneration(
            AdminConfig.for_tokenizer(tokenizer, **config_changes(given, AdminConfig))
        )
    with refusing(f"The model {source} cannot be loaded"):
        model = AdminForConditionalGeneration.from_pretrained(
            source, cache_dir=given.cache_dir, revision=given.model_revision, use_safetensors=True
        )
    depths = new_depths(model.config, given.encoder_layers, given.decoder_layers)
    if finished or depths == new_depths(model.config):
        return model
    before = f"{model.config.encoder_layers} encoder and {model.config.decoder_layers} decoder layers"
    model = deepen(model, **{f"{name}_layers": layers for name, layers in depths.items()})
    logger.info(
        f"{source} is deepened from {before} to {depths['encoder']} and {depths['decoder']}, by copies of its layers. "
        "ω starts again, from a profile."
    )
    return model

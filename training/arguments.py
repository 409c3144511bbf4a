"""Arguments of run_translation.py: those of Hugging Face's own script, and a few more."""

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate.utils import get_int_from_env, is_torch_xla_available
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from transformers.debug_utils import DebugOption
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations, is_tensorboard_available
from transformers.trainer_utils import HubStrategy, SaveStrategy

from admin_hf.checkpoints import one_line
from admin_hf.encoding import language_code
from admin_hf.run.folder import STATE_NAME, complete_checkpoints
from admin_hf.sharding import sharding

from .batching import MULTIPLE, longest_side
from .errors import InputError, refusing
from .metrics import Language
from .moving_average import WEIGHTS_NAME
from .optimization import RADAM


# The scores of an evaluation; without translations, only the loss
SCORES = ("loss", "bleu", "chrf", "ter", "moses_bleu")

# The flags that ask for the splits of the data
SPLIT_FLAGS = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}

# Ranges of numbers. A number that is in none of these must be at least 0; a default of -1 means "not given"
AT_LEAST_1 = {
    *("max_source_length", "max_target_length", "num_beams", "vocab_size", "encoder_layers", "decoder_layers"),
    *("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "max_tokens", "pad_to_multiple_of"),
    *("average_last", "early_stopping_patience", "fp16_scale_window", "gradient_accumulation_steps", "max_steps"),
    *("eval_accumulation_steps", "save_total_limit", "generation_num_beams"),
    *("dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb", "torch_empty_cache_steps"),
}
AT_LEAST_2 = {"val_max_target_length", "generation_max_length"}  # counts the decoder's start token
ABOVE_0 = {"adam_epsilon", "fp16_min_scale", "logging_steps", "save_steps"}
BELOW = {"label_smoothing_factor": 1, "adam_beta1": 1, "adam_beta2": 1, "seed": 2**32, "data_seed": 2**32}
BELOW |= {"bpe_dropout": 1, "ema_decay": 1}
ANY_SIGN = {"length_penalty"}

# Values of Trainer's flags that cannot be here, and why
IMPOSSIBLE = {
    ("average_tokens_across_devices", False): "the loss is that of the targets of all processes.",
    ("batch_eval_metrics", True): "scores are those of all sentences together, not of batches.",
    ("save_strategy", SaveStrategy.BEST): "a run could not be resumed from it; use --load_best_model_at_end.",
    ("sortish_sampler", True): "Transformers ignores it; use --train_sampling_strategy group_by_length.",
    ("use_liger_kernel", True): "Liger has no kernels for these models.",
}


@dataclass
class ModelArguments:
    """Which model and tokenizer to train, or to continue from."""

    model_name_or_path: str | None = HfArg(
        default=None,
        help="Admin or Marian checkpoint to start from (folder or Hub id). Default: a new model.",
    )
    encoder_layers: int | None = HfArg(
        default=None,
        help="Deepen the encoder of model_name_or_path to this many layers, by copying its own. ω is profiled again.",
    )
    decoder_layers: int | None = HfArg(default=None, help="Deepen the decoder in the same way.")
    config_name: str | None = HfArg(
        default=None, help="Configuration of a new model: a folder with config.json, or a Hub id."
    )
    config_overrides: str | None = HfArg(
        default=None,
        help="Changes to the configuration of a new model, such as "
        "'d_model=128,encoder_layers=4,encoder_residual=post_ln'; docs/systems.md lists the residual systems.",
    )
    tokenizer_name: str | None = HfArg(
        default=None,
        help="Tokenizer to use: a folder, a Hub id, or a sentencepiece model of both languages (joint.model). Unset: "
        "the model's, or a new joint BPE is trained.",
    )
    vocab_size: int = HfArg(default=10_000, help="Vocabulary size of a new tokenizer, both languages.")
    lowercase: bool = HfArg(default=False, help="Lower-case all text in a new tokenizer; scores then ignore case too.")
    residual_profile: str | None = HfArg(
        default=None,
        help="residual_profile.json of another run: ω is read from it instead of profiling the first batch.",
    )
    cache_dir: str | None = HfArg(default=None, help="Folder for downloads, and for data that was read and tokenised.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with a tokenizer from the Hub.")


@dataclass
class DataTrainingArguments:
    """Which sentence pairs to train on, to validate with and to translate."""

    source_lang: str | None = HfArg(default=None, help="Source language, such as 'en'.")
    target_lang: str | None = HfArg(
        default=None,
        help="Target language, such as 'de', or several, 'de,fr,cs': one model then translates into all of them, and "
        "a tag before the source, such as '>>de<<', says into which.",
    )
    dataset_name: str | None = HfArg(
        default=None, help="Data set on the Hub, or a local folder with one, instead of files."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that data set.")
    train_file: str | None = HfArg(
        default=None,
        help="Training pairs: .json/.jsonl/.csv/.tsv with a 'translation' column or one column for each "
        "language, or the prefix DIR/train of parallel text in DIR/train.en and DIR/train.de.",
    )
    validation_file: str | None = HfArg(default=None, help="Validation pairs, in the same forms.")
    test_file: str | None = HfArg(
        default=None, help="Test pairs in the same forms, or source text alone, to translate."
    )
    overwrite_cache: bool = HfArg(default=False, help="Read and tokenise the data again instead of using the cache.")
    preprocessing_num_workers: int | None = HfArg(default=None, help="Processes for tokenisation.")
    max_source_length: int = HfArg(
        default=1024,
        help="Longest source in tokens. Longer training pairs are skipped, and longer sources to translate are cut; "
        "both are counted. The default, and the next two, are never above the model's max_position_embeddings.",
    )
    max_target_length: int = HfArg(
        default=128, help="Longest target in tokens; longer training pairs are skipped and counted."
    )
    val_max_target_length: int | None = HfArg(
        default=None,
        help="Longest translation in tokens. Validation targets are cut to it for the loss, not for scores. "
        "Defaults to max_target_length.",
    )
    max_train_samples: int | None = HfArg(default=None, help="Use only this many training pairs, the first.")
    max_eval_samples: int | None = HfArg(default=None, help="Use only this many validation pairs, the first.")
    max_predict_samples: int | None = HfArg(default=None, help="Use only this many test pairs, the first.")
    num_beams: int | None = HfArg(default=None, help="Number of beams in evaluation and prediction. Default: 1.")
    length_penalty: float | None = HfArg(
        default=None, help="Beams are compared by log-likelihood / length^length_penalty. Default: 1."
    )
    source_prefix: str | None = HfArg(default=None, help="Text to put before every source.")
    bpe_dropout: float = HfArg(
        default=0.0,
        help="BPE-dropout: the probability, such as 0.1, of skipping a merge, so that the training text has other "
        "subwords in every epoch. Needs a BPE tokenizer. All other text is segmented as usual.",
    )

    def __post_init__(self) -> None:
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length

    @property
    def tags(self) -> dict[str, str]:
        """What chooses each of several target languages, such as `{"de": ">>de<<", "fr": ">>fr<<"}`; none of one."""
        languages = (self.target_lang or "").split(",")
        return {language: language_code(language) for language in languages} if len(languages) > 1 else {}

    def by_target(self) -> dict[str, "DataTrainingArguments"]:
        """The arguments of each target language alone; where there are several, its tag begins every source."""
        if not self.tags:
            return {str(self.target_lang): self}
        prefixes = {language: f"{tag} {self.source_prefix or ''}" for language, tag in self.tags.items()}
        return {name: replace(self, target_lang=name, source_prefix=prefix) for name, prefix in prefixes.items()}


@dataclass
class TranslationTrainingArguments(Seq2SeqTrainingArguments):
    """Trainer's own arguments, with defaults for translation."""

    predict_with_generate: bool = HfArg(
        default=True, help="Translate in evaluations, which BLEU needs. False: compute only the loss."
    )
    max_tokens: int | None = HfArg(
        default=None,
        help="Most tokens of a batch on each device, instead of per_device_train_batch_size: pairs times longest "
        "side, counted as in fairseq. Pairs of similar length form a batch. Pairs that are longer than this are "
        "skipped and counted.",
    )
    pad_to_multiple_of: int | None = HfArg(
        default=None, help="Pad lengths to a multiple of this, such as 8 for the tensor cores of a GPU."
    )
    optim: str = HfArg(
        default=Seq2SeqTrainingArguments.default_optim,
        help="'radam', or any optimiser of Trainer. Weight decay does not apply to biases, norms and ω.",
    )
    warmup_init_lr: float = HfArg(default=0.0, help="Learning rate that warm-up starts from (Admin's code: 1e-7).")
    average_last: int | None = HfArg(
        default=None, help="After training, average this many of the last checkpoints; the average is the run's model."
    )
    ema_decay: float = HfArg(
        default=0.0,
        help="Keep an exponential moving average of the weights with this decay, such as 0.999. The average is "
        "evaluated, saved and exported.",
    )
    early_stopping_patience: int | None = HfArg(
        default=None,
        help="Stop after this many evaluations without a better metric_for_best_model ('bleu', 'loss').",
    )
    torch_compile: bool = HfArg(
        default=False,
        help="Compile the layers for training and, on a GPU, replay each training pass as a CUDA graph. This is much "
        "faster, after about a minute of compiling. Batches then have few different shapes.",
    )
    keep_freed_memory: bool = HfArg(
        default=True,
        help="On a CPU under Linux: keep freed memory for the next update. To give it back to the system, which "
        "clears it every time, takes up to a fifth of an update.",
    )
    fp16_scale_window: int = HfArg(
        default=256, help="Updates without an overflow after which the loss scale of fp16 is doubled."
    )
    fp16_min_scale: float = HfArg(
        default=0.03125, help="Smallest loss scale of fp16. Ten overflows in a row at this scale count as divergence."
    )
    logging_steps: float = HfArg(default=100, help="Number of updates between two logs.")
    logging_nan_inf_filter: bool = HfArg(
        default=False,
        help="Leave losses that are not finite out of the log, which reads each loss. They end a run anyway.",
    )
    report_to: None | str | list[str] = HfArg(
        default="tensorboard" if is_tensorboard_available() else "none",
        help="Where logs go: 'tensorboard' (if installed), 'wandb', 'trackio', 'all' or 'none'.",
    )
    push_to_hub: bool = HfArg(
        default=False, help="Push the vanilla model with tokenizer and model card to the Hub at the end."
    )
    hub_strategy: str = HfArg(default="end", help="'end' is the only choice: checkpoints stay in output_dir.")

    def __post_init__(self) -> None:
        _check_numbers(self)
        for name in self._VALID_DICT_FIELDS:
            _check_json(name, getattr(self, name))
        if self.ddp_backend and get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"], 1) == 1:
            raise InputError(f"--ddp_backend {self.ddp_backend} is for several processes: start them with torchrun.")
        if self.early_stopping_patience:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            self.load_best_model_at_end = not self.average_last
            if self.eval_strategy == "no" or (not self.average_last and self.eval_strategy != self.save_strategy):
                raise InputError(
                    f"--early_stopping_patience {self.early_stopping_patience} needs --eval_strategy epoch or steps "
                    "and, without --average_last, the same --save_strategy."
                )
        if (self.metric_for_best_model or "").removeprefix("eval_") == "ter" and self.greater_is_better is None:
            self.greater_is_better = False  # an error rate; Trainer only knows that a lower loss is better
            # Both or neither: otherwise Trainer would keep the logits of all sentences, or translate for nothing
        self.predict_with_generate &= not self.prediction_loss_only
        self.prediction_loss_only = not self.predict_with_generate
        self.eval_do_concat_batches = True  # Trainer's way of passing predictions to metrics, which are only our own
        optim, self.optim = self.optim, Seq2SeqTrainingArguments.default_optim if self.optim == RADAM else self.optim
        # Trainer would compile the whole model, for evaluation and generation too, which takes minutes if it is deep
        compiles, self.torch_compile = self.torch_compile or bool(self.torch_compile_backend), False
        backend, self.torch_compile_backend = self.torch_compile_backend, None
        super().__post_init__()
        if compiles:
            self.torch_compile, self.torch_compile_backend = True, backend or "inductor"
        if optim == RADAM:  # which Trainer does not know
            self.optim = RADAM

    @property
    def length_multiple(self) -> int:
        """The lengths of padded training batches are multiples of this."""
        return self.pad_to_multiple_of or (MULTIPLE if self.torch_compile else 1)

    @property
    def longest(self) -> int | None:
        """The longest side of a pair that fits a batch of `max_tokens`."""
        return longest_side(self.max_tokens, self.length_multiple, rows=1) if self.max_tokens else None


class Arguments(NamedTuple):
    """All arguments of a run."""

    model: ModelArguments
    data: DataTrainingArguments
    training: TranslationTrainingArguments


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse the command line: flags, or a JSON file of arguments and then flags that override it.

    Raises:
        InputError: the JSON file cannot be read, or arguments are missing or contradict each other.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if argv and argv[0].endswith(".json"):
        argv = _json_flags(Path(argv[0])) + argv[1:]
    if "--use_cpu" not in argv and not torch.accelerator.is_available():
        argv += ["--use_cpu", "True"]  # or Trainer refuses bf16
    with refusing("The arguments cannot be used"):  # by any library: DeepSpeed, accelerate, json ...
        *groups, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        flag = unknown[0].partition("=")[0]
        similar = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        raise InputError(f"There is no {flag}{f'; is {similar[0]} meant?' if similar else ': see --help.'}")
    arguments = Arguments(*groups)
    check_arguments(arguments)
    return arguments


def build_parser() -> HfArgumentParser:
    """The parser of all flags."""
    return _Parser(
        (ModelArguments, DataTrainingArguments, TranslationTrainingArguments),
        usage="run_translation.py [recipe.json] [--flag value ...]",
        description="Train, evaluate and run a translation model with Admin's residual connections.",
        allow_abbrev=False,
    )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"The arguments cannot be used: {one_line(ValueError(message))}.")


def shown(value: Any) -> Any:
    """A value in its form on the command line, which Transformers' enumerations do not print."""
    return value.value if isinstance(value, Enum) else value


def _check_numbers(group: Any) -> None:
    """Raise an InputError for a number that is out of its range."""
    for item in fields(group):
        name, value = item.name, getattr(group, item.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise InputError(f"--{name} {value} must be a finite number.")
        if value == item.default or name in ANY_SIGN:
            continue
        if value < (least := 1 if name in AT_LEAST_1 else 2 if name in AT_LEAST_2 else value):
            raise InputError(f"--{name} {value} must be at least {least}.")
        strategy = getattr(group, f"{name.removesuffix('_steps')}_strategy", "steps")
        if name in ABOVE_0 and value <= 0 and strategy == "steps":
            raise InputError(f"--{name} {value} must be above 0.")
        if value < 0 or value >= BELOW.get(name, math.inf):
            below = f" and below {BELOW[name]}" if name in BELOW else ""
            raise InputError(f"--{name} {value} must be at least 0{below}.")


def _check_json(name: str, value: Any) -> None:
    """Raise an InputError if `value` is neither a JSON object nor, where the flag allows it, a file."""
    may_be_file = not name.endswith("_kwargs")
    if not isinstance(value, str) or (may_be_file and os.path.isfile(value)):
        return
    try:
        problem = "" if isinstance(json.loads(value), dict) else "it is another value"
    except ValueError as error:
        problem = str(error)
    if problem:
        expected = "a JSON object or a file with one" if may_be_file else "a JSON object"
        raise InputError(f"--{name} {value} is not {expected}: {problem}.")


def _json_flags(path: Path) -> list[str]:
    with refusing(f"The file of arguments {path} cannot be read"):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise InputError(f"The file of arguments {path} must contain one JSON object, such as {{'do_train': true}}.")
    flags = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
        flags += [f"--{name}", *map(str, items)] if value is not None else []
    return flags


def check_arguments(arguments: Arguments) -> None:
    """Raise an InputError for arguments that are missing or contradict each other."""
    model, data, training = arguments
    _check_data(data, training)
    for group in (model, data):
        _check_numbers(group)
    for (name, value), reason in IMPOSSIBLE.items():
        if getattr(training, name) == value:
            raise InputError(f"--{name} {shown(value)}: {reason}")
    if training.num_train_epochs <= 0 and training.max_steps < 1:
        raise InputError(f"--num_train_epochs {training.num_train_epochs} must be above 0.")
    if training.accelerator_config.gradient_accumulation_kwargs:
        raise InputError(
            "--accelerator_config: gradient_accumulation_kwargs are for scripts without Trainer; give "
            "--gradient_accumulation_steps."
        )
    _check_beams(arguments)
    if not 0 <= training.warmup_init_lr <= training.learning_rate:
        raise InputError(
            f"--warmup_init_lr {training.warmup_init_lr} must be at least 0 and at most the learning rate, "
            f"{training.learning_rate}."
        )
    if (training.max_tokens or training.length_multiple) < training.length_multiple:
        raise InputError(
            f"--max_tokens {training.max_tokens} is below --pad_to_multiple_of {training.length_multiple}."
        )
    if missing := set(training.report_to) - set(get_available_reporting_integrations()):
        raise InputError(f"--report_to {min(missing)} is unknown to Trainer, or its package is not installed.")
    if training.torch_compile:
        _check_compilation(training)
    if DebugOption.TPU_METRICS_DEBUG in training.debug and not is_torch_xla_available():
        raise InputError(f"--debug {shown(DebugOption.TPU_METRICS_DEBUG)} is for a TPU, and there is none.")
    if training.metric_for_best_model:
        _check_metric(training, data.target_lang)
    if training.average_last:
        _check_averaging(training)
    if training.ema_decay:
        _check_moving_average(training)
    if training.push_to_hub and not training.do_train:
        raise InputError(
            "--push_to_hub needs --do_train; repeat the command of the finished run: nothing is trained again."
        )
    if training.push_to_hub and (strategy := HubStrategy(training.hub_strategy)) != HubStrategy.END:
        raise InputError(f"--hub_strategy {strategy.value}: only 'end' is possible; checkpoints stay in output_dir.")
    _check_start(model, training)


def _check_data(data: DataTrainingArguments, training: TranslationTrainingArguments) -> None:
    wanted = {split: flag for split, flag in SPLIT_FLAGS.items() if getattr(training, flag)}
    if not wanted:
        raise InputError("Nothing to do: give at least one of --do_train, --do_eval and --do_predict.")
    if not training.output_dir.strip():
        raise InputError("--output_dir is empty: name the folder of the run.")
    if data.dataset_name is not None:
        for name in ("train_file", "validation_file"):
            if getattr(data, name) is not None:
                raise InputError(f"--{name} and --dataset_name name the same data: give one of them.")
    for name in ("source_lang", "target_lang"):
        if not getattr(data, name):
            raise InputError(f"--{name} is missing: give a language key such as 'en'.")
    languages = str(data.target_lang).split(",")
    is_list = len(languages) > 1 or re.search(r"[\s;]", languages[0])
    if is_list and not all(re.fullmatch(r"[\w.-]+", language) for language in languages):
        raise InputError(f"--target_lang {data.target_lang}: expected languages with commas between them: de,fr.")
    if twice := [language for language in languages if languages.count(language) > 1]:
        raise InputError(f"--target_lang {data.target_lang} has {twice[0]!r} twice; expected each language once.")
    if data.source_lang in languages:
        raise InputError(f"--source_lang and --target_lang are both {data.source_lang!r}.")
    for split, flag in wanted.items():
        if data.dataset_name is None and getattr(data, f"{split}_file") is None:
            raise InputError(f"--{flag} needs --{split}_file (or --dataset_name).")


def _check_metric(training: TranslationTrainingArguments, target_lang: str) -> None:
    scores = SCORES if training.predict_with_generate else SCORES[:1]
    metric = training.metric_for_best_model
    name = metric.removeprefix("eval_")
    if name in set(SCORES) - set(scores):
        raise InputError(f"--metric_for_best_model {metric} needs translations: give --predict_with_generate True.")
    if name not in scores:
        raise InputError(f"--metric_for_best_model {metric} is not a score; expected one of {', '.join(scores)}.")
    for language in target_lang.split(","):
        if name == "moses_bleu" and not Language.parse(language).has_moses_tokens:
            raise InputError(
                f"--metric_for_best_model {metric}: there is no Moses tokenizer for --target_lang {language}; use "
                "bleu, whose tokens fit the language."
            )


def _check_start(model: ModelArguments, training: TranslationTrainingArguments) -> None:
    if (resume := training.resume_from_checkpoint) and not Path(resume, STATE_NAME).is_file():
        raise InputError(
            f"--resume_from_checkpoint {resume} is not a checkpoint folder; without it, the run resumes by itself."
        )
    if resume and not training.ema_decay and Path(resume, WEIGHTS_NAME).is_file():
        raise InputError(f"--resume_from_checkpoint {resume} belongs to a run with --ema_decay: give this flag, too.")
    checkpoints = complete_checkpoints(training.output_dir)
    if resume and Path(resume).resolve() in [path.resolve() for path in checkpoints[:-1]]:
        raise InputError(
            f"--resume_from_checkpoint {resume} is not the run's last checkpoint, {checkpoints[-1]}: to go back, "
            "remove the newer ones; to resume, leave it out."
        )
    if model.model_name_or_path and (model.config_name or model.config_overrides):
        raise InputError("--config_name and --config_overrides shape a new model; leave out --model_name_or_path.")
    for name in ("encoder_layers", "decoder_layers"):
        if (layers := getattr(model, name)) is not None and not (model.model_name_or_path and training.do_train):
            raise InputError(
                f"--{name} {layers} deepens the model of --model_name_or_path and needs --do_train; for a new model, "
                f"give --config_overrides {name}={layers}."
            )
    if not training.do_train and not model.model_name_or_path and not checkpoints:
        raise InputError(
            "Nothing to evaluate: without --do_train give --model_name_or_path, or an --output_dir with a trained "
            f"model ({training.output_dir} has none)."
        )


def _check_compilation(training: TranslationTrainingArguments) -> None:
    if training.torch_compile_mode is not None:
        raise InputError(
            f"--torch_compile_mode {training.torch_compile_mode}: there is nothing to choose, because --torch_compile "
            "captures CUDA graphs itself; leave it out."
        )
    backends = torch._dynamo.list_backends(exclude_tags=None)
    if training.torch_compile_backend not in backends:
        raise InputError(
            f"--torch_compile_backend {training.torch_compile_backend} is unknown; expected one of "
            f"{', '.join(sorted(torch._dynamo.list_backends()))}."
        )
    if any(part in training.optim for part in ("layerwise", "lomo")):
        raise InputError(
            f"--optim {training.optim} updates weights within the backward pass: leave --torch_compile out."
        )
    if training.auto_find_batch_size:
        raise InputError("--auto_find_batch_size changes the shapes of batches: leave --torch_compile out.")


def _check_beams(arguments: Arguments) -> None:
    model, data, training = arguments
    if None not in (given := {data.num_beams, training.generation_num_beams}) and len(given) > 1:
        raise InputError(
            f"--num_beams {data.num_beams} and --generation_num_beams {training.generation_num_beams} mean the same: "
            "give one."
        )
    beams = training.generation_num_beams or data.num_beams
    is_one = beams == 1 or (beams is None and training.do_train and not model.model_name_or_path)
    if data.length_penalty not in (None, 1) and is_one:
        raise InputError(f"--length_penalty {data.length_penalty} compares beams: give --num_beams 2 or more.")


def _check_averaging(training: TranslationTrainingArguments) -> None:
    last, kept = training.average_last, training.save_total_limit
    if training.load_best_model_at_end:
        raise InputError(f"--average_last {last} and --load_best_model_at_end choose different models: give one.")
    if training.save_strategy == SaveStrategy.NO:
        raise InputError(f"--average_last {last} needs checkpoints: give --save_strategy epoch or steps.")
    if kept is not None and kept < last:
        raise InputError(f"--average_last {last} needs more checkpoints than --save_total_limit {kept} keeps.")


def _check_moving_average(training: TranslationTrainingArguments) -> None:
    if (kind := sharding(training)) is not None:
        raise InputError(
            f"--ema_decay {training.ema_decay}: {kind} shards the weights, and only whole weights can be averaged; "
            "give --average_last instead."
        )
    if "schedule_free" in training.optim:
        raise InputError(f"--optim {shown(training.optim)} averages the weights itself: leave --ema_decay out.")

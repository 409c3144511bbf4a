#!/usr/bin/env python
"""Train, evaluate and run a translation model with Admin's residual connections.

    python run_translation.py --do_train --do_eval --train_file DIR/train --validation_file DIR/validation \
        --source_lang en --target_lang de --output_dir runs/my-model

or `python run_translation.py recipe.json`, where the file holds the same arguments. The same command on its own
output_dir goes on where the run was stopped. The trained model is also exported to output_dir/vanilla, a stock
checkpoint without ω, which `--push_to_hub` publishes. Exit codes: 0 done, 2 an input cannot be used (or the Hub not be
reached), 3 training diverged (output_dir/divergence.json says how), 130 and 143 stopped by Ctrl-C and SIGTERM with a
checkpoint.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path


# Before PyTorch is imported, whose OpenMP reads this once: threads that wait spin for less time, which other work on
# the same cores has then. Not where this is imported as a module, by a process with plans of its own
if __name__ == "__main__" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

import datasets
import transformers
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase, TrainerState, set_seed

from admin_hf import (
    AdminConfig,
    AdminForConditionalGeneration,
    AdminProfilingCallback,
    KeepFreedMemory,
    ResidualProfile,
    check_tokenizer,
    initialize_omega,
    map_large_buffers,
    profile_and_initialize,
)
from admin_hf.callback import sharding
from admin_hf.checkpoints import one_line, write_whole
from admin_hf.monitoring import ResidualMonitor
from admin_hf.reparameterization import stock_architecture
from admin_hf.run import average_checkpoints
from admin_hf.run.folder import ARGUMENTS_NAME, DIVERGENCE_NAME, PREDICTIONS_NAME
from admin_hf.terminal import spell_out
from training import arguments as args
from training import data as parallel
from training import runs
from training.batching import TranslationCollator, round_up
from training.checkpointing import remove_incomplete_checkpoints, writing
from training.divergence import Divergence
from training.errors import InputError
from training.files import contents
from training.hub import check_access, first_line
from training.metrics import TranslationMetric, check_references
from training.model import config_changes, load_tokenizer, set_generation
from training.processes import end_process_group
from training.rehearsal import refusing, rehearse
from training.scores import compare, log_decode, remove_results, report, write_results
from training.signals import StopOnSignal
from training.tokenization import lowercases, save_tokenizer, text_batches, train_tokenizer
from training.trainer import EarlyStopping, TranslationTrainer
from training.vanilla import build_vanilla_trainer, export, finish_vanilla


logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code."""
    spell_out()
    try:
        arguments = args.parse_arguments(argv)
        set_up_logging(arguments[2])
        code = run(arguments)
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except Divergence as error:
        if PartialState().is_main_process:
            print(f"{error} Checkpoints from before are kept.", file=sys.stderr)
        code = 3
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    end_process_group()
    return code


def run(arguments: args.Arguments) -> int:
    """What the script does, step by step."""
    model_args, data_args, training_args = arguments
    check_model(arguments)
    rehearse(training_args)
    runs.check_output_dir(arguments)
    check_access(training_args)
    set_seed(training_args.seed)

    tokenizer = named_tokenizer(arguments)
    with training_args.main_process_first(desc="preparing the data"):
        raw = load_data(arguments)
        tokenizer = prepare_tokenizer(arguments, raw) if tokenizer is None else tokenizer
        data = tokenize(raw, tokenizer, arguments)
    model = build_model(arguments, tokenizer)
    finished = runs.finished_checkpoint(training_args)
    if not training_args.do_train or finished:
        training_args.report_to = []  # there is nothing to draw, and TensorBoard would make a folder elsewhere
    stop = StopOnSignal()
    trainer = build_trainer(arguments, model, tokenizer, data, stop)

    if training_args.do_train and trainer.is_world_process_zero():
        Path(training_args.output_dir, DIVERGENCE_NAME).unlink(missing_ok=True)
    if training_args.do_train and finished:
        logger.info("Nothing is left to train.")
        trainer.end_sharding()
        save(trainer)  # in case that the run was killed just before
    elif training_args.do_train:
        train(trainer, arguments, raw)
    if stop.received is not None:
        print(f"Stopped at update {trainer.state.global_step}. The same command goes on from there.")
        return 128 + stop.received
    weights = [model_args.model_name_or_path]
    if training_args.do_train or not model_args.model_name_or_path:
        weights = [runs.finished_checkpoint(training_args) or training_args.output_dir]
        if checkpoints := runs.averaged_checkpoints(training_args):
            weights = load_average(trainer, checkpoints)
    trainer.end_autocast()
    problem = export(trainer) if training_args.do_train else None
    exported = training_args.do_train and problem is None
    vanilla = build_vanilla_trainer(trainer) if exported and training_args.predict_with_generate else None
    scores: dict = {}
    if training_args.do_eval:
        scores |= evaluate(trainer, vanilla)
    if training_args.do_predict:
        scores |= predict(trainer, vanilla, data["test"])
        log_decode(arguments, trainer, weights, scores)
    write_results(trainer, weights, scores)
    if exported:
        finish_vanilla(trainer, arguments, scores)
    elif problem is not None and training_args.push_to_hub:
        raise InputError(f"Nothing was pushed, because there is no vanilla model: {problem}")
    return 0


# --- the steps ------------------------------------------------------------------------------------


def set_up_logging(training_args: args.TranslationTrainingArguments) -> None:
    """Log to standard error, in full on the first process and only warnings on the others."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    level = logging.INFO if training_args.process_index == 0 else logging.WARNING
    for name in (__name__, "training"):
        logging.getLogger(name).setLevel(level)
    datasets.logging.set_verbosity(datasets.logging.WARNING)
    transformers.logging.set_verbosity(transformers.logging.WARNING)


def check_model(arguments: args.Arguments) -> None:
    """Find mistakes in the model's arguments before the data is touched."""
    model_args = arguments[0]
    try:
        config = AdminConfig(**config_changes(model_args, AdminConfig), vocab_size=model_args.vocab_size)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(one_line(error)) from error
    if profile := model_args.residual_profile:
        with refusing(f"--residual_profile {profile}"):
            ResidualProfile.load(profile)
    if source := model_args.model_name_or_path:
        with refusing(f"The model {source} cannot be loaded"):
            config = AutoConfig.from_pretrained(
                source, cache_dir=model_args.cache_dir, revision=model_args.model_revision
            )
    if source or arguments[2].do_train:
        check_lengths(arguments, config)


def check_lengths(arguments: args.Arguments, config: PretrainedConfig) -> None:
    """Find lengths that are beyond the positions of the model."""
    _, data_args, training_args = arguments
    longest = max(data_args.max_source_length, data_args.max_target_length, data_args.val_max_target_length)
    if training_args.do_train:
        longest = round_up(longest, training_args.length_multiple)
    if longest > getattr(config, "max_position_embeddings", longest):
        multiple = f"; lengths are multiples of {training_args.length_multiple} (--pad_to_multiple_of)"
        raise InputError(
            f"Sequences of up to {longest} tokens are asked for, but the model's max_position_embeddings is "
            f"{config.max_position_embeddings}{multiple if training_args.length_multiple > 1 else ''}."
        )


def load_data(arguments: args.Arguments) -> dict[str, Dataset]:
    """Load the splits that are used, after checking the files of all of them, and that the run has begun with them."""
    model_args, data_args, training_args = arguments
    parallel.check_cache(model_args)
    used = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    splits = [split for split, is_used in used.items() if is_used]
    files = {split: parallel.split_files(split, data_args, model_args) for split in splits}
    runs.check_data(arguments, {split: contents(found) for split, found in files.items() if found})
    raw = {split: parallel.load_pairs(split, data_args, model_args, files[split]) for split in splits}
    runs.check_data(arguments, contents_of(raw))  # with that of data sets by name, which is known now
    return raw


def contents_of(raw: dict[str, Dataset]) -> dict[str, runs.Contents]:
    """Size and checksum of what each split was loaded from, by path or name."""
    return {split: dataset.info.download_checksums for split, dataset in raw.items()}


def named_tokenizer(arguments: args.Arguments) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the arguments name, if any."""
    model_args, data_args, _ = arguments
    name = model_args.tokenizer_name or model_args.model_name_or_path
    return load_tokenizer(name, model_args, data_args.source_prefix or "") if name else None


def prepare_tokenizer(arguments: args.Arguments, raw: dict[str, Dataset]) -> PreTrainedTokenizerBase:
    """Load the run's own tokenizer, or train one on the training pairs."""
    model_args, data_args, training_args = arguments
    output_dir, prefix = Path(training_args.output_dir), data_args.source_prefix or ""
    name = None
    # The first process of a machine has trained it just now, if the others see it; else it is of the run that goes on
    trained = training_args.local_process_index > 0 or (output_dir / ARGUMENTS_NAME).exists()
    if (output_dir / "tokenizer_config.json").exists() and (trained or not training_args.do_train):
        name = str(output_dir)
    if not name and not training_args.do_train:
        name = runs.last_checkpoint(training_args)
    if name:
        return load_tokenizer(name, model_args, prefix)
    logger.info(f"Training a joint BPE tokenizer with {model_args.vocab_size:,} entries.")
    tokenizer = train_tokenizer(text_batches(raw["train"]), model_args.vocab_size, model_args.lowercase)
    save_tokenizer(tokenizer, output_dir)
    return load_tokenizer(str(output_dir), model_args, prefix)  # as every other process and session will see it


def tokenize(
    raw: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, arguments: args.Arguments
) -> dict[str, Dataset]:
    """Turn every split into token ids."""
    _, data_args, training_args = arguments
    longest = training_args.max_tokens
    if longest:
        longest -= longest % training_args.length_multiple
    return {
        split: parallel.tokenize_for_training(dataset, tokenizer, data_args, longest)
        if split == "train"
        else parallel.tokenize_for_evaluation(dataset, tokenizer, data_args, split)
        for split, dataset in raw.items()
    }


def build_model(arguments: args.Arguments, tokenizer: PreTrainedTokenizerBase) -> AdminForConditionalGeneration:
    """Load the model to go on from, or make a new one for this tokenizer."""
    model_args, data_args, training_args = arguments
    if training_args.use_cpu and training_args.keep_freed_memory:
        map_large_buffers()
    source = model_args.model_name_or_path
    if training_args.do_train or not source:
        source = runs.finished_checkpoint(training_args) or source
    if source:
        try:
            model = AdminForConditionalGeneration.from_pretrained(
                source, cache_dir=model_args.cache_dir, revision=model_args.model_revision, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"The model {source} cannot be loaded: {error}") from error
    else:
        model = AdminForConditionalGeneration(
            AdminConfig.for_tokenizer(tokenizer, **config_changes(model_args, AdminConfig))
        )
    try:
        check_tokenizer(model, tokenizer)
    except ValueError as error:
        raise InputError(one_line(error)) from error
    check_lengths(arguments, model.config)
    if training_args.push_to_hub:
        try:
            stock_architecture(model)
        except ValueError as error:
            raise InputError(f"--push_to_hub: {error}") from error
    if training_args.use_cpu and training_args.fp16:
        logger.warning("--fp16: a CPU has no float16 here, so this computes in float32; --bf16 is faster.")
    model.config.label_smoothing = training_args.label_smoothing_factor
    num_beams = training_args.generation_num_beams or data_args.num_beams
    set_generation(model, data_args.val_max_target_length, num_beams, data_args.length_penalty)
    if model_args.residual_profile:
        try:
            initialize_omega(model, ResidualProfile.load(model_args.residual_profile))
        except ValueError as error:
            raise InputError(f"--residual_profile {model_args.residual_profile}: {error}") from error
    return model


def build_trainer(
    arguments: args.Arguments,
    model: AdminForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, Dataset],
    stop: StopOnSignal,
) -> TranslationTrainer:
    """Put model, data, scores and callbacks together."""
    training_args = arguments[2]
    metric = TranslationMetric(lowercases(tokenizer), arguments[1].target_lang)
    if training_args.predict_with_generate:
        check_references(metric, tokenizer, data, arguments[1].val_max_target_length)
    callbacks = [AdminProfilingCallback(), stop]
    if training_args.keep_freed_memory:
        callbacks.append(KeepFreedMemory())
    if training_args.early_stopping_patience:
        callbacks.append(EarlyStopping(training_args.early_stopping_patience))
    try:
        trainer = TranslationTrainer(
            metric=metric,
            residuals=ResidualMonitor(model),
            model=model,
            args=training_args,
            train_dataset=data.get("train"),
            eval_dataset=data.get("validation"),
            processing_class=tokenizer,
            data_collator=TranslationCollator(
                tokenizer, model=model, pad_to_multiple_of=training_args.pad_to_multiple_of
            ),
            callbacks=callbacks,
        )
    except HfHubHTTPError as error:  # Trainer makes the repository
        raise InputError(f"--push_to_hub: the Hub refuses the repository: {first_line(error)}") from error
    if training_args.do_train and training_args.optim_target_modules:
        with refusing(f"--optim {args.shown(training_args.optim)} cannot be used"):  # before anything is trained
            trainer.get_optimizer_cls_and_kwargs(training_args, model)
    if training_args.do_train and training_args.dataloader_drop_last and not len(trainer.get_train_dataloader()):
        raise InputError(
            f"--dataloader_drop_last leaves no batch: {len(data['train'])} training pairs do not fill one."
        )
    return trainer


def train(trainer: TranslationTrainer, arguments: args.Arguments, raw: dict[str, Dataset]) -> None:
    """Train, from the last checkpoint where there is one, and save the model."""
    training_args = arguments[2]
    checkpoint = runs.last_checkpoint(training_args) or training_args.resume_from_checkpoint
    if trainer.is_world_process_zero():
        runs.record_data(arguments, contents_of(raw))
        runs.record_arguments(arguments)
        remove_incomplete_checkpoints(Path(training_args.output_dir))
        remove_results(training_args.output_dir)
    if checkpoint is None:
        profile_before_sharding(trainer)
    elif training_args.save_only_model:
        logger.warning(
            f"--save_only_model: {checkpoint} has no optimizer, which starts anew, and so does the schedule."
        )
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    logger.info(f"Training {parameters:,} parameters{f', going on from {checkpoint}' if checkpoint else ''}.")
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except Divergence as divergence:
        if trainer.is_world_process_zero():
            divergence.save(Path(training_args.output_dir), runs.last_checkpoint(training_args))
            trainer.model.config.save_pretrained(training_args.output_dir)
        trainer.save_state()  # with the log until then
        # Trainer does not: close the progress bar and what logs are written to, and give signals back
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        raise
    save(trainer)
    load_whole_model(trainer)
    report(trainer, "train", result.metrics)


def save(trainer: TranslationTrainer) -> None:
    """Save the model and the state of its training, as the run's result.

    Raises:
        InputError: the disk is full.
    """
    if trainer.state.global_step == 0:  # of an earlier session, which may have been killed before it saved this
        checkpoint = runs.last_checkpoint(trainer.args)
        trainer.state = TrainerState.load_from_json(Path(str(checkpoint), "trainer_state.json"))
        with contextlib.suppress(OSError, ValueError):
            state = TrainerState.load_from_json(Path(trainer.args.output_dir, "trainer_state.json"))
            if state.global_step == trainer.state.global_step:
                trainer.state = state  # with the log of the training as a whole
    with writing(f"The model in {trainer.args.output_dir}"):
        trainer.save_model()
        trainer.save_state()


def profile_before_sharding(trainer: TranslationTrainer) -> None:
    """Initialise ω while every process has whole weights; where they stay whole, the callback does it at step 1."""
    if sharding(trainer.args) is None or trainer.model.omega_initialized:
        return
    dataset = trainer._remove_unused_columns(trainer.train_dataset, "training")
    rows = range(min(trainer.args.per_device_train_batch_size, len(dataset)))
    if trainer.args.max_tokens:
        rows = next(iter(trainer.batch_sampler))
    batch = trainer.data_collator([dataset[i] for i in rows])
    profile_and_initialize(trainer.model, batch, trainer.args.output_dir)


def load_whole_model(trainer: TranslationTrainer) -> None:
    """Give every process the whole model that was saved, to be averaged, folded and scored."""
    if sharding(trainer.args) is None:
        return
    trainer.accelerator.wait_for_everyone()
    model = AdminForConditionalGeneration.from_pretrained(trainer.args.output_dir)
    trainer.model = trainer.model_wrapped = model.to(trainer.args.device)
    trainer.end_sharding()


def load_average(trainer: TranslationTrainer, checkpoints: list[Path]) -> list[str]:
    """Give the model the mean of the run's last checkpoints, saved as the run's model; returns their folders.

    Raises:
        InputError: a checkpoint cannot be read, or does not fit the others.
    """
    if trainer.args.average_last and len(checkpoints) < trainer.args.average_last:
        logger.warning(f"--average_last {trainer.args.average_last}: there are only {len(checkpoints)} checkpoints.")
    try:
        average = average_checkpoints(checkpoints)
    except (OSError, ValueError) as error:
        raise InputError(f"--average_last: {one_line(error)}") from error
    trainer.model.load_state_dict(average, strict=False)  # tied copies and positions are never saved
    logger.info(f"The model is the mean of {', '.join(path.name for path in checkpoints)}.")
    if trainer.args.do_train:
        save(trainer)
    return [str(path) for path in checkpoints]


def evaluate(trainer: TranslationTrainer, vanilla: TranslationTrainer | None) -> dict:
    """Score the validation pairs, by the trained model and by the vanilla one."""
    metrics = trainer.evaluate()
    metrics |= {f"eval_{name}": value for name, value in trainer.signatures.items()}
    report(trainer, "eval", metrics)
    if vanilla is not None:
        metrics |= compare(trainer, "eval", metrics, vanilla.evaluate(metric_key_prefix="vanilla_eval"))
    return metrics


def predict(trainer: TranslationTrainer, vanilla: TranslationTrainer | None, dataset: Dataset) -> dict:
    """Translate the test sentences into generated_predictions.txt, in their order, and score them if they can be."""
    output = trainer.predict(dataset, metric_key_prefix="test")
    metrics = output.metrics | {f"test_{name}": value for name, value in trainer.signatures.items()}
    report(trainer, "test", metrics)
    if vanilla is not None and "target" in dataset.column_names:
        metrics |= compare(
            trainer, "test", metrics, vanilla.predict(dataset, metric_key_prefix="vanilla_test").metrics
        )
    if not trainer.is_world_process_zero() or not trainer.args.predict_with_generate:
        return metrics
    translated = zip(
        dataset["index"], dataset["source"], trainer.translations(output.predictions, dataset), strict=True
    )
    _, sources, translations = zip(*sorted(translated), strict=True)
    if not any(translations):
        logger.warning("All translations are empty: the model has not learnt enough; train longer.")
    path = Path(trainer.args.output_dir) / PREDICTIONS_NAME
    write_whole(path, "".join(f"{text}\n" for text in translations))
    for source, translation in zip(sources[:3], translations[:3], strict=True):
        print(f"  {source}\n  -> {translation}")
    print(f"Translations: {path}\nModel, tokenizer, scores: {trainer.args.output_dir}")
    return metrics


if __name__ == "__main__":
    sys.exit(main())

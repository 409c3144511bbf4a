"""A session of a run: its trainer, its training from the last checkpoint on, and the weights that it leaves."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedTokenizerBase, TrainerState

from admin_hf import AdminForConditionalGeneration, AdminProfilingCallback, KeepFreedMemory, average_checkpoints
from admin_hf.callback import profile_and_initialize
from admin_hf.monitoring import ResidualMonitor
from admin_hf.run.folder import DIVERGENCE_NAME, STATE_NAME
from admin_hf.sharding import sharding

from . import runs
from .arguments import Arguments, shown
from .batching import TranslationCollator
from .checkpointing import remove_incomplete_checkpoints, writing
from .data import Splits, Texts, contents_of
from .divergence import Divergence
from .errors import InputError, refusing
from .hub import first_line
from .metrics import MultilingualMetric, TranslationMetric
from .scores import log_scores, remove_results
from .segmentation import BpeDropout
from .signals import StopOnSignal
from .tokenization import lowercases
from .tokenized_data import check_references, in_language, pair_limits
from .trainer import EarlyStopping, TranslationTrainer


logger = logging.getLogger(__name__)


def build_trainer(
    arguments: Arguments,
    model: AdminForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    data: Splits,
    stop: StopOnSignal,
) -> TranslationTrainer:
    """Put model, data, scores and callbacks together."""
    training = arguments.training
    if not training.do_train or runs.finished_checkpoint(training):
        training.report_to = []  # there is nothing to draw, and TensorBoard would make a folder elsewhere
    metrics, lowercase = {}, lowercases(tokenizer)
    for language in arguments.data.by_target():
        metrics[language] = TranslationMetric(lowercase, language)
        if training.predict_with_generate:
            evaluated = {split: in_language(data[split], language) for split in data if split != "train"}
            check_references(metrics[language], tokenizer, evaluated, arguments.data.val_max_target_length)
    callbacks = [AdminProfilingCallback(), stop]
    if training.keep_freed_memory:
        callbacks.append(KeepFreedMemory())
    if training.early_stopping_patience:
        callbacks.append(EarlyStopping(training.early_stopping_patience))
    try:
        trainer = TranslationTrainer(
            metric=MultilingualMetric(metrics) if len(metrics) > 1 else metrics[arguments.data.target_lang],
            residuals=ResidualMonitor(model),
            segmentation=_segmentation(arguments, tokenizer),
            model=model,
            args=training,
            train_dataset=data.get("train"),
            eval_dataset=data.get("validation"),
            processing_class=tokenizer,
            data_collator=TranslationCollator(tokenizer, model, pad_to_multiple_of=training.pad_to_multiple_of),
            callbacks=callbacks,
        )
    except HfHubHTTPError as error:  # Trainer makes the repository
        raise InputError(f"--push_to_hub: the Hub refuses the repository: {first_line(error)}") from error
    if training.do_train and training.optim_target_modules:
        with refusing(f"--optim {shown(training.optim)} cannot be used"):  # before anything is trained
            trainer.get_optimizer_cls_and_kwargs(training, model)
    if training.do_train and training.dataloader_drop_last and not len(trainer.get_train_dataloader()):
        raise InputError(
            f"--dataloader_drop_last leaves no batch: {len(data['train'])} training pairs do not fill one batch."
        )
    return trainer


def _segmentation(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> BpeDropout | None:
    """What `--bpe_dropout` draws the training text with."""
    _, data, training = arguments
    if not training.do_train or not data.bpe_dropout:
        return None
    seed = training.seed if training.data_seed is None else training.data_seed
    return BpeDropout(tokenizer, data.bpe_dropout, seed, pair_limits(data, training.longest))


def train(trainer: TranslationTrainer, arguments: Arguments, raw: Texts) -> None:
    """Train, from the last checkpoint where there is one and if anything is left to train, and save the model."""
    training = arguments.training
    if trainer.is_world_process_zero():
        Path(training.output_dir, DIVERGENCE_NAME).unlink(missing_ok=True)
    if runs.finished_checkpoint(training):
        logger.info("Nothing is left to train.")
        trainer.end_sharding()
        save(trainer)  # in case that the run was killed just before
        return
    checkpoint = runs.last_checkpoint(training) or training.resume_from_checkpoint
    if trainer.is_world_process_zero():
        runs.record_data(arguments, contents_of(raw))
        runs.record_arguments(arguments)
        remove_incomplete_checkpoints(Path(training.output_dir))
        remove_results(training.output_dir)
    if checkpoint is None:
        _profile_before_sharding(trainer)
    elif training.save_only_model:
        logger.warning(f"--save_only_model: {checkpoint} has no optimizer: optimizer and schedule start again.")
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    logger.info(f"Training {parameters:,} parameters{f', continuing from {checkpoint}' if checkpoint else ''}.")
    with _recording_divergence(trainer):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    save(trainer)
    _load_whole_model(trainer)
    log_scores(trainer, "train", result.metrics)


@contextlib.contextmanager
def _recording_divergence(trainer: TranslationTrainer) -> Iterator[None]:
    try:
        yield
    except Divergence as divergence:
        if trainer.is_world_process_zero():
            divergence.save(Path(trainer.args.output_dir), runs.last_checkpoint(trainer.args))
            trainer.model.config.save_pretrained(trainer.args.output_dir)
        trainer.save_state()  # with the log until then
        # Trainer does not: close the progress bar and what logs are written to, and give signals back
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        raise


def _profile_before_sharding(trainer: TranslationTrainer) -> None:
    """Initialise ω while every process has whole weights; where they stay whole, the callback does it at step 1."""
    if sharding(trainer.args) is None or trainer.model.omega_initialized:
        return
    dataset = trainer._remove_unused_columns(trainer.train_dataset, "training")
    rows = range(min(trainer.args.per_device_train_batch_size, len(dataset)))
    if trainer.args.max_tokens:
        rows = next(iter(trainer.batch_sampler))
    batch = trainer.train_collator([dataset[i] for i in rows])
    profile_and_initialize(trainer.model, batch, trainer.args.output_dir)


def _load_whole_model(trainer: TranslationTrainer) -> None:
    """Give every process the whole model that was saved, to be averaged, folded and scored."""
    if sharding(trainer.args) is None:
        return
    trainer.accelerator.wait_for_everyone()
    model = AdminForConditionalGeneration.from_pretrained(trainer.args.output_dir)
    trainer.model = trainer.model_wrapped = model.to(trainer.args.device)
    trainer.end_sharding()


def save(trainer: TranslationTrainer) -> None:
    """Save the model and the state of its training, as the run's result.

    Raises:
        InputError: the disk is full.
    """
    if trainer.state.global_step == 0:  # of an earlier session, which may have been killed before it saved this
        checkpoint = runs.last_checkpoint(trainer.args)
        trainer.state = TrainerState.load_from_json(Path(str(checkpoint), STATE_NAME))
        with contextlib.suppress(OSError, ValueError):
            state = TrainerState.load_from_json(Path(trainer.args.output_dir, STATE_NAME))
            if state.global_step == trainer.state.global_step:
                trainer.state = state  # with the log of the training as a whole
    with writing(f"The model in {trainer.args.output_dir}"):
        trainer.save_model()
        trainer.save_state()


def load_result(trainer: TranslationTrainer, arguments: Arguments) -> list[str]:
    """Give the model the weights that are scored and exported, in their own precision; returns where they are from.

    Raises:
        InputError: a checkpoint of `--average_last` cannot be read, or does not fit the others.
    """
    training, named = arguments.training, arguments.model.model_name_or_path
    if named and not training.do_train:
        weights = [named]
    elif checkpoints := runs.averaged_checkpoints(training):
        _load_average(trainer, checkpoints)
        weights = [str(path) for path in checkpoints]
    else:
        weights = [runs.finished_checkpoint(training) or training.output_dir]
    trainer.end_autocast()
    return weights


def _load_average(trainer: TranslationTrainer, checkpoints: list[Path]) -> None:
    """Give the model the mean of the run's last checkpoints, saved as the run's model."""
    if trainer.args.average_last and len(checkpoints) < trainer.args.average_last:
        logger.warning(f"--average_last {trainer.args.average_last}: there are only {len(checkpoints)} checkpoints.")
    with refusing("--average_last"):
        average = average_checkpoints(checkpoints)
    trainer.model.load_state_dict(average, strict=False)  # tied copies and positions are never saved
    logger.info(f"The model is the mean of {', '.join(path.name for path in checkpoints)}.")
    if trainer.args.do_train:
        save(trainer)

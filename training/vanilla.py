"""The vanilla model of a run: exported, loaded again to be scored, and published."""

import copy
import logging
import shutil
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import AutoModelForSeq2SeqLM

from admin_hf.publishing import write_vanilla
from admin_hf.run.folder import VANILLA_NAME
from admin_hf.trainer_card import training_facts

from . import runs
from .arguments import Arguments
from .batching import TranslationCollator
from .checkpointing import writing
from .errors import InputError
from .hub import push_folder
from .model_card import write_run_card
from .trainer import TranslationTrainer


logger = logging.getLogger(__name__)


def export(trainer: TranslationTrainer) -> str | None:
    """Write the vanilla model and its tokenizer to output_dir/vanilla; if it cannot be folded, return the reason.

    Raises:
        InputError: it cannot be written, such as on a full disk.
    """
    folder = Path(trainer.args.output_dir) / VANILLA_NAME
    problems: list[str | None] = [None, None]
    if trainer.is_world_process_zero():
        try:
            with writing(f"The vanilla model in {folder}"):
                write_vanilla(trainer.model, folder, trainer.processing_class)
        except InputError as error:
            problems[1] = str(error)
        except ValueError as error:
            problems[0] = str(error)
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier session, and out of date now
    broadcast_object_list(problems)
    unfoldable, unwritable = problems
    if unwritable is not None:
        raise InputError(unwritable)
    if unfoldable is not None:
        logger.warning(f"There is no vanilla model: {unfoldable}")
    return unfoldable


def build_vanilla_trainer(trainer: TranslationTrainer) -> TranslationTrainer:
    """Load the vanilla model with stock classes, to evaluate it like the trained one."""
    model = AutoModelForSeq2SeqLM.from_pretrained(Path(trainer.args.output_dir) / VANILLA_NAME)
    training_args = copy.copy(trainer.args)
    training_args.report_to, training_args.push_to_hub = [], False
    vanilla = TranslationTrainer(
        metric=trainer.metric,
        model=model,
        args=training_args,
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.processing_class,
        data_collator=TranslationCollator(trainer.processing_class, model=model),
    )
    vanilla.end_sharding()
    vanilla.end_autocast()
    return vanilla


def finish_vanilla(trainer: TranslationTrainer, arguments: Arguments, scores: dict) -> None:
    """Write the model card into the folder of the vanilla model, and push the folder if requested."""
    if not trainer.is_world_process_zero():
        return
    run, repo_id = Path(trainer.args.output_dir), trainer.hub_model_id
    folder = run / VANILLA_NAME
    state, has_trained = trainer.state, trainer.optimizer is not None
    state, has_trained = trainer.state, trainer.optimizer is not None
    facts = training_facts(trainer.args, state.log_history, state.global_step) if has_trained else {}
    write_run_card(run, repo_id or run.absolute().name, runs.recorded(arguments), scores, facts)
    print(f"Vanilla model, for stock Transformers: {folder}")
    if trainer.args.push_to_hub:
        print(f"Pushed to {push_folder(folder, repo_id, trainer.args)}")

"""Trainer first reads the arguments with a toy model, so that it refuses wrong ones before the data is read."""

import copy
from tempfile import TemporaryDirectory

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from admin_hf import AdminConfig, AdminForConditionalGeneration
from admin_hf.sharding import sharding

from .arguments import TranslationTrainingArguments, shown
from .batching import TranslationCollator
from .errors import InputError, refusing
from .trainer import TranslationTrainer


def rehearse(training_args: TranslationTrainingArguments) -> None:
    """Build everything that training needs, for a model of one layer and one pair; no update is made.

    Raises:
        InputError: something cannot be built: a package is missing, or arguments contradict each other.
    """
    if sharding(training_args):  # which sets up the processes for the model that is sharded, once
        return
    args = copy.copy(training_args)
    with TemporaryDirectory() as args.output_dir:
        args.report_to, args.push_to_hub = [], False
        with refusing("The arguments cannot be used"):
            trainer = _toy_trainer(args)
            trainer.get_eval_dataloader()
            if not args.do_train:
                return
            trainer.get_train_dataloader()
        model = trainer.model
        if args.optim_target_modules is None:  # or they are to be sought in the real model
            with refusing(f"--optim {shown(args.optim)} cannot be used"):
                _check_optim_args(args, model)
                trainer.create_optimizer()
            with refusing(f"--lr_scheduler_type {shown(args.lr_scheduler_type)} cannot be used"):
                trainer.create_scheduler(num_training_steps=10)
        # Up to Transformers 5.22 these names are the only ones; from 5.23 on these arguments mirror the new ones
        if args.gradient_checkpointing:
            options = dict(args.gradient_checkpointing_kwargs or {})
            with refusing("--activation_checkpointing_kwargs cannot be used"):
                every, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable(options or None, every, offload)
                model.train()(**trainer.data_collator([trainer.train_dataset[0]]))


def _toy_trainer(args: TranslationTrainingArguments) -> TranslationTrainer:
    tokenizer = Tokenizer(WordLevel({"</s>": 0, "<pad>": 1}, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    shape = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 8, "vocab_size": 2}
    layers = {f"{stack}_{what}": 1 for stack in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ids = {"pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
    model = AdminForConditionalGeneration(AdminConfig(**shape, **layers, **ids))
    pairs = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]], "length": [1]})
    return TranslationTrainer(
        metric=None,  # nothing is scored
        model=model,
        args=args,
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=tokenizer,
        data_collator=TranslationCollator(tokenizer, model),
    )


def _check_optim_args(args: TranslationTrainingArguments, model: AdminForConditionalGeneration) -> None:
    """Raise an InputError for one of `--optim_args` that the optimiser does not read: Trainer passes over it."""
    items = args.optim_args.split(",") if args.optim_args else []
    for item in items:
        if item.count("=") != 1:
            raise InputError(f"--optim_args {args.optim_args} is not of the form 'name=value,name=value'.")
    for left_out in items:
        fewer = copy.copy(args)
        fewer.optim_args = ",".join(item for item in items if item is not left_out)
        both = [TranslationTrainer.get_optimizer_cls_and_kwargs(each, model)[1] for each in (args, fewer)]
        if both[0] == both[1]:
            raise InputError(f"--optim_args {left_out} changes nothing in this --optim: leave it out.")

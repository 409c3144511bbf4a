"""What the benchmarks train: shapes, batches, this project's trainer and the stock one with the same arguments."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    set_seed,
)

from admin_hf import AdminForConditionalGeneration
from training.arguments import Arguments, parse_arguments
from training.batching import TokenBatchSampler
from training.model import build_model
from training.session import build_trainer
from training.signals import StopOnSignal
from training.tokenization import EOS, PAD, UNK
from training.trainer import TranslationTrainer

from .turns import Turns


SEED = 1
WARM_UP = 2  # updates at least
DTYPES = ("float32", "bfloat16")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A model's shape and the batches it gets.

    Attributes:
        layers: of each stack.
        max_tokens: of a batch: pairs times longest side.
        updates: of a turn, each on another batch.
    """

    d_model: int
    ffn: int
    heads: int
    layers: int
    vocab_size: int = 10_000
    max_tokens: int = 4096
    updates: int = 4

    def overrides(self) -> str:
        """The value of --config_overrides."""
        values = {"d_model": self.d_model, "dropout": 0.1}
        for stack in ("encoder", "decoder"):
            values |= {f"{stack}_layers": self.layers, f"{stack}_ffn_dim": self.ffn}
            values |= {f"{stack}_attention_heads": self.heads, f"{stack}_residual": "admin"}
        return ",".join(f"{name}={value}" for name, value in values.items())


SHAPES = {
    "tiny": Shape(128, 256, 4, layers=4),
    "base": Shape(512, 2048, 8, layers=6, max_tokens=2048, updates=1),
    "deep": Shape(256, 1024, 4, layers=18, max_tokens=2048, updates=1),
}


# --- trainers -------------------------------------------------------------------------------------


def training_options(folder: Path, dtype: str, **changes: Any) -> dict[str, Any]:
    """Training arguments of both trainers; what is not here is at Trainer's defaults, such as the optimiser.

    Gradients are not clipped, and labels not smoothed: Trainer's smoothing spreads over all V entries, this project's
    over the V − 1 that are not padding, so that the losses would differ.
    """
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 10**6,  # turns end it
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": dtype == "bfloat16",
        "use_cpu": not torch.accelerator.is_available(),
        "save_strategy": "no",
        "logging_steps": 100,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    } | changes


def our_arguments(shape: Shape, options: dict[str, Any], **changes: Any) -> Arguments:
    """The arguments of run_translation.py."""
    values = {"config_overrides": shape.overrides(), "vocab_size": shape.vocab_size, "do_train": True}
    values |= {"source_lang": "en", "target_lang": "de", "train_file": "none"} | options | changes
    return parse_arguments([text for name, value in values.items() for text in (f"--{name}", str(value))])


def our_trainer(arguments: Arguments, tokenizer: PreTrainedTokenizerBase, dataset: Any) -> TranslationTrainer:
    """What run_translation.py makes of the arguments."""
    quiet()
    set_seed(arguments.training.seed)
    model = build_model(arguments, tokenizer)
    return build_trainer(arguments, model, tokenizer, {"train": dataset}, StopOnSignal())


def stock_trainer(
    checkpoint: Path, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase, dataset: Any
) -> Seq2SeqTrainer:
    """What Hugging Face's script makes of the arguments, with the weights of a checkpoint."""
    quiet()
    model = MarianMTModel.from_pretrained(checkpoint)
    for stack in (model.model.encoder, model.model.decoder):
        stack.embed_positions.weight.requires_grad = False  # as in a new model; loading switches it on
    return plain_trainer(model, options, tokenizer, dataset)


def plain_trainer(
    model: PreTrainedModel, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase, dataset: Any
) -> Seq2SeqTrainer:
    """A stock trainer."""
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**options),
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )


def export_stock(shape: Shape, folder: Path) -> Path:
    """Write the vanilla form of the model that `our_trainer` starts with; ω is 1, so its weights are the same."""
    arguments = our_arguments(shape, training_options(folder, "float32"))
    set_seed(SEED)
    model = build_model(arguments, word_tokenizer(shape.vocab_size))
    model.save_pretrained(folder / "stock", reparameterize=True)
    return folder / "stock"


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


# --- batches --------------------------------------------------------------------------------------


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer of this many words, in Marian's layout."""
    words = [EOS, UNK, *(f"w{i}" for i in range(2, vocab_size - 1)), PAD]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token=UNK, pad_token=PAD)


def random_batches(shape: Shape, collator: DataCollatorForSeq2Seq) -> list[Batch]:
    """As many token batches as a turn has updates: random tokens, lengths as in Multi30k (about 16 tokens a side)."""
    rng = np.random.default_rng(SEED)
    pairs = 4 * shape.max_tokens * shape.updates // 16
    sources = rng.lognormal(np.log(14.5), 0.35, pairs).round().clip(4, 60).astype(int)
    targets = (sources * rng.normal(1.05, 0.2, pairs).clip(0.5, 1.6)).round().clip(4, 60).astype(int)
    lengths = np.maximum(sources, targets)
    sampler = TokenBatchSampler(lengths.clip(max=shape.max_tokens), shape.max_tokens, SEED)

    def sentence(length: int) -> list[int]:
        return [*rng.integers(2, shape.vocab_size - 1, length - 1).tolist(), 0]

    rows = list(sampler)[: shape.updates]
    return [
        collator([{"input_ids": sentence(sources[i]), "labels": sentence(targets[i])} for i in batch])
        for batch in rows
    ]


def only(features: list[Any]) -> Any:
    """The collator of a data set whose items are batches."""
    return features[0]


# --- systems that take turns ------------------------------------------------------------------------


class _UpdateTurns(TrainerCallback):
    """Turns of some updates each, with all that Trainer does between them: loading, logging, callbacks."""

    def __init__(self, turns: Turns, updates: int, warm_up: int, model: nn.Module, **ready: Any) -> None:
        self.turns, self.updates, self.warm_up, self.ready = turns, updates, warm_up, ready
        self.targets = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        self.targets += int(inputs["labels"].ne(-100).sum())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step - self.warm_up
        if step < 0 or step % self.updates:
            return
        self.turns.next(**({"updates": self.updates, "targets": self.targets} if step else self.ready))
        self.targets = 0


def train(turns: Turns, trainer: Trainer, updates: int, warm_up: int = WARM_UP, **ready: Any) -> None:
    """Train, in turns of some updates."""
    trainer.add_callback(_UpdateTurns(turns, updates, warm_up, trainer.model, **ready))
    trainer.train()


def train_on_random_batches(turns: Turns, trainer: Trainer, shape: Shape) -> None:
    """Train on the same batches in every turn; says the loss of the first one before."""
    batches = random_batches(shape, trainer.data_collator)
    loss = loss_without_dropout(trainer, batches[0])
    trainer.train_dataset, trainer.data_collator = batches * 10_000, only
    train(turns, trainer, shape.updates, warm_up=-(-WARM_UP // shape.updates) * shape.updates, loss=loss)


def ours(turns: Turns, shape: Shape, dtype: str, folder: Path) -> None:
    """Train by run_translation.py's trainer."""
    train_on_random_batches(turns, our_batch_trainer(shape, dtype, folder), shape)


def our_batch_trainer(shape: Shape, dtype: str, folder: Path, **changes: Any) -> TranslationTrainer:
    """The trainer of `ours`; `changes` are to its arguments."""
    arguments = our_arguments(shape, _batch_options(folder, dtype), **changes)
    return our_trainer(arguments, word_tokenizer(shape.vocab_size), [])


def stock(turns: Turns, shape: Shape, dtype: str, folder: Path) -> None:
    """Train stock Marian, of the weights that `export_stock` wrote, by a stock trainer."""
    options = _batch_options(folder, dtype)
    trainer = stock_trainer(folder / "stock", options, word_tokenizer(shape.vocab_size), [])
    train_on_random_batches(turns, trainer, shape)


def _batch_options(folder: Path, dtype: str) -> dict[str, Any]:
    one = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    return training_options(folder, dtype, **one)


def loss_without_dropout(trainer: Trainer, batch: Batch) -> float:
    """The loss of a batch in train mode, in the trainer's precision."""
    model: AdminForConditionalGeneration | MarianMTModel = trainer.model.train()
    with torch.no_grad(), trainer.accelerator.autocast(), contextlib.ExitStack() as stack:
        for module in model.modules():
            for name in {"dropout", "activation_dropout"} & vars(module).keys():
                stack.enter_context(patch.object(module, name, 0.0))
        return float(model(**batch).loss)

"""Trains a stock model of Transformers from scratch on a CPU, with or without an injected ω: a run of architectures.

The process goes on from the last checkpoint in its folder. It writes arguments.json first and results.json last.
"""

import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

from admin_hf import initialize_omega, inject, profile_residuals
from admin_hf.checkpoints import write_whole
from admin_hf.run import complete_checkpoints
from admin_hf.run.folder import ARGUMENTS_NAME, RESULTS_NAME

from ..arguments import DataTrainingArguments, ModelArguments
from ..data import load_pairs
from ..model import config_changes
from ..tokenization import load_tokenizer


CLASSES = {
    "opt": AutoModelForCausalLM,
    **dict.fromkeys(("bert", "megatron-bert"), AutoModelForMaskedLM),
    **dict.fromkeys(("bart", "mbart"), AutoModelForSeq2SeqLM),
}
TEXT_SEED = 1  # of the order of sentences and of the masks, the same for all runs


@dataclass
class StockArguments:
    """What tells these runs from those of run_translation.py."""

    model_type: str = HfArg(help=f"{', '.join(CLASSES)}.")
    initialization: str = HfArg(
        default="stock",
        help="'stock': as the class has it; 'xavier': Xavier-uniform projections; 'wide': normal ones with the "
        "class's std times sqrt(768 / width), whose branches have the variances that width 768 has.",
    )
    chain: str | None = HfArg(
        default=None, help="Where the variances of ω start: 'norm', after the first LayerNorm, or 'embeddings'."
    )
    block_size: int = HfArg(default=32, help="Tokens of a block of text, and at most of a sentence.")
    max_eval_blocks: int | None = HfArg(default=None, help="Validate on the first examples only.")
    masked: float = HfArg(default=0.0, help="Share of tokens to mask and predict.")


# --- data -----------------------------------------------------------------------------------------


def tokens(sentences: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text whose different sentences come in a random order, each once."""
    texts = list(dict.fromkeys(sentences["target"]))
    random.Random(TEXT_SEED).shuffle(texts)
    return list(chain.from_iterable(tokenizer(texts)["input_ids"]))


def examples(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataTrainingArguments, stock: StockArguments
) -> list[dict[str, list[int]]]:
    """What a model is given: pairs of sentences, or blocks of text, with masks or not."""
    size = stock.block_size
    if data.source_lang != data.target_lang:
        sides = (tokenizer(list(pairs[side]), truncation=True, max_length=size) for side in ("source", "target"))
        return [
            {"input_ids": source, "labels": target}
            for source, target in zip(*(side["input_ids"] for side in sides), strict=True)
        ]
    text = tokens(pairs, tokenizer)
    blocks = [text[start : start + size] for start in range(0, len(text) - size + 1, size)]
    if not stock.masked:
        return [{"input_ids": block, "labels": block} for block in blocks]
    draw, mask = random.Random(TEXT_SEED), tokenizer.unk_token_id  # which stands in no text: bytes spell what is rare
    masks = [[draw.random() < stock.masked for _ in block] for block in blocks]
    return [
        {
            "input_ids": [mask if hidden else token for token, hidden in zip(block, row, strict=True)],
            "labels": [token if hidden else -100 for token, hidden in zip(block, row, strict=True)],
        }
        for block, row in zip(blocks, masks, strict=True)
    ]


# --- model ----------------------------------------------------------------------------------------


def build(model: ModelArguments, stock: StockArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> Any:
    """A fresh stock model with the projections initialised as is asked for."""
    config_class = CONFIG_MAPPING[stock.model_type]
    ids = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    ids |= dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), tokenizer.eos_token_id)
    config = config_class(**config_changes(model, config_class), **ids)
    set_seed(seed)
    built: Any = CLASSES[stock.model_type].from_config(config)
    if stock.initialization != "stock":
        std = (getattr(config, "initializer_range", None) or config.init_std) * (768 / config.hidden_size) ** 0.5
        embeddings = built.get_input_embeddings().weight
        for module in built.modules():
            if isinstance(module, nn.Linear) and module.weight is not embeddings:
                if stock.initialization == "xavier":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=std)
    return built


def add_omega(model: Any, batch: dict[str, torch.Tensor], chain: str) -> None:
    """Inject ω and start it from a profile: as `inject` has it, or naively, from the embeddings' variance on."""
    profile = profile_residuals(inject(model), batch)
    initialize_omega(model, profile)
    if chain == "embeddings":
        for name, connections in model.injection.stacks.items():
            stack = profile.stacks[name]
            variances = [stack.shortcut_variances[0], *stack.branch_variances]
            for place, connection in enumerate(connections):
                if hasattr(connection.norm, "omega"):
                    connection.omega.data.fill_(sum(variances[: place + 1]) ** 0.5)


# --- a run ----------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> Any:
    """The four groups of arguments."""
    groups: Any = (ModelArguments, DataTrainingArguments, StockArguments, TrainingArguments)
    return HfArgumentParser(groups).parse_args_into_dataclasses(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns 0."""
    model_arguments, data, stock, training = parse(argv)
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    given = asdict(model_arguments) | asdict(data) | asdict(stock) | training.to_dict()
    write_whole(folder / ARGUMENTS_NAME, json.dumps(given, indent=1) + "\n")
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model_arguments.tokenizer_name, model_arguments)
    train, validation = (
        examples(load_pairs(split, data, model_arguments), tokenizer, data, stock) for split in ("train", "validation")
    )
    model = build(model_arguments, stock, tokenizer, training.seed)
    collator = DataCollatorForSeq2Seq(tokenizer)
    omega: list[float] = []
    if stock.chain:
        add_omega(model, dict(collator(train[: training.train_batch_size])), stock.chain)
        means = [
            float(c.omega.detach().mean())
            for c in chain.from_iterable(model.injection.stacks.values())
            if hasattr(c.norm, "omega")
        ]
        omega = [min(means), max(means)]
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation[: stock.max_eval_blocks],
        data_collator=collator,
    )
    checkpoints = complete_checkpoints(folder)
    output = trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    trainer.save_state()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    results = {
        "scores": {"eval_loss": losses[-1]},
        "parameters": model.num_parameters(),
        "omega": omega,
        "seconds": None if checkpoints else output.metrics["train_runtime"],
    }
    write_whole(folder / RESULTS_NAME, json.dumps(results) + "\n")
    for checkpoint in complete_checkpoints(folder):
        shutil.rmtree(checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())

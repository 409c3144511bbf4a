"""Trains the demo's model by one update and leaves: python -m benchmarks.first_update {ours,stock} FOLDER

Nothing is imported before it is needed, so that each pays for its own imports alone. FOLDER has `train.json`, a
tokenizer in `tokenizer`, and for stock the model's configuration in `stock`.
"""

import os
import sys
from pathlib import Path


REPO = Path(__file__).parents[1]


def ours(folder: Path) -> None:
    """The steps of run_translation.py, up to the first update."""
    from training.arguments import parse_arguments
    from training.model import build_model, check_model
    from training.rehearsal import rehearse
    from training.session import build_trainer, train
    from training.signals import StopOnSignal
    from training.tokenized_data import prepare_data

    values = {"train_file": folder / "train.json", "tokenizer_name": folder / "tokenizer", "do_predict": False}
    values |= {"output_dir": folder / "ours", "cache_dir": folder / "cache", "disable_tqdm": True, "report_to": "none"}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    recipe = REPO / "hub_configs" / "demo" / "recipe.json"
    arguments = parse_arguments([str(recipe), "--config_name", str(recipe.parent), *flags])
    check_model(arguments)
    rehearse(arguments.training)
    raw, tokenizer, data = prepare_data(arguments)
    trainer = build_trainer(arguments, build_model(arguments, tokenizer), tokenizer, data, StopOnSignal())
    leave_after_first_update(trainer)
    train(trainer, arguments, raw)


def stock(folder: Path) -> None:
    """A script of stock parts that does the same."""
    from datasets import load_dataset
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        MarianConfig,
        MarianMTModel,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
    )

    raw = load_dataset("json", data_files=str(folder / "train.json"), split="train", cache_dir=str(folder / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def tokenize(rows: dict) -> dict:
        sources, targets = ([pair[language] for pair in rows["translation"]] for language in ("en", "de"))
        return tokenizer(sources, text_target=targets)

    model = MarianMTModel(MarianConfig.from_pretrained(folder / "stock"))
    options = {"learning_rate": 0.002, "warmup_steps": 200, "max_steps": 1000, "max_grad_norm": 0.0}
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            str(folder / "run"), per_device_train_batch_size=32, disable_tqdm=True, report_to="none", **options
        ),
        train_dataset=raw.map(tokenize, batched=True, remove_columns=["translation"]),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    leave_after_first_update(trainer)
    trainer.train()


def leave_after_first_update(trainer) -> None:
    from transformers import TrainerCallback

    leave = TrainerCallback()
    leave.on_step_end = lambda *args, **kwargs: os._exit(0)
    trainer.add_callback(leave)


if __name__ == "__main__":
    {"ours": ours, "stock": stock}[sys.argv[1]](Path(sys.argv[2]))
    sys.exit("Training ended before its first update.")

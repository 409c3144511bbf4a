"""Trains a tiny model with a plain Seq2SeqTrainer, sharded where it is launched so; run by test_distributed.py."""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from conftest import PAD, tiny_model, without_dropout
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, default_data_collator

from admin_hf import AdminProfilingCallback
from admin_hf.callback import profile_and_initialize
from training.processes import end_process_group


def main(folder: str, batch_size: str) -> None:
    trainer = make_trainer(folder, int(batch_size))
    profile = [trainer.train_dataset[i] for i in range(8)]
    profile_and_initialize(trainer.model, trainer.data_collator(profile), folder)
    trainer.train()
    parameters = list(trainer.model.parameters())
    held = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
    output = trainer.predict(trainer.train_dataset.select(range(4)))
    report = {
        "parameters": sum(p.numel() for p in parameters),
        "held": held,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "test_loss": output.metrics["test_loss"],
        "predictions": output.predictions[:4].tolist(),
    }
    resumed = make_trainer(f"{folder}/resumed", int(batch_size))
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    report["losses_resumed"] = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    Path(folder, f"rank{trainer.args.process_index}.json").write_text(json.dumps(report))


def make_trainer(folder: str, batch_size: int) -> Seq2SeqTrainer:
    args = Seq2SeqTrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=batch_size,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_steps=2,
        logging_steps=1,
        predict_with_generate=True,
        generation_max_length=8,
        report_to=[],
        disable_tqdm=True,
    )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # accelerate shards on GPUs only, though nothing in its code or PyTorch's for FSDP2 needs one
        args.use_cpu = False
        args.distributed_state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    ids = torch.randint(2, PAD, (32, 2, 6), generator=torch.Generator().manual_seed(0))
    return Seq2SeqTrainer(
        model=without_dropout(tiny_model(dropout=0.0, attention_dropout=0.0)),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids[:, 0].tolist(), "labels": ids[:, 1].tolist()}),
        data_collator=default_data_collator,
        callbacks=[AdminProfilingCallback()],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process_group()

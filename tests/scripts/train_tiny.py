"""Trains a tiny model with a plain Seq2SeqTrainer and the profiling callback; run by test_distributed.py."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from conftest import PAD, tiny_model
from datasets import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from admin_hf import AdminProfilingCallback
from admin_hf.residual import AdminConnection
from training.processes import end_process_group


def main(folder: str, *options: str) -> None:
    learning_rate = next((float(o.partition("=")[2]) for o in options if o.startswith("--learning_rate")), 1e-3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, PAD, (32, 2, 6), generator=generator)
    dataset = Dataset.from_dict({"input_ids": ids[:, 0].tolist(), "labels": ids[:, 1].tolist()})
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda m, a, inputs: seen.append(inputs["input_ids"].tolist()), with_kwargs=True)
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=learning_rate,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        callbacks=[AdminProfilingCallback()],
    )
    trainer.train()
    weights = b"".join(value.numpy().tobytes() for _, value in sorted(model.state_dict().items()))
    report = {
        "first_batch": seen[0],
        "omega": [float(m.omega.detach()[0]) for m in model.modules() if isinstance(m, AdminConnection)],
        "is_profiled": model.is_profiled,
        "weights": hashlib.sha256(weights).hexdigest(),
    }
    Path(folder, f"rank{trainer.args.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process_group()

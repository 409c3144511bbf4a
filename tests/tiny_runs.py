"""Runs of the script in this process, at tiny size: their arguments and their weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import run_translation


SHAPE = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=32,decoder_ffn_dim=32"
SHAPE += ",encoder_attention_heads=2,decoder_attention_heads=2"


def arguments(data, output, **changes) -> dict:
    defaults = {
        "train_file": data / "train",
        "validation_file": data / "validation",
        "test_file": data / "test",
        "source_lang": "en",
        "target_lang": "de",
        "output_dir": output,
        "config_overrides": SHAPE,
        "vocab_size": 250,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "val_max_target_length": 16,
        "learning_rate": 0.01,
        "logging_steps": 2,
        "do_train": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return {name: value for name, value in (defaults | changes).items() if value is not None}


def flags(values: dict) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def run(data, output, **changes) -> int:
    return run_translation.main(flags(arguments(data, output, **changes)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name

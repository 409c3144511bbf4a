"""The scripts in examples/, run as a user runs them, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from admin_hf import ResidualProfile
from training.embedded_data import generate_pairs


EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def run(*command: str, folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_the_trainer_ends_with_a_vanilla_model_that_stock_transformers_load(tmp_path):
    for split, count in (("train", 60), ("validation", 6)):
        lines = [json.dumps(dict(zip(("en", "de"), pair, strict=True))) for pair in generate_pairs(count, seed=1)]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flags = "--output_dir run --max_steps 2 --per_device_train_batch_size 4 --generation_max_length 8 --use_cpu"
    command = [sys.executable, EXAMPLES / "trainer.py", "data", "en", "de", *flags.split(), "--report_to", "none"]
    assert "eval_bleu" in run(*map(str, command), folder=tmp_path)
    profile = ResidualProfile.load(tmp_path / "run" / "residual_profile.json")
    assert len(profile.encoder.omega) == 24 and profile.decoder.omega[-1] > 2
    model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert type(model).__name__ == "MarianMTModel" and not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.generate(**tokenizer("two dogs", return_tensors="pt"), max_new_tokens=3).shape[0] == 1


def test_the_loop_learns_on_two_processes(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(EXAMPLES / "loop.py"), "out", "60"]
    output = run(*launch, folder=tmp_path)
    (loss,) = (float(line.split()[-1]) for line in output.splitlines() if line.startswith("update 60:"))
    assert loss < 4.5, "knowing nothing costs ln 98 = 4.58"
    assert len(ResidualProfile.load(tmp_path / "out" / "residual_profile.json").encoder.omega) == 12
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "MarianMTModel"
    source = torch.tensor([[5, 6, 7, 8, 0]])
    assert torch.isfinite(model(input_ids=source, labels=source).loss)

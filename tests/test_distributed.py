"""Two processes, started by torchrun, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import padded_batch, randomize
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, MarianMTModel

import run_translation
from admin_hf import AdminForConditionalGeneration
from admin_hf.__main__ import main as admin_hf_main
from admin_hf.run import average_checkpoints
from training.embedded_data import write_embedded_data


SCRIPT = Path(__file__).parent / "scripts" / "train_tiny.py"
FSDP_CONFIG = SCRIPT.parents[2] / "hub_configs" / "accelerate" / "fsdp.yaml"
SHARDING_LAUNCHER = ["-m", "accelerate.commands.launch", "--config_file", str(FSDP_CONFIG), "--num_processes", "2"]


def launch(folder: Path, processes: int, *options: str) -> list[dict]:
    """Train the tiny model of the script and return what every rank reports."""
    run_processes([str(SCRIPT), str(folder), *options], processes)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


def run_processes(script: list[str], processes: int, launcher: list[str] | None = None) -> None:
    """Run a Python script in one process, or in several by torchrun or by the launcher given."""
    launcher = launcher or ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["tests", "."])}
    done = subprocess.run(
        command, cwd=SCRIPT.parents[2], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_all_ranks_get_the_profile_of_the_first_rank(tmp_path):
    """Rank 0's first batch is the first batch of one process that sees rank 0's half of the data."""
    one = launch(tmp_path / "one", 1, "--learning_rate=0")
    two = launch(tmp_path / "two", 2, "--learning_rate=0")
    assert two[0]["first_batch"] == one[0]["first_batch"], "the comparison needs the same batch"
    assert two[0]["first_batch"] != two[1]["first_batch"]
    assert two[0]["omega"] == two[1]["omega"] == one[0]["omega"]
    assert min(two[0]["omega"]) > 1
    assert two[0]["is_profiled"] and two[1]["is_profiled"]


@pytest.mark.slow
def test_ranks_stay_identical_while_they_train(tmp_path):
    two = launch(tmp_path, 2)
    assert two[0]["weights"] == two[1]["weights"]
    assert two[0]["omega"] == two[1]["omega"]
    assert (tmp_path / "residual_profile.json").exists()


@pytest.mark.slow
def test_two_processes_evaluate_and_translate_as_one(tmp_path):
    """13 sentences, which neither the processes nor the batches divide."""
    data = tmp_path / "data"
    write_embedded_data(data, train=60, validation=13, test=13)
    model = tmp_path / "model"
    config = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=32,decoder_ffn_dim=32"
    config += ",encoder_attention_heads=2,decoder_attention_heads=2"
    common = [
        "--train_file",
        f"{data}/train",
        "--validation_file",
        f"{data}/validation",
        "--test_file",
        f"{data}/test",
    ]
    common += ["--source_lang", "en", "--target_lang", "de", "--val_max_target_length", "16", "--disable_tqdm", "True"]
    train = [*common, "--do_train", "--max_steps", "1", "--vocab_size", "200", "--config_overrides", config]
    assert run_translation.main([*train, "--output_dir", str(model)]) == 0
    randomize(AdminForConditionalGeneration.from_pretrained(model), scale=0.5).save_pretrained(model)
    results, lines = [], []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        script = [str(SCRIPT.parents[2] / "run_translation.py"), *common, "--do_eval", "--do_predict"]
        script += [
            "--model_name_or_path",
            str(model),
            "--output_dir",
            str(output),
            "--per_device_eval_batch_size",
            "2",
        ]
        run_processes(script, processes)
        results.append(json.loads((output / "all_results.json").read_text()))
        lines.append((output / "generated_predictions.txt").read_text().splitlines())
    assert lines[0] == lines[1] and len(lines[0]) == 13 and len(set(lines[0])) > 2
    for name in ("eval_bleu", "eval_chrf", "test_bleu", "test_ter"):
        assert results[0][name] == results[1][name], name
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_average_export_and_score_the_vanilla_model(tmp_path, sharded):
    write_embedded_data(tmp_path / "data", train=60, validation=13, test=2)
    config = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=32,decoder_ffn_dim=32"
    config += ",encoder_attention_heads=2,decoder_attention_heads=2"
    values = {"train_file": tmp_path / "data/train", "validation_file": tmp_path / "data/validation"}
    values |= {"source_lang": "en", "target_lang": "de", "do_train": True, "do_eval": True, "max_steps": 20}
    values |= {"val_max_target_length": 16, "vocab_size": 200, "config_overrides": config, "learning_rate": 0.05}
    values |= {"output_dir": tmp_path / "run", "disable_tqdm": True, "max_tokens": 400}
    values |= {"save_steps": 10, "average_last": 2}
    script = SCRIPT.with_name("translate_sharded.py") if sharded else SCRIPT.parents[2] / "run_translation.py"
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    run_processes([str(script), *flags], 2, SHARDING_LAUNCHER if sharded else None)
    assert (tmp_path / "run" / "residual_profile.json").exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [Path(folder).name for folder in results["weights"]] == ["checkpoint-10", "checkpoint-20"]
    assert results["scores"]["eval_loss"] > 0
    for name in ("bleu", "chrf", "ter"):
        assert results["scores"][f"vanilla_eval_{name}"] == results["scores"][f"eval_{name}"], name
    average = average_checkpoints([tmp_path / "run" / "checkpoint-10", tmp_path / "run" / "checkpoint-20"])
    saved = saved_weights(tmp_path / "run")
    assert all(torch.equal(saved[name], average[name]) for name in average)
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "vanilla")) is MarianMTModel
    assert (tmp_path / "run" / "vanilla" / "README.md").exists()


# --- sharded weights ------------------------------------------------------------------------------

SHARDED_SCRIPT = SCRIPT.with_name("train_sharded.py")


@pytest.fixture(scope="module")
def one_and_sharded(tmp_path_factory) -> tuple[Path, Path]:
    """Runs on the same batches of 8: in one process, and on two that `accelerate launch` starts with fsdp.yaml."""
    one, sharded = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("sharded")
    run_processes([str(SHARDED_SCRIPT), str(one), "8"], 1)
    run_processes([str(SHARDED_SCRIPT), str(sharded), "4"], 2, SHARDING_LAUNCHER)
    return one, sharded


def reports(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    return AdminForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_sharded_processes_train_as_one(one_and_sharded):
    one, sharded = one_and_sharded
    (expected,), (first, second) = reports(one), reports(sharded)
    assert expected["held"] == 0 and first["held"] + second["held"] == first["parameters"] == expected["parameters"]
    assert first["held"] < 0.6 * first["parameters"]
    profiles = [(folder / "residual_profile.json").read_text() for folder in one_and_sharded]
    assert profiles[0] == profiles[1]
    for name in ("losses", "test_loss"):
        assert first[name] == second[name] == pytest.approx(expected[name], rel=1e-6)
    assert first["predictions"] == second["predictions"] == expected["predictions"]
    weights, other = saved_weights(one / "checkpoint-4"), saved_weights(sharded / "checkpoint-4")
    for name in weights:
        if not name.endswith("k_proj.bias"):  # of which the gradient is 0, but for rounding, which Adam magnifies
            assert torch.allclose(weights[name], other[name], rtol=0, atol=5e-6), name


@pytest.mark.slow
def test_a_sharded_run_resumes_exactly(one_and_sharded):
    folder = one_and_sharded[1]
    for report in reports(folder):
        assert report["losses_resumed"] == report["losses"]
    weights, resumed = saved_weights(folder / "checkpoint-4"), saved_weights(folder / "resumed" / "checkpoint-4")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.slow
def test_a_checkpoint_of_a_sharded_run_is_whole_and_exports(one_and_sharded, tmp_path):
    one, sharded = (folder / "checkpoint-4" for folder in one_and_sharded)
    shapes = []
    for folder in (one, sharded):
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in file.keys() if name != "lm_head.weight"})
    assert shapes[0] == shapes[1]
    assert admin_hf_main(["export", str(sharded), str(tmp_path / "vanilla")]) == 0
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "vanilla").eval()
    assert type(stock) is MarianMTModel
    trained = AdminForConditionalGeneration.from_pretrained(one).eval()
    with torch.no_grad():
        logits, expected = (model(**padded_batch()).logits for model in (stock, trained))
    assert torch.allclose(logits, expected, atol=2e-5)

"""Runs that are killed at exact moments, and repeated, end bit for bit as an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from training.checkpointing import complete_checkpoints, remove_incomplete_checkpoints, rotate_checkpoints
from training.embedded_data import write_embedded_data


SCRIPT = Path(__file__).parent / "scripts" / "interrupted.py"
KILLED = -9
SHAPE = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=32,decoder_ffn_dim=32"
SHAPE += ",encoder_attention_heads=2,decoder_attention_heads=2,dropout=0.1"

Session = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_embedded_data(folder, train=42, validation=4, test=1)
    return folder


@pytest.fixture(scope="module")
def session(data) -> Iterator[Session]:
    """Runs one session, up to `moment`; returns its exit code and what it wrote to standard error."""
    server = subprocess.Popen([sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None

    def run(output: Path, moment: dict | None = None, **changes: object) -> tuple[int, str]:
        print(json.dumps({"moment": moment or {}, "flags": flags(data, output, **changes)}), file=server.stdin)
        server.stdin.flush()
        code, errors = json.loads(server.stdout.readline())
        return code, errors

    yield run
    server.stdin.close()
    assert server.wait(timeout=60) == 0


def flags(data: Path, output: Path, **changes: object) -> list[str]:
    values = {
        "train_file": data / "train",
        "validation_file": data / "validation",
        "source_lang": "en",
        "target_lang": "de",
        "output_dir": output,
        "config_overrides": SHAPE,
        "vocab_size": 200,
        "val_max_target_length": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "max_steps": 16,
        "logging_steps": 3,
        "do_train": True,
        "predict_with_generate": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    } | changes
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule, random state and the log of two runs are equal bit for bit."""
    last = checkpoints(one)[-1]
    assert checkpoints(other) == checkpoints(one)
    names = {"model.safetensors", *(str(path.relative_to(one)) for path in (one / last).glob("*.safetensors"))}
    for name in names:
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert [key for key, value in first.items() if not torch.equal(value, second[key])] == [], name
    with safe_globals():  # random states of NumPy
        for path in (one / last).glob("*.pt*"):
            first, second = (torch.load(folder / last / path.name, weights_only=True) for folder in (one, other))
            assert_equal(first, second, path.name)
    assert log_history(other / last) == log_history(one / last)


def assert_equal(one: object, other: object, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}[{key}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    elif isinstance(one, (torch.Tensor, np.ndarray)):
        assert (one == other).all(), where
    else:
        assert one == other, where


def log_history(checkpoint: Path) -> list[dict]:
    """All that was logged but the time that it took."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    timing = ("runtime", "per_second")
    return [{name: value for name, value in entry.items() if not name.endswith(timing)} for entry in history]


def checkpoints(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))


VARIANTS = {
    "random": {"train_sampling_strategy": "random", "save_steps": 5, "logging_steps": 4, "update": 9},
    "lengths": {"train_sampling_strategy": "group_by_length", "save_steps": 4, "update": 10},
    "tokens": {"max_tokens": 100, "save_steps": 4, "update": 11},
    "bpe_dropout": {"max_tokens": 100, "bpe_dropout": 0.3, "save_steps": 4, "update": 11},
    "ema": {
        "ema_decay": 0.9,
        "save_steps": 4,
        "do_eval": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "update": 10,
    },
    "average": {"ema_decay": 0.9, "save_steps": 4, "do_eval": True, "eval_strategy": "steps", "update": 10},
    "epochs": {"save_steps": 3, "do_eval": True, "eval_strategy": "epoch", "update": 14},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_killed_ends_as_an_uninterrupted_one(session, tmp_path, variant):
    """With dropout, 6 updates an epoch, accumulated gradients; from the middle of an epoch and from its end."""
    options = dict(VARIANTS[variant])
    update = options.pop("update")
    assert session(tmp_path / "whole", **options)[0] == 0
    assert session(tmp_path / "parts", {"update": update}, **options)[0] == KILLED
    assert session(tmp_path / "parts", **options, dataloader_num_workers=int(variant == "random"))[0] == 0
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


SHORT = {"save_steps": 2, "save_total_limit": 2, "max_steps": 8}


@pytest.fixture(scope="module")
def whole(session, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert session(folder, **SHORT)[0] == 0
    return folder


@pytest.mark.slow
def test_what_is_half_written_or_half_deleted_is_never_gone_on_with(session, whole, tmp_path):
    moments = [
        ({"update": 1}, []),
        ({"event": "open", "path": "checkpoint-2/tokenizer_config.json"}, []),  # weights, but no optimizer
        ({"event": "open", "path": "checkpoint-4/trainer_state.json"}, [2]),
        ({"event": "shutil.rmtree", "path": "checkpoint-2"}, [4, 6]),  # makes room for the third
        ({"event": "open", "path": f"{tmp_path.name}/config.json"}, [6, 8]),  # of the trained model
    ]
    for moment, complete in moments:
        code, errors = session(tmp_path, moment, **SHORT)
        assert code == KILLED, errors
        assert complete_checkpoints(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in complete]
    assert session(tmp_path, **SHORT)[0] == 0
    assert_same_end(whole, tmp_path)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_one_sentence(session, whole, tmp_path):
    assert session(tmp_path, {"update": 5}, **SHORT)[0] == KILLED
    moments = [
        {"event": "open", "path": "checkpoint-6/config.json", "largest_file": 4096},  # the weights are larger
        {"event": "open", "path": "checkpoint-6/tokenizer_config.json", "largest_file": 60_000},  # the optimizer is
        {"event": "open", "path": "checkpoint-6/trainer_state.json", "largest_file": 10},
    ]
    for moment in moments:
        code, errors = session(tmp_path, moment, **SHORT)
        assert code == 2, errors
        assert f"error: The checkpoint {tmp_path}/checkpoint-6 cannot be written: " in errors
        assert "Traceback" not in errors and "repeat the command" in errors
        assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert session(tmp_path, **SHORT)[0] == 0
    assert_same_end(whole, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_from_before_a_callback_was_there_is_gone_on_with(session, tmp_path):
    assert session(tmp_path, **SHORT | {"max_steps": 4})[0] == 0
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["UpdateMonitor"]
    path.write_text(json.dumps(state))
    assert session(tmp_path, **SHORT)[0] == 0
    assert "UpdateMonitor" in (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()


@pytest.mark.slow
def test_evaluation_does_not_change_what_is_trained(session, whole, tmp_path):
    assert session(tmp_path, **SHORT, do_eval=True, eval_strategy="steps", eval_steps=3)[0] == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_a_stop_in_mid_epoch_is_not_the_end_of_the_epoch(session, tmp_path):
    options = {"save_strategy": "epoch", "do_eval": True, "eval_strategy": "epoch"}
    assert session(tmp_path, {"update": 8, "signal": signal.SIGTERM}, **options)[0] == 128 + signal.SIGTERM
    assert checkpoints(tmp_path) == ["checkpoint-6", "checkpoint-8"]
    evaluated = [entry["step"] for entry in log_history(tmp_path / "checkpoint-8") if "eval_loss" in entry]
    assert evaluated == [6]


@pytest.mark.slow
def test_a_stop_at_an_evaluation_leaves_none_out(session, tmp_path):
    """Of the scores here, which are all the same, the first is the best."""
    options = SHORT | {"do_eval": True, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options |= {"learning_rate": 0.0}
    assert session(tmp_path / "whole", **options)[0] == 0
    assert session(tmp_path / "parts", {"update": 2, "signal": signal.SIGTERM}, **options)[0] == 128 + signal.SIGTERM
    assert session(tmp_path / "parts", **options)[0] == 0
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "trainer_state.json").read_text())["best_global_step"] == 2


@pytest.mark.slow
def test_two_processes_resume_exactly(data, tmp_path):
    """One is asked to stop, one killed between the files of both, one's disk is full; then both go on."""
    options = {"gradient_accumulation_steps": 1, "save_steps": 4, "max_steps": 10}

    def run(name: str, moment: dict) -> subprocess.CompletedProcess[str]:
        line = json.dumps({"moment": moment, "flags": flags(data, tmp_path / name, **options)})
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        return subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), line], capture_output=True, text=True, timeout=300, check=False
        )

    done = run("whole", {})
    assert done.returncode == 0, done.stderr[-3000:]
    stopped = run("parts", {"update": 4, "signal": signal.SIGTERM, "rank": 1})
    assert stopped.returncode != 0 and stopped.stdout.count("Stopped at update 4") == 2
    assert checkpoints(tmp_path / "parts") == ["checkpoint-4"]
    # The second process has not written its random state
    assert run("parts", {"event": "os.mkdir", "path": "checkpoint-8", "rank": 1}).returncode != 0
    assert [path.name for path in complete_checkpoints(tmp_path / "parts")] == ["checkpoint-4"]
    full = run("parts", {"event": "open", "path": "checkpoint-10/config.json", "largest_file": 4096, "rank": 0})
    assert full.returncode != 0 and f"{tmp_path}/parts/checkpoint-10 cannot be written" in full.stderr
    assert [path.name for path in complete_checkpoints(tmp_path / "parts")] == ["checkpoint-4", "checkpoint-8"]
    done = run("parts", {})
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_is_complete_once_its_state_is_written_whole(tmp_path):
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / "checkpoint-best").mkdir()  # a user's own
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 1')
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9"]
    remove_incomplete_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-9", "checkpoint-best"]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, "", [2, 4, 6, 8, 10]), (3, "", [6, 8, 10]), (2, 4, [4, 8, 10]), (1, 4, [4, 10]), (1, 10, [10])],
)
def test_the_last_checkpoints_by_number_are_kept_and_the_best_beside_them(tmp_path, limit, best, kept):
    for age, step in enumerate((10, 2, 8, 4, 6)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (age, age))
    rotate_checkpoints(tmp_path, limit, f"checkpoint-{best}")
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in kept]

"""Two processes, started by torchrun, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent / "scripts" / "train_tiny.py"


def launch(folder: Path, processes: int, *options: str) -> list[dict]:
    """Train the tiny model of the script and return what every rank reports."""
    command = [sys.executable, str(SCRIPT), str(folder), *options]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = launcher + command[1:]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["tests", "."])}
    done = subprocess.run(
        command, cwd=SCRIPT.parents[2], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_all_ranks_get_the_profile_of_the_first_rank(tmp_path):
    """Rank 0's first batch is the first batch of one process that sees rank 0's half of the data."""
    one = launch(tmp_path / "one", 1, "--learning_rate=0")
    two = launch(tmp_path / "two", 2, "--learning_rate=0")
    assert two[0]["first_batch"] == one[0]["first_batch"], "the comparison needs the same batch"
    assert two[0]["first_batch"] != two[1]["first_batch"]
    assert two[0]["omega"] == two[1]["omega"] == one[0]["omega"]
    assert min(two[0]["omega"]) > 1


@pytest.mark.slow
def test_ranks_stay_identical_while_they_train(tmp_path):
    two = launch(tmp_path, 2)
    assert two[0]["weights"] == two[1]["weights"]
    assert two[0]["omega"] == two[1]["omega"]
    assert (tmp_path / "residual_profile.json").exists()

"""run_translation.py says how long OpenMP's threads spin, before PyTorch is imported, which reads it once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "run_translation.py"
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

# Ends at the import of PyTorch, with the variables of that moment
WATCH = """
import json, os, runpy, sys

class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(json.dumps({name: os.environ[name] for name in sys.argv[3:] if name in os.environ}), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
runpy.run_path(sys.argv[1], run_name=sys.argv[2])
"""


@pytest.mark.parametrize(
    ("run_name", "given", "expected"),
    [
        ("__main__", {}, {"GOMP_SPINCOUNT": "10000"}),
        ("__main__", {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ("__main__", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("run_translation", {}, {}),
    ],
)
def test_threads_spin_for_less_time_unless_the_environment_says_how_they_wait(run_name, given, expected):
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    command = [sys.executable, "-c", WATCH, str(SCRIPT), run_name, *NAMES]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=SCRIPT.parent)
    assert json.loads(result.stdout) == expected

"""Start-up: of an import, and of a command until the first update, each in fresh interpreters."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig, MarianConfig

from training.embedded_data import generate_pairs
from training.tokenization import save_tokenizer, train_tokenizer

from .first_update import REPO
from .record import Settings, conditions, cost
from .turns import Measured


TITLE = "Start-up"
ABOUT = (
    "`import admin_hf` against the import of Marian from Transformers, and the demo (`hub_configs/demo`, with cached "
    "data and a trained tokenizer) from the command's start to its first update: the steps of run_translation.py, "
    "including profiling, against a script of stock parts. The ratios say which share of stock's time this project "
    "needs:"
)
IMPORTS = {
    "import admin_hf": "import admin_hf",
    "import Marian": "from transformers import MarianConfig, MarianMTModel",
}


def measure(settings: Settings, pairs: int = 10_000, vocab_size: int = 2000) -> dict[str, Any]:
    """Time the four commands; the demo's has so many pairs, and a tokenizer of this size."""
    commands = {name: ["-c", code] for name, code in IMPORTS.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, pairs, vocab_size)
        updates = {f"{kind}, first update": kind for kind in ("ours", "stock")}
        commands |= {name: ["-m", "benchmarks.first_update", kind, str(folder)] for name, kind in updates.items()}
        measured: dict[str, Measured] = {name: {"seconds": []} for name in commands}
        for command in commands.values():  # which fills the caches of files and of data
            run(command, settings.threads)
        for name in tqdm([*commands] * settings.rounds, desc="startup", unit="turn"):
            measured[name]["seconds"].append(run(commands[name], settings.threads))
    figures = [cost("import", measured, *IMPORTS), cost("first update", measured, *updates)]
    return conditions(settings) | {"pairs": pairs, "vocab_size": vocab_size, "measured": measured, "figures": figures}


def run(command: list[str], threads: int) -> float:
    """The seconds that a command of Python's takes.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, *command], cwd=REPO, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if result.returncode:
        raise RuntimeError(f"python {' '.join(command)} failed:\n{result.stderr}")
    return seconds


def prepare(folder: Path, pairs: int, vocab_size: int) -> None:
    """Write generated pairs as JSON lines, a tokenizer for them and the stock model's configuration."""
    generated = generate_pairs(pairs, seed=1)
    rows = ({"translation": {"en": english, "de": german}} for english, german in generated)
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    (folder / "train.json").write_text(lines, encoding="utf-8")
    tokenizer = train_tokenizer(map(list, generated), vocab_size)
    save_tokenizer(tokenizer, folder / "tokenizer")
    config = AutoConfig.from_pretrained(REPO / "hub_configs" / "demo").to_dict()
    config |= {"model_type": "marian", "vocab_size": vocab_size, "decoder_vocab_size": vocab_size}
    special = dict.fromkeys(("pad_token_id", "decoder_start_token_id"), tokenizer.pad_token_id)
    config |= special | {"eos_token_id": tokenizer.eos_token_id}
    MarianConfig.from_dict(config).save_pretrained(folder / "stock")

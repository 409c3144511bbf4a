import json
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from admin_hf import KeepFreedMemory, allocator
from admin_hf.allocator import ALIGN, KERNEL_CACHES, M_MMAP_MAX, M_MMAP_THRESHOLD


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")

FAULTS = """
import resource, sys, torch
from admin_hf.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [torch.ones(2**24) for _ in range(4)]  # 64 MiB each
    del buffers
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[4:]))
"""

KERNELS = """
import ctypes, sys, torch
from types import SimpleNamespace
from admin_hf import KeepFreedMemory

if sys.argv[1] == "limit":
    KeepFreedMemory().on_train_begin(SimpleNamespace(device=torch.device("cpu")), None, None)

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
weight, used = torch.ones(128, 128, dtype=torch.bfloat16), []
for rows in range(1000, 1300):
    torch.ones(rows, 128, dtype=torch.bfloat16) @ weight
    used.append(mallinfo().uordblks)
print(used[-1] - used[100])
"""

# Where the heap ends is what sbrk says; buffers that are mapped lie behind it
PLACES = """
import ctypes, json, sys

if sys.argv[1] == "map":
    import training.aligned  # before PEFT makes the first tensor
    from admin_hf.allocator import map_large_buffers

    assert map_large_buffers()

from admin_hf.allocator import KeepFreedMemory

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1024, 1024))  # 4 MiB

    def forward(self, x, labels=None):
        return {"loss": (x @ self.weight).square().mean()}

def in_heap(x):
    sbrk = ctypes.CDLL(None).sbrk
    sbrk.restype = ctypes.c_void_p
    return x.data_ptr() < sbrk(0)

model = Square()
trainer = Trainer(
    model,
    TrainingArguments(sys.argv[2], max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True),
    train_dataset=[{"x": torch.ones(1024), "labels": 0}] * 16,
    callbacks=[KeepFreedMemory()],
)
before = torch.ones(2**20)
trainer.train()
stays = [model.weight, *(x for x in trainer.optimizer.state[model.weight].values() if x.numel() > 1)]
after = torch.ones(2**20)
offsets = [x.data_ptr() % 4096 for x in (*stays, before, after)]
print(json.dumps({"stays": [in_heap(x) for x in stays], "before": in_heap(before), "after": in_heap(after),
                  "offsets": offsets}))
"""

# What run_translation.py makes of --keep_freed_memory
TRAINER = """
import json, os, sys
from pathlib import Path
from benchmarks import systems
from admin_hf.allocator import ALIGN, KeepFreedMemory

shape = systems.Shape(d_model=8, ffn=8, heads=2, layers=1, vocab_size=20)
options = systems.training_options(Path(sys.argv[2]), "float32", use_cpu=True)
arguments = systems.our_arguments(shape, options, keep_freed_memory=sys.argv[1])
trainer = systems.our_trainer(arguments, systems.word_tokenizer(20), [])

import torch

buffers = [torch.ones(2**20) for _ in range(4)]
print(json.dumps({"callback": any(isinstance(x, KeepFreedMemory) for x in trainer.callback_handler.callbacks),
                  "aligned": not any(x.data_ptr() % 4096 for x in buffers), "inherited": ALIGN in os.environ}))
"""


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    env = {name: value for name, value in os.environ.items() if name not in (ALIGN, *KERNEL_CACHES)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.splitlines()[-1]


def test_freed_buffers_are_used_again_without_page_faults():
    faults = {mode: int(run(FAULTS, mode)) for mode in ("keep", "give back")}
    assert faults["give back"] > 4 * 2**26 / 2**21  # at least one for each page, however large pages are
    assert faults["keep"] < 10


def test_what_stays_is_mapped_and_what_comes_and_goes_is_in_the_heap(tmp_path):
    places = json.loads(run(PLACES, "map", str(tmp_path)))
    assert places["stays"] == [False] * 3  # weight and two averages of Adam
    assert not places["before"] and places["after"]
    assert places["offsets"] == [0] * 5, "aligned to pages"


def test_without_it_buffers_have_odd_addresses(tmp_path):
    assert any(json.loads(run(PLACES, "leave", str(tmp_path)))["offsets"])


@pytest.mark.parametrize("keep", [True, False])
def test_training_does_so_unless_a_flag_says_no(tmp_path, keep):
    seen = json.loads(run(TRAINER, str(keep), str(tmp_path)))
    assert seen == {"callback": keep, "aligned": True, "inherited": False}


def test_kernels_of_former_shapes_are_forgotten():
    grown = {mode: int(run(KERNELS, mode)) for mode in ("limit", "leave")}
    if grown["leave"] < 10**7:
        pytest.skip("this processor needs no kernel for a shape in bfloat16")
    assert grown["limit"] < 10**6


def test_the_environment_says_how_many_kernels_are_kept(monkeypatch):
    monkeypatch.setattr(os, "environ", {KERNEL_CACHES[0]: "7"})
    allocator.limit_kernel_caches()
    assert os.environ == {KERNEL_CACHES[0]: "7", KERNEL_CACHES[1]: "64"}


def settings_of_a_run(device: str, monkeypatch) -> list[set[int]]:
    """The settings that the callback changes in a training of two updates, and in one after it."""
    changed: list[set[int]] = []
    monkeypatch.setattr(allocator, "_mallopt", lambda values: changed.append({*values}) or True)
    monkeypatch.setattr(allocator, "limit_kernel_caches", lambda: None)
    callback, run = KeepFreedMemory(), (SimpleNamespace(device=torch.device(device)), None, None)
    for _ in range(2):
        callback.on_train_begin(*run)
        callback.on_optimizer_step(*run)
        callback.on_prediction_step(*run)
    return changed


def test_the_callback_alone_maps_what_stays_before_it_keeps_what_is_freed(monkeypatch):
    first, second = settings_of_a_run("cpu", monkeypatch)
    assert first == {M_MMAP_THRESHOLD} and M_MMAP_MAX in second


def test_the_callback_does_nothing_on_another_device(monkeypatch):
    assert settings_of_a_run("cuda", monkeypatch) == []


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert settings_of_a_run("cpu", monkeypatch) == []
    assert not allocator.map_large_buffers() and not allocator.keep_freed_memory()

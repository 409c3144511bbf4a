import platform
import subprocess
import sys

import pytest


SCRIPT = """
import resource, sys, torch
from training.allocator import keep_freed_memory

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back like this")
def test_freed_buffers_are_used_again_without_page_faults():
    faults = {
        mode: int(
            subprocess.run([sys.executable, "-c", SCRIPT, mode], check=True, capture_output=True, text=True).stdout
        )
        for mode in ("keep", "give back")
    }
    assert faults["give back"] > 4 * 2**26 / 2**21  # at least one for each page, however large pages are
    assert faults["keep"] < 10

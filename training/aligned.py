"""Importing this first lets PyTorch align large buffers to pages: it looks once, at its first tensor.

Others make that tensor while they are imported: Transformers imports PEFT where it is installed, and PEFT makes one.
"""

import os
import sys


ALIGN = "THP_MEM_ALLOC_ENABLE"  # as in admin_hf.allocator, whose import comes too late

if sys.platform == "linux" and ALIGN not in os.environ:
    os.environ[ALIGN] = "1"
    import torch

    torch.empty(1)  # now it has looked, and processes that this one starts need not inherit it
    del os.environ[ALIGN]

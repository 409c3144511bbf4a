"""Finds where the host reads what a GPU computes, and so waits for it; works on a CPU, where nothing would show it."""

import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


# Calls from Python, of which some (`tolist`) reach no operator on a CPU, and the operators that other calls end in
CALLS = {"item", "tolist", "numpy", "cpu", "equal", "nonzero", "is_nonzero", "masked_select", "__array__"}
CALLS |= {"__float__", "__bool__", "__int__", "__index__", "__format__"}
OPERATORS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"}

ROOT, HERE = Path(__file__).parents[1], str(Path(__file__))
LATE_VALUES = str(ROOT / "training" / "late_values.py")
# Code that is the same on a GPU. The model itself reads on a CPU alone, to check ids and masks, so it is left out
WATCHED = (
    str(ROOT / "training"),
    str(Path(transformers.__file__).parent / "trainer.py"),
    str(Path(accelerate.__file__).parent),
)
TORCH = str(Path(torch.__file__).parent)


class HostReads(TorchFunctionMode):
    """Notes every read of a tensor while it is active, by the innermost caller outside PyTorch, if that is watched.

    All tensors count as those of a GPU, but for copies by `LateValues` of an earlier activation, which have arrived.

    Attributes:
        found: of every activation, the reads as "file:line call".
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[str]] = []
        self._copies: list[Tensor] = []
        self._arrived: list[Tensor] = []
        self._operators = _Operators(self)

    def __enter__(self) -> "HostReads":
        self.found.append([])
        self._arrived, self._copies = self._arrived + self._copies, []
        self._operators.__enter__()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._operators.__exit__(*args)

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(call, "__name__", "")
        if name == "to" and "cpu" in [place for place in (*args[1:], *kwargs.values()) if isinstance(place, str)]:
            name = "cpu"  # by name; as a `torch.device` it is the one that stands for a GPU
        result = call(*args, **kwargs)
        if name == "cpu" and _caller().f_code.co_filename == LATE_VALUES:  # which does not wait on a GPU
            self._copies.append(result)
        elif name in CALLS and not any(args[0] is copy for copy in self._arrived):
            self.note(name)
        return result

    def note(self, name: str) -> None:
        caller = _caller()
        if caller.f_code.co_filename.startswith(WATCHED):
            self.found[-1].append(f"{caller.f_code.co_filename}:{caller.f_lineno} {name}")


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator._schema.name in OPERATORS:
            self.reads.note(operator._schema.name)
        return operator(*args, **(kwargs or {}))


def _caller() -> Any:
    frame = sys._getframe(1)
    while frame.f_code.co_filename == HERE or frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    return frame

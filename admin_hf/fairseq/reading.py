"""A fairseq checkpoint as data, read without fairseq and without running code of the file."""

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor


Option = TypeVar("Option", bool, int, float, str)


class _Meter:
    """Stands in for fairseq's own classes in a checkpoint, which hold speeds and mean losses."""


# What a checkpoint may contain besides tensors and plain data
_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (argparse.Namespace, "argparse.Namespace"),
    *((_Meter, f"fairseq.meters.{name}") for name in ("AverageMeter", "TimeMeter", "StopwatchMeter")),
]


@dataclass(frozen=True)
class FairseqCheckpoint:
    """The parts of a checkpoint that a conversion needs.

    Attributes:
        weights: tensors by fairseq's names, such as `encoder.layers.0.fc1.weight`.
        options: fairseq's arguments, such as `encoder_attention_heads`.
    """

    weights: Mapping[str, Tensor]
    options: Mapping[str, Any]

    def option(self, name: str, default: Option) -> Option:
        """An argument, or `default` if it is unset.

        Raises:
            ValueError: its type is not that of `default`.
        """
        value = self.options.get(name)
        if value is None:
            return default
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise ValueError(
                f"The checkpoint's argument {name} is {value!r:.100}; expected a {type(default).__name__}."
            )
        return value


def read_checkpoint(path: str | os.PathLike) -> FairseqCheckpoint:
    """Read a checkpoint of fairseq or Transformer-Clinic, in any of their file formats.

    The pickle in it is read with an allow-list: tensors, plain data, arguments and meters. Anything else is refused
    before it could run.

    Raises:
        OSError: the file is missing, damaged, truncated, or contains anything else.
        ValueError: it is not a fairseq checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; expected fairseq's, such as checkpoint_best.pt.")
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file can break any line that reads it
        if named := re.search(r"(?i)unsupported global(?:: GLOBAL)? ([\w.]+)", str(error)):
            raise OSError(
                f"{path} is refused: it names {named[1]}, which no checkpoint of fairseq does and which might run "
                "code."
            ) from error
        raise OSError(
            f"{path} cannot be read ({type(error).__name__}): it is truncated, damaged, or not a checkpoint of "
            "PyTorch."
        ) from error
    options = _options(state)
    weights = state.get("model") if isinstance(state, dict) else None
    if options is None or not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} is not a checkpoint of fairseq: it has no weights `model` with arguments `args`.")
    for name, value in weights.items():
        if not (isinstance(name, str) and _is_plain(value)):
            raise ValueError(
                f"{path} contains {name!r:.100} as something other than a tensor of floating-point numbers."
            )
    return FairseqCheckpoint(weights, options)


def _options(state: Any) -> dict[str, Any] | None:
    """The arguments: `args` or, since fairseq 0.10, the parts of `cfg`."""
    if not isinstance(state, dict):
        return None
    cfg = state.get("cfg") if state.get("args") is None else {"model": state["args"]}
    if not isinstance(cfg, dict):
        return None
    options: dict[str, Any] = {}
    for part in (cfg.get("criterion"), cfg.get("model")):
        options |= vars(part) if isinstance(part, argparse.Namespace) else part if isinstance(part, dict) else {}
    return options


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that contains as many numbers as its shape says."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return value.is_floating_point() and value.untyped_storage().nbytes() >= value.numel() * value.element_size()

"""The mean of the weights of a run's last checkpoints, which translates better than the last one alone.

Vaswani et al. (2017, section 6.1) average the last 5 or 20 checkpoints, the Admin paper those of the last 10 epochs.
Average first, then export: ω is folded into other weights, so the mean of vanilla models is not the vanilla model of
the mean.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from ..checkpoints import check_weight_files, explained_errors, weight_files


# Entries of config.json that may differ between checkpoints: they change neither the weights nor the outputs.
_FREE = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "init_std", "label_smoothing"),
    *("dropout", "attention_dropout", "activation_dropout", "classifier_dropout"),
    *("encoder_layerdrop", "decoder_layerdrop"),
}

# Entries that are summed at once: 2 MB in float64.
_BLOCK = 2**18


class _Stored(NamedTuple):
    """Where a tensor of a checkpoint is, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def average_checkpoints(checkpoints: Sequence[str | os.PathLike]) -> dict[str, Tensor]:
    """Average the weights of checkpoints of one model with any architecture.

    Sums are in float64. The checkpoints are compared before any weight is read. They are read in small parts, so the
    memory needed is little more than that of the mean, whatever their number.

    Args:
        checkpoints: folders, each with a config.json and its weights in safetensors files, one or several.

    Returns:
        The mean of each tensor by name, in the shape and dtype of the checkpoints. Tied copies, which checkpoints do
        not contain, are left out. Tensors of integers are those of the checkpoints.

    Raises:
        OSError: a folder, its config.json or a file of its weights is missing, damaged, or a pickle.
        ValueError: no checkpoints; a config.json of another model; tensors of other names, shapes or dtypes; integers
            that differ; NaN or infinite entries.

    Example:

    ```python
    average = average_checkpoints(last_checkpoints("runs/en-de", 10))
    model.load_state_dict(average, strict=False)  # tied copies and positions are never saved
    ```
    """
    folders = [Path(checkpoint) for checkpoint in checkpoints]
    if not folders:
        raise ValueError("There are no checkpoints to average: name at least one.")
    _check_configs(folders)
    stored = [_stored_tensors(folder) for folder in folders]
    for name in {name for tensors in stored for name in tensors if name.endswith("omega_profiled")}:
        if not all(name in tensors for tensors in stored):  # some are of an earlier version
            for tensors in stored:
                tensors.pop(name, None)
    _check_same_tensors(folders, stored)
    return {name: _average(name, [tensors[name] for tensors in stored]) for name in stored[0]}


def _check_configs(folders: list[Path]) -> None:
    first = _read_config(folders[0])
    for folder in folders[1:]:
        config = _read_config(folder)
        for key in sorted((first.keys() | config.keys()) - _FREE):
            if (value := config.get(key)) != (expected := first.get(key)):
                raise ValueError(
                    f"{folder} contains another model than {folders[0]}: {key} is {value!r} in its config.json, "
                    f"expected {expected!r}."
                )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {folder}.")
    with explained_errors(folder):
        config, _ = PretrainedConfig.get_config_dict(folder)
    if not config or not isinstance(config, dict):
        raise OSError(f"{folder} has no config.json with the fields of a model.")
    return config


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """The tensors of a checkpoint, from the headers of its files alone."""
    tensors = {}
    with explained_errors(folder):
        check_weight_files(folder)
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():
                    part = weights.get_slice(name)
                    tensors[name] = _Stored(file, tuple(part.get_shape()), part.get_dtype())
    return tensors


def _check_same_tensors(folders: list[Path], stored: list[dict[str, _Stored]]) -> None:
    for folder, tensors in zip(folders, stored, strict=True):
        for name in sorted(stored[0].keys() ^ tensors.keys()):
            has, lacks = (folder, folders[0]) if name in tensors else (folders[0], folder)
            raise ValueError(f"{lacks} has no tensor {name}, which {has} has.")
        for name, expected in stored[0].items():
            for what in ("shape", "dtype"):
                if (value := getattr(tensors[name], what)) != getattr(expected, what):
                    raise ValueError(
                        f"{name} has the {what} {value} in {folder}, expected {getattr(expected, what)} as in "
                        f"{folders[0]}."
                    )


def _average(name: str, stored: list[_Stored]) -> Tensor:
    files = [tensor.file for tensor in stored]
    average = torch.empty_like(_read(name, files[0]))
    combine = _mean if average.is_floating_point() else _common
    for start in range(0, len(average), _BLOCK):
        block = slice(start, start + _BLOCK)
        average[block] = combine(name, files, block)
    return average.view(stored[0].shape)


def _read(name: str, file: Path) -> Tensor:
    """A tensor as one row. It is mapped: entries take memory from their use to the end of the last reference."""
    with explained_errors(file.parent), safe_open(file, framework="pt") as weights:
        return weights.get_tensor(name).flatten()


def _mean(name: str, files: list[Path], block: slice) -> Tensor:
    total = torch.tensor(-0.0, dtype=torch.float64)  # −0 + x is x, also where x is −0
    for file in files:
        part = _read(name, file)[block].double()
        if not bool(part.isfinite().all()):
            raise ValueError(f"The checkpoint {file.parent} has NaN or infinite entries in {name}.")
        total = total + part
    return total / len(files)


def _common(name: str, files: list[Path], block: slice) -> Tensor:
    value = _read(name, files[0])[block]
    for file in files[1:]:
        if not torch.equal(_read(name, file)[block], value):
            raise ValueError(
                f"{name} is not a floating-point tensor, and differs between {files[0].parent} and {file.parent}."
            )
    return value

"""Folders of weights: a stranger's is bad input until it is read, ours is written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn


# Without one of these no loader finds a model, so they come last when a folder is written.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@contextmanager
def replaced_model(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder whose files take the place of the model in `folder` at the end.

    An error, a full disk or a killed process before the end leaves `folder` as it was. While the files are moved, it
    holds no weights, so that nothing can load half of the old model and half of the new. Files of other names stay.

    Raises:
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to write the model to.")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".export-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield staging
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for name in _WEIGHTS:
            (folder / name).unlink(missing_ok=True)
        for shard in folder.glob("model-*-of-*.safetensors"):
            shard.unlink()
        for path in sorted(staging.iterdir(), key=lambda path: path.name in _WEIGHTS):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def explained_errors(source: str | os.PathLike | None) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint is read into one sentence that names it.

    Raises:
        OSError: weights that are truncated, damaged or pickled, or a damaged index of shards.
        ValueError: a config.json with values of the wrong type.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"The weights of {source} are truncated or damaged: {error}.") from error
    except StrictDataclassError as error:
        raise ValueError(f"The config.json of {source} cannot be used: {' '.join(str(error).split())}") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise OSError(f"The index of the weights of {source} is damaged: {error!r}.") from error
    except OSError as error:
        if source is not None and (pickles := sorted(Path(source).glob("pytorch_model*.bin"))):
            raise OSError(
                f"{source} holds its weights as a pickle ({pickles[0].name}), which can run code, and is refused: ask "
                "for safetensors, or pass use_safetensors=False if you trust where it comes from."
            ) from error
        raise


def check_finite(model: nn.Module, subject: str) -> None:
    """Raise a ValueError that names the first weight of `model` with a NaN or infinite entry."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
            raise ValueError(f"{subject} has NaN or infinite entries in {name}.")

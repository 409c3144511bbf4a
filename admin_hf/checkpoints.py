"""Files of models and runs: nothing that is read is trusted, and files are written completely or not at all."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, is_sentencepiece_available


# Without one of these no loader finds a model, so they come last when a folder is written.
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)

# Files that must not be next to a model's weights: those of another model, and adapters that a loader would add.
REPLACED = (*_WEIGHTS, "model-*-of-*.safetensors", "adapter_config.json", "adapter_model*")

# The arguments of from_pretrained that say where a checkpoint comes from.
_ORIGIN = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


# --- writing --------------------------------------------------------------------------------------


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file and make its folder. After a crash or with a full disk, the old file is kept, never half a file."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Yield a file for bytes. At the end it is moved to its place, in a folder that is made; not after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            yield file
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@contextmanager
def replaced_model(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder whose content replaces the model in `folder` at the end.

    After an error, with a full disk or if the process is killed before the end, `folder` is unchanged. While the files
    are moved, it contains no weights, so nothing can load a mix of the old and the new model. Other files are kept.

    Raises:
        OSError: `folder` is a file, or its files cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to write the model to.")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".export-*"):  # of a killed process; a newer one may be in use
        if leftover.stat().st_mtime < time.time() - 3600:
            shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield staging
        _move(staging, folder)
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()


def _move(staging: Path, folder: Path) -> None:
    staged = sorted(staging.iterdir(), key=lambda path: path.name in _WEIGHTS)
    for path in staged:
        target = folder / path.name
        if target.exists() and target.is_dir() != path.is_dir():
            raise FileExistsError(f"{target} is in the way: remove it, or name another folder.")
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if any(path.name in _WEIGHTS for path in staged):
        for pattern in REPLACED:
            for old in folder.glob(pattern):
                old.unlink()
    for path in staged:
        if (target := folder / path.name).is_dir():
            shutil.rmtree(target)
        path.replace(target)


# --- reading --------------------------------------------------------------------------------------


@contextmanager
def explained_errors(source: str | os.PathLike | None) -> Iterator[None]:
    """Turn errors while a checkpoint is read into one sentence that names the checkpoint.

    Raises:
        OSError: files are missing, truncated, damaged or pickled.
        ValueError: config.json has values of the wrong type.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"The weights of {source} are truncated or damaged: {error}.") from error
    except StrictDataclassError as error:
        raise ValueError(f"The config.json of {source} cannot be used: {one_line(error)}") from error
    except (ValueError, RuntimeError, ImportError):
        raise
    except OSError as error:
        pickles = sorted(Path(source or "").glob("pytorch_model*.bin"))
        if source is not None and pickles and not any(Path(source).glob("*.safetensors")):
            raise OSError(
                f"{source} has its weights in a pickle ({pickles[0].name}), which can run code, and is refused: ask "
                "for safetensors or, if you trust its source, load it with use_safetensors=False and save it again."
            ) from error
        raise
    except Exception as error:  # untrusted JSON can break any line that reads it
        raise OSError(f"{source} cannot be read: {type(error).__name__}: {one_line(error)}") from error


@contextmanager
def sentencepiece_named() -> Iterator[None]:
    """Turn the errors of Transformers about a missing sentencepiece into one sentence.

    Raises:
        ImportError: a tokenizer needs sentencepiece, and it is not installed.
    """
    try:
        yield
    except Exception as error:
        if is_sentencepiece_available() or "sentencepiece" not in str(error).lower():
            raise
        raise ImportError("it needs the package sentencepiece (pip install sentencepiece).") from error


def check_source(source: str | os.PathLike) -> None:
    """Raise a FileNotFoundError for a path that does not exist, before it is looked for on the Hub."""
    if not Path(source).exists() and (str(source).count("/") > 1 or str(source).startswith((".", "/"))):
        raise FileNotFoundError(f"There is no {source}: expected a checkpoint, or a config.json or its folder.")


def one_line(error: Exception) -> str:
    """The message of an error, as one readable sentence."""
    return " ".join(str(error).split())


def check_weight_files(source: str | os.PathLike, **options: Any) -> dict[str, str]:
    """Check the weight files of a checkpoint before the loader reads and casts them.

    Args:
        source: folder or Hub id.
        options: the arguments of `from_pretrained`.

    Returns:
        The names of tensors that are not floating-point numbers, and their types.

    Raises:
        OSError: an index of shards names anything but safetensors files in the same folder.
    """
    origin = {name: options[name] for name in _ORIGIN if options.get(name) is not None}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}

    def find(name: str) -> str | None:
        return cached_file(source, name, **origin, **quiet)

    shards = {SAFE_WEIGHTS_NAME}
    if find(SAFE_WEIGHTS_NAME) is None and (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        shards = _shards(Path(index), source)
    dtypes: dict[str, str] = {}
    for path in filter(None, map(find, sorted(shards))):
        with safe_open(path, framework="pt") as weights:
            dtypes |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    return {name: dtype for name, dtype in dtypes.items() if dtype not in ("F64", "F32", "F16", "BF16")}


def _shards(index: Path, source: str | os.PathLike) -> set[str]:
    """The names of the files that an index of weights names.

    Raises:
        OSError: it is damaged, or names anything but safetensors files in its folder.
    """
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"The index of the weights of {source} is damaged: {error!r}.") from error
    for shard in shards:
        if not (isinstance(shard, str) and shard.endswith(".safetensors") and Path(shard).name == shard):
            raise OSError(f"The index of the weights of {source} names {shard!r}, which is not a safetensors file.")
    return shards


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The safetensors files with the weights in a folder: one, or the shards that its index names.

    Raises:
        OSError: there are none, a shard is missing, or the index is damaged.
    """
    folder = Path(folder)
    names = [SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_NAME).exists() and (index := folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        names = sorted(_shards(index, folder))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no file named {name}, which its weights should be in.")
    return [folder / name for name in names]


def has_weights(folder: str | os.PathLike) -> bool:
    """Whether a folder contains weights as safetensors, in one file or in shards with an index."""
    return any(Path(folder, name).is_file() for name in _WEIGHTS)


def says_profiled(folder: str | os.PathLike) -> bool | None:
    """Whether the model in a folder was profiled; None if its weights do not say it, or there are none."""
    for path in weight_files(folder) if has_weights(folder) else []:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                if name.rpartition(".")[2] == "omega_profiled":
                    return bool(weights.get_tensor(name))
    return None


def check_finite(model: nn.Module, subject: str) -> None:
    """Raise a ValueError that names the first weight of `model` with a NaN or infinite entry."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
            raise ValueError(f"{subject} has NaN or infinite entries in {name}.")

"""The inputs of an analysis: a model, fresh or trained, and a batch of text or of random tokens."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoints import check_source, check_weight_files, explained_errors, sentencepiece_named, weight_files
from ..configuration_admin import AdminConfig
from ..modeling_admin import AdminForConditionalGeneration
from ..observation import Places, modes_restored, observed_connections, run_stacks, stack_inputs
from ..pretrained import AdminPreTrainedModel, load_complete
from ..profiling import initialize_omega, profile_residuals
from ..run import complete_checkpoints, saved_checkpoints


Batch = Mapping[str, Tensor]


Stack = TypeVar("Stack")


@dataclass(frozen=True)
class ByStack(Generic[Stack]):
    """The measurements of each stack, by its name, in execution order."""

    stacks: dict[str, Stack]

    @property
    def encoder(self) -> Stack:
        return self.stacks["encoder"]

    @property
    def decoder(self) -> Stack:
        return self.stacks["decoder"]

    def verdict(self) -> str:
        """One sentence on each stack."""
        return " ".join(f"{name.capitalize()} {cast(Any, stack).verdict()}" for name, stack in self.stacks.items())


# --- models ---------------------------------------------------------------------------------------


def load_model(source: str | os.PathLike, seed: int = 0, batch: Batch | None = None) -> AdminForConditionalGeneration:
    """Load a checkpoint; or, from a configuration alone, initialise a model as training does, including ω.

    The model is in evaluation mode and float32. The random state is not changed.

    Args:
        source: folder of a checkpoint or its id on the Hub, or a config.json (or its folder) without weights.
        seed: seed of a fresh model's weights.
        batch: the batch to profile a fresh model on; default: random tokens from `seed`.

    Raises:
        OSError: `source` is not there or cannot be read.
        ValueError: its configuration has wrong values, its weights do not belong to its configuration, or it is a run
            that has only checkpoints and no model of its own yet.
    """
    config, folder = load_config(source), Path(source)
    if folder.exists() and not _has_weights(folder):
        if folder.is_dir() and (checkpoints := saved_checkpoints(folder)):
            raise ValueError(
                f"{source} has no weights except those of its checkpoints: name one of them, such as "
                f"{checkpoints[-1]}, or {folder / 'config.json'} for a fresh model."
            )
        return initialized_model(config, seed, batch)
    with torch.random.fork_rng([]):
        model = load_complete(AdminForConditionalGeneration, source, config)
    return cast(AdminForConditionalGeneration, model.float().eval())


def load_config(source: str | os.PathLike) -> AdminConfig:
    """Read the configuration of a source of [`load_model`]; a stock Marian model, which has no ω, is Post-LN.

    Raises:
        OSError: `source` is not there or cannot be read.
        ValueError: the configuration has wrong values.
    """
    check_source(source)
    with explained_errors(source):
        config = AdminConfig.from_pretrained(source)
        if PreTrainedConfig.get_config_dict(source)[0].get("model_type") == "marian":
            config.encoder_residual = config.decoder_residual = "post_ln"
        return config


def initialized_model(config: AdminConfig, seed: int = 0, batch: Batch | None = None) -> AdminForConditionalGeneration:
    """A model before its first update: initialised from `seed`, and with ω profiled on `batch`."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AdminForConditionalGeneration(config)
        if not model.omega_initialized:
            initialize_omega(model, profile_residuals(model, batch or random_batch(config, seed=seed)))
    return cast(AdminForConditionalGeneration, model.eval())


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "pytorch_model*"))


def training_loss(model: AdminForConditionalGeneration, batch: Batch) -> Tensor:
    """The loss that training minimises (with the configured label smoothing), without dropout and LayerDrop."""
    with modes_restored(model):
        model.eval()
        model.training = True  # of the outermost module alone, which chooses the loss
        device = next(model.parameters()).device
        return cast(Tensor, model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss)


@torch.no_grad()
def observe_connections(
    model: AdminPreTrainedModel, batch: Batch, observer: Callable[[str, Places], Callable[..., None]]
) -> None:
    """Run both stacks once without dropout, with observers of their residual connections.

    Args:
        observer: makes the observer of a stack (see [`~admin_hf.observation.observed`]) from its name, `"encoder"` or
            `"decoder"`, and the places of its real tokens.
    """
    inputs, tokens = stack_inputs(model, batch)
    observers = {name: observer(name, places) for name, places in tokens.items()}
    with modes_restored(model), observed_connections(model, observers):
        run_stacks(model.eval(), inputs)


# --- batches --------------------------------------------------------------------------------------


def random_batch(config: AdminConfig, rows: int = 8, length: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Sentences of random tokens, each ending in `</s>` and none padded: `rows` sources and as many targets.

    Example:

    ```python
    >>> from admin_hf import AdminConfig
    >>> from admin_hf.analysis import random_batch

    >>> {name: tuple(tensor.shape) for name, tensor in random_batch(AdminConfig(), rows=2, length=5).items()}
    {'input_ids': (2, 5), 'attention_mask': (2, 5), 'labels': (2, 5)}

    ```
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(length, config.max_position_embeddings)
    eos: Any = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    special = {config.pad_token_id, config.decoder_start_token_id, eos}
    vocabulary = range(min(config.vocab_size, config.decoder_vocab_size or config.vocab_size))  # of both sides
    if not (words := [token for token in vocabulary if token not in special]):
        raise ValueError(f"vocab_size={config.vocab_size} leaves no tokens except the special ones.")
    ids = torch.tensor(words)[torch.randint(len(words), (2, rows, length), generator=generator)]
    if eos is not None:
        ids[:, :, -1] = eos
    return {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "labels": ids[1]}


# Every folder with a tokenizer has one of these
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.spm", "*.model")


def find_tokenizer(*sources: str | os.PathLike, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first source that has a known one; no code of a checkpoint runs.

    Raises:
        ImportError: there is one, but a package that it needs is not installed.
    """
    for source in sources:
        try:
            with sentencepiece_named():
                return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
        except ImportError as error:
            if Path(source).is_dir() and not any(any(Path(source).glob(name)) for name in _TOKENIZER_FILES):
                continue  # Transformers looks for the package before it looks for the files
            raise ImportError(f"The tokenizer {source} cannot be loaded: {error}") from error
        except Exception:  # there is none, a damaged one, or one that brings its own code
            continue
    return None


def text_batch(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], targets: Sequence[str], max_length: int = 128
) -> dict[str, Tensor]:
    """The sentence pairs as one batch, padded on the right with −100 in labels; longer sentences are cut.

    Names of special tokens in them are text.

    Raises:
        ValueError: there are no pairs, or the numbers of sources and targets differ.
    """
    if not sources or len(sources) != len(targets):
        raise ValueError(
            f"There are {len(sources)} sources and {len(targets)} targets; expected the same number of both, at least "
            "one."
        )
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    options |= {"padding_side": "right", "split_special_tokens": True}
    batch = tokenizer(list(sources), **options)
    labels = tokenizer(text_target=list(targets), **options)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": labels["input_ids"].masked_fill(labels["attention_mask"].eq(0), -100),
    }


# --- checkpoints of a run -------------------------------------------------------------------------


def run_checkpoints(source: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run's folder in the order of their updates; a checkpoint's folder gives itself.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: it contains no complete checkpoint.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {folder}.")
    found = complete_checkpoints(folder) or ([folder] if _has_weights(folder) else [])
    if not found:
        raise ValueError(
            f"{folder} has no complete checkpoint: expected a run's folder, with checkpoints such as checkpoint-500."
        )
    return found


def read_tensors(checkpoint: str | os.PathLike, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of the tensors whose names are `wanted`, one at a time, from a folder's safetensors files.

    Raises:
        OSError: the weights are missing, damaged, or a pickle.
    """
    folder = Path(checkpoint)
    with explained_errors(folder):
        check_weight_files(folder)
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():
                    if wanted(name):
                        yield name, weights.get_tensor(name)


def residual_name(model: Any, stack: str) -> str:
    """The readable name of a stack's residual system."""
    injection = getattr(model, "injection", None)
    return str(injection.system if injection is not None else getattr(model.config, f"{stack}_residual"))

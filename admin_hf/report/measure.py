"""The page's own measurements: the run's model at its start and now, on the same sentences."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..analysis.dependency import LayerDependency, layer_dependency
from ..analysis.gradients import GradientNorms, gradient_norms
from ..analysis.inputs import Batch, initialized_model, load_model, observe_connections, random_batch, text_batch
from ..checkpoints import one_line
from ..configuration_admin import AdminConfig
from ..modeling_admin import AdminForConditionalGeneration
from ..observation import Places, variance
from ..profiling import initialize_omega
from ..residual import profiled_connections
from ..run.folder import Run, saved_step
from .text import MAX_LENGTH, SENTENCES, load_tokenizer, read_pairs


# The default seed of Trainer, for runs that do not record theirs
DEFAULT_SEED = 42


@dataclass(frozen=True)
class Moment:
    """The measurements with the weights of one moment of the run.

    Attributes:
        name: the name of the moment, such as `"update 500"`.
        variances: by stack, Var[f_i] and Var[ω_i ⊙ x_{i-1}] of the sub-layers.
    """

    name: str
    dependency: LayerDependency
    gradients: GradientNorms
    variances: dict[str, tuple[list[float], list[float]]]


def measured(model: AdminForConditionalGeneration, batch: Batch, name: str) -> Moment:
    """Measure a model without dropout."""
    return Moment(name, layer_dependency(model, batch), gradient_norms(model, batch), residual_variances(model, batch))


def newest_model(run: Run) -> tuple[AdminForConditionalGeneration, str]:
    """The run's model with its newest weights, and their name on the page.

    Raises:
        OSError, ValueError: there are no weights, or they cannot be read.
    """
    folder = _weights(run)
    return load_model(folder), _name(run, folder)


def _weights(run: Run) -> Path:
    if (folder := run.weights) is None:
        raise FileNotFoundError("The run has saved no weights.")
    return folder


def _name(run: Run, weights: Path) -> str:
    """Which weights of the run they are."""
    if weights == run.folder and len(run.scored) > 1:
        return f"mean of {len(run.scored)} checkpoints"
    step = saved_step(weights)
    return "saved model" if step is None else f"update {step:,}"


def starting_model(run: Run, batch: Batch) -> tuple[AdminForConditionalGeneration, str]:
    """Rebuild the run's model before its first update.

    Args:
        batch: used for a profile if the run has none of its own.

    Returns:
        The model, and a sentence that says how close it is to the run's.

    Raises:
        OSError, ValueError: the run started from other weights or as a stock model, or has saved none yet.
    """
    if source := run.arguments.get("model_name_or_path"):
        raise ValueError(f"The run started from the weights of {source}, which are not part of it.")
    weights = _weights(run)
    if (kind := run.config.get("model_type")) != AdminConfig.model_type:
        raise ValueError(f"The start is not shown: the run trains a stock model ({kind}), which starts differently.")
    config = AdminConfig.from_pretrained(weights)
    seed = run.arguments.get("seed")
    if isinstance(seed, int):
        how = f"initialised again from the run's seed, {seed}"
    else:
        seed, how = DEFAULT_SEED, "another draw of the same initialisation, because the run names no seed"
    model = initialized_model(config, seed, batch)
    if run.is_profiled is False:
        for _, connection in profiled_connections(model):
            connection.omega.data.fill_(1.0)
        model.set_profiled(False)
        how += ", with every ω at 1, because the run was not profiled"
    elif run.profile is not None:
        initialize_omega(model, run.profile)
        how += ", with the ω that the run profiled"
    return model, f"The start is the model {how}."


def batch_of(run: Run) -> tuple[Batch, str]:
    """Sentences of the validation set as a batch, else random tokens, and a sentence that says which.

    Raises:
        OSError, ValueError: the run has no weights, or no usable config.json.
    """
    config = AdminConfig.from_pretrained(_weights(run))
    try:
        if (tokenizer := load_tokenizer(run)) is None:
            raise ValueError("it has no tokenizer that can be loaded.")
        pairs = [pair for pair in read_pairs(run, "validation", SENTENCES) if pair.reference is not None]
        length = min(MAX_LENGTH, config.max_position_embeddings)
        batch = text_batch(tokenizer, [p.source for p in pairs], [str(p.reference) for p in pairs], max_length=length)
    except Exception as error:  # whatever is wrong with the text or tokenizer, random tokens are used
        why = f"Measured on random tokens, because the run's text cannot be used: {one_line(error)}"
        return random_batch(config), why
    return batch, f"Measured on the first {len(pairs)} pairs of the validation set, without dropout."


def residual_variances(model: AdminForConditionalGeneration, batch: Batch) -> dict[str, Any]:
    """Var[f_i] and Var[ω_i ⊙ x_{i-1}] of all sub-layers, by stack: at real tokens, scaled as they are added."""
    variances: dict[str, tuple[list[float], list[float]]] = {}

    def observer(stack: str, tokens: Places) -> Callable[..., None]:
        branches, shortcuts = variances[stack] = ([], [])

        def observe(name: str, connection: nn.Module, args: tuple[Tensor, Tensor], output: Tensor) -> None:
            branches.append(float(variance(args[1], tokens, getattr(connection, "branch_scale", 1.0))))
            shortcuts.append(float(variance(args[0], tokens, getattr(connection, "shortcut_scale", 1.0))))

        return observe

    observe_connections(model, batch, observer)
    return variances

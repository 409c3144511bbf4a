"""Deepening: a trained model gets more layers, copies of its own, and is trained further as Admin."""

import copy
import re
from typing import Any, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .architecture import ARCHITECTURES, STACKS
from .configuration_admin import AdminConfig, admin_fields
from .modeling_admin import AdminForConditionalGeneration


def deepen(
    model: PreTrainedModel, encoder_layers: int | None = None, decoder_layers: int | None = None
) -> AdminForConditionalGeneration:
    """Make a deeper model from a trained one: each layer is followed by copies of itself.

    Layer i of n is a copy of layer ⌊i · m / n⌋ of the old m layers: 3 layers become 0 0 1 1 2 2, or 0 0 1 1 2.
    Embeddings, output layer and its bias, special tokens and generation settings are carried over. Only ω starts
    again, in both stacks, as in a new model of this depth. It is 1 and must be profiled before training (by
    [`AdminProfilingCallback`], or [`profile_residuals`] and [`initialize_omega`]). Without a profile the outputs are
    far from those of the given model; docs/continuing.md has the measurements. The constants of `"deepnorm"` and
    `"admin_uniform"` are those of the new depth.

    Args:
        model: an [`AdminForConditionalGeneration`] with any residual systems, or a stock
            [`~transformers.MarianMTModel`] (or Pegasus, which is Pre-LN). It is not changed.
        encoder_layers: the new depth of the encoder, at least the present one, which is the default.
        decoder_layers: the same for the decoder.

    Returns:
        A new model with its own weights, in the dtype, on the device and in the mode of the given one. If neither
        stack gets deeper it computes the same, including ω.

    Raises:
        ValueError: the model is of another class or has an injected ω, or a stack would get shallower.

    Example:

    ```python
    >>> import torch
    >>> from transformers import MarianConfig, MarianMTModel
    >>> from admin_hf import deepen, initialize_omega, profile_residuals

    >>> config = MarianConfig(vocab_size=100, pad_token_id=99, decoder_start_token_id=99, d_model=32)
    >>> model = deepen(MarianMTModel(config), encoder_layers=24, decoder_layers=24)
    >>> len(model.model.encoder.layers), model.omega_initialized
    (24, False)
    >>> batch = {"input_ids": torch.randint(2, 99, (4, 10)), "labels": torch.randint(2, 99, (4, 12))}
    >>> initialize_omega(model, profile_residuals(model, batch))

    ```
    """
    config = _admin_config(model)
    before, after = new_depths(config), new_depths(config, encoder_layers, decoder_layers)
    for name, layers in after.items():
        setattr(config, f"{name}_layers", layers)
    with torch.random.fork_rng([]):
        result: Any = AdminForConditionalGeneration(config)

    def source(name: str) -> str:
        return re.sub(
            r"\b(encoder|decoder)\.layers\.(\d+)",
            lambda place: f"{place[1]}.layers.{int(place[2]) * before[place[1]] // after[place[1]]}",
            name,
        )

    is_admin = isinstance(model, AdminForConditionalGeneration)
    keeps_omega = is_admin and before == after
    weights, state = model.state_dict(), result.state_dict()
    of_omega = set() if keeps_omega else {n for n in state if n.rpartition(".")[2] in ("omega", "omega_profiled")}
    result.to(device=model.device, dtype=model.dtype)
    result.load_state_dict(state | {name: weights[source(name)] for name in state.keys() - of_omega})
    for connection in result.profiled_connections():
        connection.initialized = before == after and getattr(model, "omega_initialized", True)
    result.generation_config = copy.deepcopy(model.generation_config)
    return cast(AdminForConditionalGeneration, result.train(model.training))


def new_depths(
    config: PretrainedConfig, encoder_layers: int | None = None, decoder_layers: int | None = None
) -> dict[str, int]:
    """The new number of layers of each stack, by its name; default: the present number.

    Raises:
        ValueError: the number is lower than the present one.
    """
    depths = {name: int(getattr(config, f"{name}_layers")) for name in STACKS}
    for name, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        if layers is not None and layers < depths[name]:
            raise ValueError(f"{name}_layers={layers} is less than the {depths[name]} that the model has.")
        depths[name] = depths[name] if layers is None else layers
    return depths


def _admin_config(model: PreTrainedModel) -> AdminConfig:
    """A copy of the model's configuration, as that of an Admin model."""
    if isinstance(model, AdminForConditionalGeneration):
        return copy.deepcopy(model.config)
    if getattr(model, "injection", None) is not None:
        raise ValueError("The model has an injected ω: deepen the model that `reparameterize` returns.")
    if not isinstance(model, tuple(architecture.translation for architecture in ARCHITECTURES.values())):
        raise ValueError(
            f"{type(model).__name__} cannot be deepened; expected an AdminForConditionalGeneration, or a stock "
            "MarianMTModel or PegasusForConditionalGeneration."
        )
    return AdminConfig.from_dict(admin_fields(model.config))


__all__ = ["deepen", "new_depths"]

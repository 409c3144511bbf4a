"""The measurements of the paper, as functions that return plain data. `python -m admin_hf analyze` draws it."""

from .dependency import LayerDependency, layer_dependency
from .gradients import GradientNorms, gradient_norms
from .inputs import (
    initialized_model,
    load_config,
    load_model,
    random_batch,
    read_tensors,
    run_checkpoints,
    text_batch,
    training_loss,
)
from .omega import OmegaHistory, omega_history
from .output_change import OutputChange, output_change
from .updates import UpdateNorms, update_norms


__all__ = [
    "GradientNorms",
    "LayerDependency",
    "OmegaHistory",
    "OutputChange",
    "UpdateNorms",
    "gradient_norms",
    "initialized_model",
    "layer_dependency",
    "load_config",
    "load_model",
    "omega_history",
    "output_change",
    "random_batch",
    "read_tensors",
    "run_checkpoints",
    "text_batch",
    "training_loss",
    "update_norms",
]

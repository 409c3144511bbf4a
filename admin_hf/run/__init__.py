"""A training run on disk: its folder, its checkpoints, and the mean of their weights."""

from .averaging import average_checkpoints
from .folder import Run, complete_checkpoints, is_checkpoint_name, last_checkpoints, saved_checkpoints


__all__ = [
    "Run",
    "average_checkpoints",
    "complete_checkpoints",
    "is_checkpoint_name",
    "last_checkpoints",
    "saved_checkpoints",
]

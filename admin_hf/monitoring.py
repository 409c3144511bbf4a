"""Measures residual connections during training: the range of ω, and the size of branches relative to shortcuts."""

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .adapters import bare_model
from .observation import Places, connections_of, observed_connections, stack_inputs, variance


class ResidualMonitor:
    """Measures the residual connections of a model from outside, in passes that it makes anyway.

    If a branch grows faster than its shortcut, or an ω becomes very large, it shows here before it shows in the loss.

    Args:
        model: the model; it may be inside wrappers of distributed training or of PEFT.

    Example:

    ```python
    >>> import torch
    >>> from admin_hf import AdminConfig, AdminForConditionalGeneration
    >>> from admin_hf.monitoring import ResidualMonitor

    >>> model = AdminForConditionalGeneration(AdminConfig(vocab_size=100, d_model=32))
    >>> monitor = ResidualMonitor(model)
    >>> monitor.watch_next_pass()
    >>> ids = torch.randint(2, 99, (4, 10))
    >>> loss = model(input_ids=ids, labels=ids).loss
    >>> sorted(monitor.metrics())[:3]
    ['decoder_omega_max', 'decoder_omega_min', 'decoder_variance_ratio_max']

    ```
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = bare_model(model)
        self._ratios: dict[str, list[Tensor]] = {}
        self._hooks = ExitStack()

    def watch_next_pass(self) -> None:
        """Measure in the model's next forward pass."""
        self._hooks.close()
        self._hooks.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)

    def metrics(self) -> dict[str, float]:
        """Return the present `{encoder,decoder}_omega_{min,max}`, and `{encoder,decoder}_variance_ratio_{min,max}`.

        The latter are the smallest and largest Var[f_i] / Var[ω_i ⊙ x_{i-1}] of the stack's sub-layers at real tokens.
        They are of the pass that was watched since the last call, and missing if there was none. A stack without ω has
        no range of ω.
        """
        values: dict[str, Tensor] = {}
        measured, self._ratios = self._ratios, {}
        for stack, connections in connections_of(self.model).items():
            if omegas := [each.omega.detach() for _, each in connections if hasattr(each, "omega")]:
                values[f"{stack}_omega_min"] = torch.stack([omega.min() for omega in omegas]).min()
                values[f"{stack}_omega_max"] = torch.stack([omega.max() for omega in omegas]).max()
            if ratios := measured.get(stack):
                values[f"{stack}_variance_ratio_min"] = torch.stack(ratios).min()
                values[f"{stack}_variance_ratio_max"] = torch.stack(ratios).max()
        return {name: value.item() for name, value in values.items()}

    def _begin(self, model: PreTrainedModel, args: tuple, batch: dict[str, Any]) -> None:
        self._hooks.close()
        _, tokens = stack_inputs(model, batch)
        self._ratios = {name: [] for name in tokens}
        observers = {name: partial(_observe, ratios, tokens[name]) for name, ratios in self._ratios.items()}
        self._hooks.enter_context(observed_connections(model, observers, before=True))
        end = model.register_forward_hook(lambda *_: self._hooks.close(), always_call=True)
        self._hooks.callback(end.remove)


@torch.no_grad()
def _observe(ratios: list[Tensor], tokens: Places, name: str, connection: Any, args: tuple[Tensor, Tensor]) -> None:
    shortcut, branch = args
    branch_variance = variance(branch, tokens, getattr(connection, "branch_scale", 1.0))
    ratios.append(branch_variance / variance(shortcut, tokens, getattr(connection, "shortcut_scale", 1.0)))


def perplexity(nll: float) -> float:
    """The exponential of a negative log-likelihood; always a finite number."""
    return math.exp(min(nll, 700))

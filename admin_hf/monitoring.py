"""What residual connections do while a model trains: the range of ω, and how large branches are beside shortcuts."""

import math
from typing import Any

import torch
from torch import Tensor

from .architecture import STACKS
from .pretrained import AdminPreTrainedModel
from .profiling import base_model_inputs, real_tokens
from .residual import AdminConnection, ResidualConnection, residual_connections


class ResidualMonitor:
    """Measures the residual connections of a model from outside, in passes that it makes anyway.

    A sub-layer whose branch grows beside its shortcut, or whose ω runs away, is seen here before the loss shows it.

    Args:
        model: the bare model, not a wrapper around it.

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

    def __init__(self, model: AdminPreTrainedModel) -> None:
        self.model = model
        self._ratios: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []

    def watch_next_pass(self) -> None:
        """Measure in the model's next forward pass; a GPU does not wait for it."""
        self._remove_hooks()
        self._handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]

    def metrics(self) -> dict[str, float]:
        """Return `{encoder,decoder}_omega_{min,max}`, now, and `{encoder,decoder}_variance_ratio_{min,max}`.

        The latter are the smallest and largest Var[f_i] / Var[ω_i ⊙ x_{i-1}] of the stack's sub-layers at real tokens,
        in the pass that was watched since this was asked last; there are none without one. A stack without ω has no
        range of ω.
        """
        values: dict[str, Tensor] = {}
        measured, self._ratios = self._ratios, {}
        for stack in STACKS:
            modules = getattr(self.model.base_model, stack).modules()
            if omegas := [module.omega.detach() for module in modules if isinstance(module, AdminConnection)]:
                values[f"{stack}_omega_min"] = torch.stack([omega.min() for omega in omegas]).min()
                values[f"{stack}_omega_max"] = torch.stack([omega.max() for omega in omegas]).max()
            if ratios := measured.get(stack):
                values[f"{stack}_variance_ratio_min"] = torch.stack(ratios).min()
                values[f"{stack}_variance_ratio_max"] = torch.stack(ratios).max()
        return {name: value.item() for name, value in values.items()}

    def _begin(self, model: AdminPreTrainedModel, args: tuple, batch: dict[str, Any]) -> None:
        self._remove_hooks()
        self._ratios = {}
        base, inputs = model.base_model, base_model_inputs(model, batch)
        for name, stack in STACKS.items():
            tokens = real_tokens(base, batch, inputs, stack.prefix).unsqueeze(-1)
            ratios = self._ratios[name] = []

            def observe(
                connection: ResidualConnection, args: tuple[Tensor, Tensor], tokens: Any = tokens, ratios: Any = ratios
            ) -> None:
                with torch.no_grad():
                    shortcut, branch = (x.float() for x in args)
                    shortcut = shortcut * getattr(connection, "shortcut_scale", 1.0)
                    branch = branch * getattr(connection, "branch_scale", 1.0)
                    ratios.append(_variance(branch, tokens) / _variance(shortcut, tokens))

            self._handles += [
                connection.register_forward_pre_hook(observe)
                for _, connection in residual_connections(getattr(base, name))
            ]
        self._handles.append(model.register_forward_hook(lambda *_: self._remove_hooks(), always_call=True))

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _variance(x: Tensor, tokens: Tensor) -> Tensor:
    """Population variance of all entries at the tokens that are True, as one pool; without selecting, which syncs."""
    count = tokens.sum() * x.shape[-1]
    mean = (x * tokens).sum() / count
    return ((x - mean).square() * tokens).sum() / count


def perplexity(nll: float) -> float:
    """The exponential of a negative log-likelihood, and a finite number for any."""
    return math.exp(min(nll, 700))

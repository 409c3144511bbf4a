"""The training pass, compiled, and on a GPU replayed as CUDA graphs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from transformers.utils import logging

from .kernels import autocast_dtype
from .pretrained import AdminPreTrainedModel


logger = logging.get_logger(__name__)

# Variants of a layer that a process may compile: two or four for each model
VARIANTS = 64
# Most shapes of a batch that are captured: each stores the launches of a whole pass, some MB of host memory
MAX_SHAPES = 128

Outputs = tuple[Tensor, ...]


class Recording(Protocol):
    """A recorded computation on tensors that stay in their place."""

    outputs: Outputs

    def replay(self) -> None:
        """Compute again from the present values of the inputs, into the same outputs."""


Record = Callable[[Callable[[], Outputs]], Recording]


class CompiledPass:
    """Forward and backward pass of a training loss with compiled layers; on a GPU, one CUDA graph for each shape.

    Python launches the kernels of a deep model more slowly than a GPU computes them. Here the layers are compiled,
    which gives fewer and faster kernels. This happens once for all shapes and for any depth, since all layers of a
    stack except the first share one compilation. On a GPU, the first pass with a new shape runs compiled, the second
    one is captured as a CUDA graph, and every later pass is a single launch. Dropout draws new masks in each replay.

    Captured passes share their memory. They need batches of few shapes: at most `MAX_SHAPES` are captured, others run
    compiled. A pass with a hook on the model itself (as set by [`AdminProfilingCallback`] and
    [`~admin_hf.monitoring.ResidualMonitor`]) is neither compiled nor captured. Hooks on its parts are called while a
    pass is captured, not when it is replayed. Hooks after the accumulation of a gradient are never called.

    Args:
        model: the bare model, on its device. Its layers are compiled only for this pass; evaluation and generation
            do not change.
        loss: a function from a batch, as keyword arguments, to a tuple of tensors: the loss, a scalar, and any other
            values. It must not read a tensor on the host.
        scale: applied to the loss before the backward pass, such as `GradScaler.scale`.
        backend: the backend of `torch.compile`.
        record: captures a computation; default: as a CUDA graph on a GPU, and not at all on other devices.

    Raises:
        ValueError: the model has a feature that cannot be captured (see [`why_not_compiled`]).

    Example:

    ```python
    compiled = CompiledPass(model, lambda **batch: (model(**batch).loss,))
    for batch in loader:
        (loss,) = compiled(batch)
        optimizer.step()
        optimizer.zero_grad()
    ```
    """

    def __init__(
        self,
        model: AdminPreTrainedModel,
        loss: Callable[..., Outputs],
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
        backend: str = "inductor",
        record: Record | None = None,
    ) -> None:
        if (reason := why_not_compiled(model)) is not None:
            raise ValueError(f"The training pass cannot be compiled: {reason}")
        self.model, self.loss, self.scale = model, loss, scale
        base: Any = model.base_model
        self.layers: list[Any] = [*base.encoder.layers, *base.decoder.layers]
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        self.backend = backend
        self._own: list[Any] | None = None  # forwards of the layers' own, as wrappers set them; of what is compiled
        self._compiled: list[Any] = []
        device = next(model.parameters()).device
        self.record = CUDAGraphs(device) if record is None and records(device) else record
        self._recorded: dict[Any, _Recorded] = {}
        self._seen: set[Any] = set()
        self._gradients = _Gradients([])

    def __call__(self, batch: Mapping[str, Tensor]) -> Outputs:
        """Compute the loss of a batch and *add* its gradients to those of the parameters, as `loss.backward()` does.

        Args:
            batch: tensors on the model's device, of any shapes, or numbers; entries that are None are ignored. Another
                dtype, or another mode of the model or of autocast, counts as a new shape. A parameter that the loss
                does not depend on gets a gradient of 0.

        Returns:
            The results of `loss`, without gradients.
        """
        own = [vars(layer).get("forward") for layer in self.layers]
        if own != self._own or not self._gradients.fit(self.model):
            self._recorded.clear()
            self._seen.clear()
            self._gradients = _Gradients([p for p in self.model.parameters() if p.requires_grad])
        if own != self._own:
            self._own = own
            self._compiled = [torch.compile(x.forward, dynamic=True, backend=self.backend) for x in self.layers]
        self._gradients.attach()
        device = self._gradients.parameters[0].device
        batch = {name: torch.as_tensor(x, device=device) for name, x in batch.items() if x is not None}
        if self.model._forward_pre_hooks or self.model._forward_hooks:
            return self._pass(**batch)
        shapes = ((name, x.shape, x.dtype) for name, x in batch.items())
        key = (self.model.training, autocast_dtype(device.type), *shapes)
        with self._compiled_layers(own):
            if (recorded := self._recorded.get(key)) is not None:
                return recorded.replay(batch)
            if key in self._seen and self.record is not None and len(self._recorded) < MAX_SHAPES:
                recorded = self._recorded[key] = _Recorded(batch, self._pass, self.record)
                return recorded.replay(batch)
            if not self._seen:
                logger.info("Compiling the layers, once for all shapes of a batch: this takes about a minute.")
            self._seen.add(key)
            return self._pass(**batch)

    def average_gradients(self) -> None:
        """Replace the gradients by their mean over all processes, if there are several. All processes must call it."""
        if distributed.is_initialized():
            for gradients in self._gradients.flat.values():
                distributed.all_reduce(gradients)
                gradients /= distributed.get_world_size()

    def _pass(self, **batch: Tensor) -> Outputs:
        outputs = self.loss(**batch)
        self._gradients.add(self.scale(outputs[0]))
        return tuple(x.detach() for x in outputs)

    @contextmanager
    def _compiled_layers(self, own: list[Any]) -> Iterator[None]:
        for layer, forward in zip(self.layers, self._compiled, strict=True):
            layer.forward = forward
        try:
            # What LayerNorm reads is computed again from the branch, by the kernel that reads it: kept it is float32
            with torch._functorch.config.patch(ban_recompute_used_far_apart=False):
                yield
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


def why_not_compiled(model: AdminPreTrainedModel) -> str | None:
    """Say in a sentence why no pass of the model can be captured; None if it can."""
    config = model.config
    if config.encoder_layerdrop or config.decoder_layerdrop:
        return "layerdrop leaves out other layers in each pass."
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0."
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing runs layers again in the backward pass."
    return None


class _Gradients:
    """Gradients that stay in their place, as views of one tensor for each dtype.

    A captured pass writes to the same memory in each replay, while optimisers set gradients to None.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._addresses = [p.data_ptr() for p in parameters]
        self.flat: dict[torch.dtype, Tensor] = {}
        views: dict[nn.Parameter, Tensor] = {}
        for dtype in dict.fromkeys(p.dtype for p in parameters):  # in the same order in every process
            group = [p for p in parameters if p.dtype == dtype]
            sizes = [-(-p.numel() // 64) * 64 for p in group]  # aligned
            self.flat[dtype] = torch.zeros(sum(sizes), dtype=dtype, device=parameters[0].device)
            for p, part in zip(group, self.flat[dtype].split(sizes), strict=True):
                views[p] = part[: p.numel()].view_as(p)
        self.views = [views[p] for p in parameters]

    def fit(self, model: nn.Module) -> bool:
        """Whether these are the gradients of the model's trainable parameters, where they are now."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        same = [id(p) for p in parameters] == [id(p) for p in self.parameters]
        return same and [p.data_ptr() for p in parameters] == self._addresses

    def attach(self) -> None:
        """Give each parameter its gradient: 0 where it has none."""
        held = [p.grad for p in self.parameters]
        if forgotten := all(grad is None for grad in held):
            for flat in self.flat.values():
                flat.zero_()
        for p, grad, view in zip(self.parameters, held, self.views, strict=True):
            if grad is view:
                continue
            if grad is not None:
                view.copy_(grad)
            elif not forgotten:
                view.zero_()
            p.grad = view

    def add(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = [(view, grad) for view, grad in zip(self.views, grads, strict=True) if grad is not None]
        torch._foreach_add_([view for view, _ in pairs], [grad for _, grad in pairs])


class _Recorded:
    """A recorded pass over batches of one shape."""

    def __init__(self, batch: Mapping[str, Tensor], run: Callable[..., Outputs], record: Record) -> None:
        self.inputs = {name: x.clone() for name, x in batch.items()}
        self.recording = record(lambda: run(**self.inputs))

    def replay(self, batch: Mapping[str, Tensor]) -> Outputs:
        for name, x in batch.items():
            self.inputs[name].copy_(x, non_blocking=True)
        self.recording.replay()
        return tuple(x.clone() for x in self.recording.outputs)


def records(device: torch.device) -> bool:
    """Whether a device can record and replay computations."""
    return device.type == "cuda"


class CUDAGraphs:
    """Records computations as CUDA graphs, all in one pool of memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Outputs]) -> Recording:
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
            graph.outputs = compute()
        return graph

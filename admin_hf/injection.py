"""ω in a stock Post-LN model, without changes to its code: Admin for BERT, BART, OPT and others.

In Post-LN the shortcut and the branch of a sub-layer read the same tensor: the output of the preceding LayerNorm. So

    x_i = LN_i(ω_i ⊙ x_{i-1} + f_i(x_{i-1}))

is what the stock forward computes if the preceding LayerNorm has γ ⊙ ω_i and ν ⊙ ω_i, and every matrix that reads
x_{i-1} in branch i is divided by ω_i along its inputs. This is the paper's fold (Appendix C) in reverse. γ, ν, W and
ω_i are the parameters, and PyTorch's parametrizations compute the products in every forward pass. Folding keeps the
products.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .adapters import merge_adapters
from .architecture import Stack, Sublayer
from .checkpoints import check_finite, explained_errors, one_line, weight_files
from .families import base_of, stack_layers, stacks_of
from .observation import Places
from .omega_state import OmegaState
from .parametrization import Scaled, original, remove, scale
from .positions import save_own_tables
from .reparameterization import check_scale
from .residual import OUTPUT_CHANGES, deepnorm_constants


Model = TypeVar("Model", bound=nn.Module)


class InjectedConnection:
    """The residual connection of a sub-layer of a stock model, like [`ResidualConnection`] in an Admin model.

    Attributes:
        name: name of the LayerNorm after the sub-layer, below the stack, such as `layer.0.output.LayerNorm`.
        norm, front: the LayerNorm after the sub-layer, which contains ω if there is one, and the one before, if any.
        reads: the matrices that read the shortcut, as modules and names in them.
        ends: the matrix that ends the branch.
        stack: the connections of the stack; this one is at `place`.
        profiled, initialized: as in an [`AdminConnection`].
    """

    branch_scale = 1.0
    profiled = initialized = adds_layer_input = False

    def __init__(
        self, layer: nn.Module, sublayer: Sublayer, layer_name: str, stack: list[InjectedConnection], front: Any
    ) -> None:
        self.name = f"{layer_name}.{sublayer.norm}"
        self.stack, self.place = stack, len(stack)
        self.norm: Any = layer.get_submodule(sublayer.norm)
        self.front: Any = stack[-1].norm if stack else front
        self.reads = [_matrix(layer, path) for path in sublayer.reads]
        self.ends: Any = layer.get_submodule(sublayer.ends)

    @property
    def following(self) -> InjectedConnection | None:
        """The connection of the next sub-layer."""
        return self.stack[self.place + 1] if self.place + 1 < len(self.stack) else None

    @property
    def is_in_chain(self) -> bool:
        """Whether a LayerNorm precedes it. After that LayerNorm, the variances of branches are added up."""
        return self.front is not None

    @property
    def omega(self) -> Tensor:
        return cast(Tensor, self.norm.omega)

    @property
    def shortcut_scale(self) -> Tensor | float:
        return getattr(self.norm, "omega", 1.0)

    @property
    def output_scale(self) -> Tensor | float:
        """The factor of the LayerNorm's output in the next sub-layer's shortcut."""
        return self.following.shortcut_scale if self.following is not None else 1.0

    @property
    def weight(self) -> Tensor:
        return original(self.norm, "weight")

    @property
    def bias(self) -> Tensor:
        return original(self.norm, "bias")

    @property
    def eps(self) -> float:
        return float(self.norm.eps)


class Injection(OmegaState):
    """The ω of a stock model, found as its attribute `injection`.

    Attributes:
        system: `"admin"`, `"admin_uniform"` or `"deepnorm"`.
        stacks: the connections of each stack, in execution order.
    """

    def __init__(self, model: nn.Module, system: str, stacks: Sequence[Stack]) -> None:
        self.base, self.system = base_of(model), system
        # Of a decoder, not classes of sentences
        self.labels_are_targets = getattr(model, "can_generate", bool)()
        self.descriptions = {stack.name: stack for stack in stacks}
        self.stacks = {stack.name: _connections(self.base, stack) for stack in stacks}

    def profiled_connections(self) -> Iterable[InjectedConnection]:
        return (connection for stack in self.stacks.values() for connection in stack if connection.profiled)

    @property
    def _profiled_flag(self) -> Tensor | None:
        return getattr(self.base, "omega_profiled", None)

    # --- looking at it ---

    def observed(self, observers: Mapping[str, Callable[..., None]], before: bool = False) -> ExitStack:
        """As [`~admin_hf.observation.observed`] of all connections, with an observer for each stack."""
        hooks = ExitStack()
        for name, connections in self.stacks.items():
            seen = _Shortcut(observers[name], before)
            first = stack_layers(self.base, self.descriptions[name])[0]
            hooks.callback(first.register_forward_pre_hook(seen.enter, with_kwargs=True).remove)
            for connection in connections:
                hooks.callback(connection.norm.register_forward_pre_hook(partial(seen.join, connection)).remove)
                hooks.callback(connection.norm.register_forward_hook(partial(seen.leave, connection)).remove)
        return hooks

    def stack_inputs(
        self, batch: Mapping[str, Any], max_tokens: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As [`~admin_hf.observation.stack_inputs`]; the inputs are those of the whole model."""
        device = next(self.base.parameters()).device
        inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.dim()}
        if max_tokens is not None and tensors:
            count = max(len(x) for x in tensors.values())
            length = max(self._length(name, x) for name, x in tensors.items())
            rows = max(1, max_tokens // length)
            inputs |= {name: x[:rows] for name, x in tensors.items() if len(x) == count}
        places: dict[str, Places] = {}
        for name, stack in self.descriptions.items():
            if (mask := self._real_tokens(stack, inputs)) is not None:
                mask = mask.flatten(0, -2)  # the choices of a question are rows of the stack
                mask = mask.T if stack.time_first else mask
            places[name] = None if mask is None else mask.nonzero(as_tuple=True)
        return inputs, places

    def _length(self, name: str, x: Tensor) -> int:
        """The tokens in a row of an input."""
        if name == "input_values":
            lengths = cast(Any, self.base)._get_feat_extract_output_lengths
            return int(lengths(torch.tensor(x.shape[1]), **_without_adapter(lengths)))
        return math.prod(x.shape[1:]) if name.endswith("input_ids") else 1

    def _real_tokens(self, stack: Stack, inputs: Mapping[str, Any]) -> Tensor | None:
        """True where a token of the stack is not padding, `(rows, length)`; None if the inputs do not say it."""
        base: Any = self.base
        if stack.prefix and self.labels_are_targets and (labels := inputs.get("labels")) is not None:
            return cast(Tensor, labels.ne(-100))
        ids, pad = inputs.get(f"{stack.prefix}input_ids"), getattr(getattr(base, "config", None), "pad_token_id", None)
        mask = inputs.get(f"{stack.prefix}attention_mask")
        if mask is not None and (mask.dim() == 2 or (ids is not None and mask.shape == ids.shape)):
            if hasattr(base, "_get_feature_vector_attention_mask"):  # speech models, whose mask is that of the samples
                of_frames = base._get_feature_vector_attention_mask
                mask = of_frames(self._length("input_values", mask), mask, **_without_adapter(of_frames))
            return cast(Tensor, mask.bool())
        if ids is None or pad is None:
            return None
        tokens: Tensor = ids.ne(pad)
        tokens[:, 0] |= bool(stack.prefix)  # a decoder may start from padding
        return tokens

    # --- leaving it ---

    def fold(self, model: nn.Module, dtype: torch.dtype | None) -> Any:
        """Turn `model` into the stock model that computes the same. See [`reparameterize`]."""
        check_finite(model, "The model")
        for stack, connections in self.stacks.items():
            for connection in connections:
                omega = torch.as_tensor(connection.shortcut_scale).detach().reshape(-1)
                check_scale(omega, f"{stack}.{connection.name}.omega", "fold an earlier checkpoint")
        remove(self.base, folds=True)
        merge_adapters(model)  # not before: a product with ω cannot be written to
        for module in model.modules():  # with an adapter, the model is one of them
            if vars(module).pop("injection", None) is not None:
                vars(module).pop("save_pretrained", None)  # of a model that a Trainer publishes
        folded = model.eval() if dtype is None else model.eval().to(dtype)
        check_finite(folded, f"The folded model{'' if dtype is None else f', rounded to {dtype},'}")
        return folded


def _without_adapter(of_sound: Any) -> dict[str, bool]:
    """For functions of lengths, which may count after an adapter that follows the stack."""
    return {"add_adapter": False} if "add_adapter" in inspect.signature(of_sound).parameters else {}


class _Shortcut:
    """The shortcut of one stack's current sub-layer, as in the stock model: ω_i ⊙ x_{i-1}."""

    def __init__(self, observe: Callable[..., None], before: bool) -> None:
        self.observe, self.before = observe, before
        self.value = self.branch = torch.empty(0)

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.value = args[0] if args else kwargs["hidden_states"]

    @torch.no_grad()  # gradient checkpointing, which repeats the pass, must not see this
    def join(self, connection: InjectedConnection, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.branch = args[0] - self.value
        if self.before:
            self.observe(connection.name, connection, self._parts(connection))

    @torch.no_grad()
    def leave(self, connection: InjectedConnection, norm: nn.Module, args: tuple, output: Tensor) -> None:
        if not self.before:
            self.observe(connection.name, connection, self._parts(connection), output)
        self.value = output

    def _parts(self, connection: InjectedConnection) -> tuple[Tensor, Tensor]:
        if connection.front is None:  # nothing scales x_0; the branch is divided by a constant scale
            return self.value, self.branch * connection.shortcut_scale
        return self.value / connection.shortcut_scale, self.branch


def inject(
    model: Model,
    system: str = "admin",
    *,
    output_change: str = "O(log n)",
    trained: bool = True,
    stacks: Sequence[Stack] | None = None,
) -> Model:
    """Give a stock Post-LN model an ω on every shortcut that can have one, and return it.

    Class, forward, configuration and tokenizer stay stock. With ω = 1 so do its outputs, bit for bit. Weights that
    ω is multiplied into are saved as `….parametrizations.weight.original`, and ω as `….omega` of the LayerNorm after
    its sub-layer; [`load_injected`] loads such a checkpoint. The first sub-layer has an ω if a LayerNorm precedes it.
    Hidden states between layers (`output_hidden_states`) are each multiplied by the next ω, as in the folded model. A
    weight that is a product with ω cannot be written to, so [`reparameterize`] merges adapters after the fold.

    [`profile_residuals`], [`initialize_omega`], [`reparameterize`], the callbacks and the monitor accept the model
    like an [`AdminForConditionalGeneration`].

    Args:
        model: a model of Transformers, fresh or loaded, with any head; or any module, if `stacks` describes it.
        system: `"admin"` (ω starts from a profile; in a loaded model it starts at 1, and is not profiled),
            `"admin_uniform"` (the same number in a whole stack), or `"deepnorm"` (a constant, and the initialisation
            of the branches from its paper, so the model must be fresh).
        output_change: for `"admin_uniform"`: how the change of the output may grow with the number of sub-layers:
            `"O(log n)"`, `"O(1)"` or `"O(n)"`, which is ω = 1.
        trained: whether the ω of `"admin_uniform"` is trained or constant.
        stacks: the architecture of a model of an unknown type (see [`~admin_hf.architecture.Stack`]).

    Raises:
        ValueError: the model cannot have an ω; the message says why. The model is then unchanged.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertForMaskedLM
    >>> from admin_hf import initialize_omega, inject, profile_residuals, reparameterize

    >>> config = BertConfig(vocab_size=100, hidden_size=32, num_attention_heads=2, num_hidden_layers=4)
    >>> model = inject(BertForMaskedLM(config))
    >>> batch = {"input_ids": torch.randint(5, 99, (4, 10))}
    >>> initialize_omega(model, profile_residuals(model, batch))
    >>> type(reparameterize(model)).__name__
    'BertForMaskedLM'

    ```
    """
    if system not in ("admin", "admin_uniform", "deepnorm"):
        raise ValueError(f"system={system!r} must be 'admin', 'admin_uniform' or 'deepnorm'.")
    if output_change not in OUTPUT_CHANGES:
        raise ValueError(f"output_change={output_change!r} must be one of {', '.join(OUTPUT_CHANGES)}.")
    if any(isinstance(module, Scaled) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has an ω already.")
    base = base_of(model)
    found = stacks_of(model) if stacks is None else stacks
    injection = Injection(model, system, found)
    _check(model, injection)
    is_loaded = hasattr(model, "_weight_conversions")  # set by `from_pretrained`
    if system == "deepnorm" and stacks is not None:
        raise ValueError("'deepnorm' initialises queries, keys and values separately, which `stacks=` does not name.")
    if system == "deepnorm" and is_loaded:
        raise ValueError(
            "'deepnorm' initialises the branches again, so a loaded model would lose its weights: make a fresh one."
        )
    constants = _constants(injection, output_change)
    try:
        for name, connections in injection.stacks.items():
            for place, connection in enumerate(connections):
                if connection.front is None and system != "deepnorm":
                    continue
                is_profiled = system == "admin" and place > (connections[0].front is None)
                connection.profiled, connection.initialized = is_profiled, is_loaded
                is_trained = system == "admin" or (system == "admin_uniform" and trained)
                _add_omega(connection, constants[name], is_trained)
    except BaseException:
        remove(base, folds=False)
        raise
    if system == "deepnorm":
        _initialize_deepnorm(injection)
    if system == "admin":
        base.register_buffer("omega_profiled", torch.zeros((), device=next(base.parameters()).device))
    if any(each.kind == "encoder-attention" and not stack.prefix for stack in found for each in stack.sublayers):
        base.register_forward_pre_hook(_check_encoder_states, with_kwargs=True)
    model.injection = injection  # type: ignore[assignment]
    save_own_tables(model)
    return model


def _check_encoder_states(base: Any, args: tuple, inputs: dict[str, Any]) -> None:
    """Without these, BERT skips its encoder-attention, but the LayerNorm before it would still contain its ω."""
    if inputs.get("encoder_hidden_states") is None and len(args) < 6:
        raise ValueError(
            f"{type(base).__name__} has encoder-attention with an ω, and got no encoder_hidden_states: give them, or "
            "make it without add_cross_attention."
        )


def load_injected(model_class: type[PreTrainedModel], folder: str | Path, **options: Any) -> Any:
    """Load a checkpoint of a model with an ω from [`inject`].

    Args:
        model_class: the stock class, such as `BertForMaskedLM`.
        folder: the folder of the checkpoint.
        options: the options that [`inject`] was called with.

    Raises:
        OSError, ValueError: it cannot be read, or belongs to another model.
    """
    with explained_errors(folder):
        config: Any = model_class.config_class.from_pretrained(folder)  # type: ignore[union-attr]
        fresh: Any = model_class(config)
        model: Any = inject(fresh.to(config.dtype or torch.float32), **options)
        weights: dict[str, Tensor] = {}
        for file in weight_files(folder):
            weights |= load_file(file)
    try:
        result = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes that differ
        raise ValueError(f"{folder} contains no {model_class.__name__} with these ω: {one_line(error)}") from error
    left_out = [*model.all_tied_weights_keys, *(model._keys_to_ignore_on_load_missing or ())]
    left_out += model._keys_to_ignore_on_save or ()
    missing = [name for name in result.missing_keys if not any(re.search(key, name) for key in left_out)]
    if missing or result.unexpected_keys:
        kind, name = ("lacks", missing[0]) if missing else ("has no place for", result.unexpected_keys[0])
        advice = (
            "" if any(name.endswith(".omega") for name in weights) else " It has no ω: load it by from_pretrained."
        )
        raise ValueError(f"{folder} {kind} {name}: it contains no {model_class.__name__} with these ω.{advice}")
    if model.can_generate() and Path(folder, "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for connection in model.injection.profiled_connections():
        connection.initialized = True
    save_own_tables(model)
    return model.eval()


# --- how it is put in -----------------------------------------------------------------------------


def _connections(base: nn.Module, stack: Stack) -> list[InjectedConnection]:
    found: list[InjectedConnection] = []
    try:
        front = base.get_submodule(stack.front) if stack.front else None
        for number, layer in enumerate(stack_layers(base, stack)):
            for sublayer in stack.sublayers:
                found.append(InjectedConnection(layer, sublayer, f"{stack.layers}.{number}", found, front))
    except AttributeError as error:
        raise ValueError(f"The model gets no ω, because its {stack.name} is not as described: {error}.") from error
    return found


def _matrix(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Module and name of the weight of a module, or of a parameter such as `self_attn.in_proj_weight`."""
    parent, _, name = path.rpartition(".")
    owner = layer.get_submodule(parent)
    found = getattr(owner, name)
    return (found, "weight") if isinstance(found, nn.Module) else (owner, name)


def _check(model: nn.Module, injection: Injection) -> None:
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for stack, connections in injection.stacks.items():
        if not connections:
            raise ValueError(f"The {stack} has no sub-layers.")
        norms = [connection.norm for connection in connections]
        for norm in (*norms, connections[0].front):
            if norm is not None and (not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None):
                raise ValueError(
                    f"The model gets no ω: its {stack} has {norm}, expected a LayerNorm with weight and bias."
                )
        for connection in connections:
            weights = [("weight", connection.norm)] + [(name, matrix) for matrix, name in connection.reads]
            weights += [] if connection.front is None else [("weight", connection.front)]
            if any(uses[id(getattr(module, name, None))] != 1 for name, module in weights):
                raise ValueError(
                    f"The model gets no ω: at {stack}.{connection.name} a weight is shared with another module, which "
                    "would get the ω of several sub-layers, or it is computed."
                )
            for matrix, name in connection.reads:
                weight: Any = getattr(matrix, name)
                width = connection.norm.weight.numel()
                inputs = 0 if isinstance(matrix, Conv1D) else 1
                if getattr(weight, "ndim", 0) != 2 or weight.shape[inputs] != width or not weight.is_floating_point():
                    raise ValueError(
                        f"The model gets no ω: its {stack} has {matrix} before {connection.name}; expected a matrix "
                        f"with {width} inputs, in floating-point numbers."
                    )


def _add_omega(connection: InjectedConnection, value: float, is_trained: bool) -> None:
    norm = connection.norm
    if is_trained:
        norm.omega = nn.Parameter(torch.full_like(norm.weight, value))
    else:
        norm.register_buffer("omega", torch.full_like(norm.weight[:1], value))
    if connection.front is not None:
        scale(connection.front, norm)
        for matrix, name in connection.reads:
            scale(matrix, norm, names=(name,), divides=True, transposed=isinstance(matrix, Conv1D))
    else:  # LN(α x + f) = LN(x + f / α), except for the ε of LN
        scale(connection.ends, norm, divides=True)


# --- constants ------------------------------------------------------------------------------------


def _constants(injection: Injection, output_change: str) -> dict[str, float]:
    """What ω starts at, by stack."""
    if injection.system == "admin":
        return dict.fromkeys(injection.stacks, 1.0)
    if injection.system == "admin_uniform":
        return {name: OUTPUT_CHANGES[output_change](len(stack)) for name, stack in injection.stacks.items()}
    return {name: alpha for name, (alpha, _) in _deepnorm(injection).items()}


def _deepnorm(injection: Injection) -> dict[str, tuple[float, float]]:
    """α of the shortcuts and gain β of the branches, by stack."""
    depths = {name: len(stack_layers(injection.base, stack)) for name, stack in injection.descriptions.items()}
    return deepnorm_constants(depths.get("encoder", 0), depths.get("decoder", 0))


@torch.no_grad()
def _initialize_deepnorm(injection: Injection) -> None:
    """Xavier-normal matrices: gain 1 for queries and keys, β for values, outputs and feed-forward; biases are 0."""
    for name, (_, beta) in _deepnorm(injection).items():
        stack = injection.descriptions[name]
        of_three = [sublayer.reads for sublayer in stack.sublayers if len(sublayer.reads) == 3]
        of_gain_one = {path.rpartition(".")[2] for query, key, _ in of_three for path in (query, key)}
        for layer in stack_layers(injection.base, stack):
            for path, module in layer.named_modules():
                if isinstance(module, (nn.Linear, Conv1D)):
                    weight = original(module, "weight")
                    is_query_or_key = path.rpartition(".")[2] in of_gain_one
                    parts = weight.chunk(3, 1) if path.endswith("c_attn") else (weight,)
                    for place, part in enumerate(parts):
                        draws_one = is_query_or_key or (len(parts) == 3 and place < 2)
                        nn.init.xavier_normal_(part, gain=1.0 if draws_one else beta)
                    if module.bias is not None:
                        nn.init.zeros_(original(module, "bias"))


__all__ = ["Injection", "InjectedConnection", "inject", "load_injected"]

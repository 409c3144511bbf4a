"""Layer dependency β_{i,j} (section 4.1, Fig. 7 and 8): how much of a sub-layer's output comes from which branch.

    x̂_i = Σ_{j≤i} β_{i,j} â_j        x̂ = x / std(x), â = a / std(a); a_0 is the embedding, a_j branch j's output

The decomposition is exact. A connection is linear in its two inputs once each token's standard deviation σ_b is known.
So every branch output is carried through the later connections separately:

    b_i = x_{i-1} ⊙ s_i + a_i ⊙ r_i              s, r: the connection's `shortcut_scale` and `branch_scale`
    x_i = (b_i − mean(b_i)) / σ_b ⊙ γ_i + ν_i     if a LayerNorm is last; otherwise x_i = b_i

β_{i,j} is the standard deviation of what is left of a_j in x_i, divided by that of x_i, both over all entries of all
real tokens. In Pre-LN that is the paper's sqrt(Var a_j) / sqrt(Var Σ_k a_k), where the LayerNorm at the input of a
branch belongs to the branch. The part of x_i that comes from the biases ν is a component of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..connections import KeelConnection
from ..injection import InjectedConnection
from ..observation import Places, at, connections_of
from ..pretrained import AdminPreTrainedModel
from ..residual import PostLNConnection
from .inputs import Batch, ByStack, observe_connections, residual_name


# Cost is quadratic in sub-layers, and linear in tokens; β hardly depends on how many there are.
MAX_TOKENS = 256

# Entries of components that are processed at once: 1 MB, which stays in a CPU's cache.
_BLOCK = 2**18


@dataclass(frozen=True)
class StackDependency:
    """The dependencies of one stack.

    Attributes:
        system: the residual system, such as `"admin"`; a label only.
        names: the residual connections' names below the stack, in execution order; N of them.
        beta: one row per sub-layer i = 1 … N with β_{i,0}, …, β_{i,i}, to four digits; j = 0 is the embedding.
        bias: for each sub-layer, the same for the component of LayerNorm's biases ν; 0 until they are trained.
        error: the largest difference between the components' sum and the last x_i, in standard deviations of x_i.
    """

    system: str
    names: list[str]
    beta: list[list[float]]
    bias: list[float]
    error: float

    def own(self) -> list[float]:
        """β²_{i,i} of each sub-layer: its output's dependency on its own branch."""
        return [row[-1] ** 2 for row in self.beta]

    def exponent(self) -> float | None:
        """p of β²_{i,i} ∝ i^p, by least squares in the logarithms over i ≥ 2; −1 is light, 0 is heavy dependency."""
        points = [(i, own) for i, own in enumerate(self.own(), start=1) if i > 1 and own > 0]
        if len(points) < 2:
            return None
        i, own = torch.tensor(points).log().T.tolist()
        return linear_regression(i, own).slope

    def verdict(self) -> str:
        own, last, exponent = self.own(), len(self.beta), self.exponent()
        if max(own) == 0:
            return f"({self.system}): the branches contribute nothing to x_i."
        trend = ""
        if exponent is not None:
            how = "falls" if exponent < -0.3 else "rises" if exponent > 0.3 else "is level"
            trend = f"{how} as i^{exponent:.2f}: "
        values = ", ".join(f"{own[i - 1]:.2g} at i = {i}" for i in sorted({1, last // 2 + 1, last}))
        total = sum(beta**2 for beta in self.beta[-1])
        return f"({self.system}): β²_ii {trend}{values}; the last row's squares sum to {total:.2f}."


@dataclass(frozen=True)
class LayerDependency(ByStack[StackDependency]):
    """The result of [`layer_dependency`]."""

    EXPECTATION: ClassVar[str] = (
        "at initialisation β²_ii is about 1/i with Pre-LN and Admin, and constant with Post-LN; after training "
        "sub-layers depend more on their own branch, with Post-LN and Admin more than with Pre-LN (Fig. 7 and 8)."
    )


def layer_dependency(model: AdminPreTrainedModel, batch: Batch) -> LayerDependency:
    """Measure β_{i,j} of both stacks in one pass without dropout, at the first 256 real tokens of the batch.

    It needs memory for one float per sub-layer, token and dimension of one stack. It works for every residual system
    whose connections are linear in the sense of the module's docstring. This is verified.

    Args:
        model: fresh (with ω already initialised) or trained.
        batch: the arguments of the model's forward.

    Raises:
        ValueError: the batch lacks the input of a stack, or contains only padding; a connection does not compute what
            its attributes say; or its output is not finite.

    Example:

    ```python
    >>> from admin_hf import AdminConfig
    >>> from admin_hf.analysis import initialized_model, layer_dependency, random_batch

    >>> config = AdminConfig(vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2)
    >>> dependency = layer_dependency(initialized_model(config), random_batch(config))
    >>> [len(row) for row in dependency.encoder.beta]
    [2, 3, 4, 5]

    ```
    """
    stacks: dict[str, _Components] = {}
    connections = connections_of(model)

    def observer(stack: str, tokens: Places) -> Callable[..., None]:
        if tokens is not None and not len(tokens[0]):
            raise ValueError(f"The batch has only padding in the {stack}: there is nothing to measure.")
        stacks[stack] = _Components(connections[stack], tokens)
        return stacks[stack].observe

    observe_connections(model, batch, observer)
    return LayerDependency({name: stack.result(residual_name(model, name)) for name, stack in stacks.items()})


def own_dependency(model: AdminPreTrainedModel, batch: Batch) -> dict[str, list[float]]:
    """β_{i,i} of each sub-layer by stack: the diagonal that [`layer_dependency`] has, without carrying branches on.

    Args:
        model: of any residual systems.
        batch: what the model's forward takes.
    """
    own: dict[str, list[float]] = {}

    def observer(stack: str, tokens: Places) -> Callable[..., None]:
        own[stack] = []

        def observe(name: str, connection: Any, args: tuple[Tensor, Tensor], output: Tensor) -> None:
            x, a, y = (
                _at_least_float32(at(z, tokens)[:MAX_TOKENS]) for z in (*args, output / connection.output_scale)
            )
            *_, branch = _carried(connection, torch.stack([x, a]), x, a)
            own[stack].append(float(_deviation(branch)[-1] / y.std(correction=0)))

        return observe

    observe_connections(model, batch, observer)
    return own


class _Components:
    """x_i of one stack as a sum: component 0 is that of the biases ν, 1 the embedding's, j + 1 that of branch j."""

    def __init__(self, connections: list[tuple[str, Any]], tokens: Places) -> None:
        self.names, self.tokens = [name for name, _ in connections], tokens
        self.values = torch.empty(0)  # components × tokens × d_model, while the stack runs
        self.adds_layer_input = any(each.adds_layer_input for _, each in connections)
        self.layer, self.layer_input = "", torch.empty(0)  # its components, of the current layer
        self.rows: list[list[float]] = []
        self.error = 0.0

    def observe(self, name: str, connection: Any, args: tuple[Tensor, Tensor], output: Tensor) -> None:
        shortcut, branch, output = (
            _at_least_float32(at(x, self.tokens)[:MAX_TOKENS]) for x in (*args, output / connection.output_scale)
        )
        if not self.rows:
            self.values = shortcut.new_zeros(len(self.names) + 2, *shortcut.shape)
            self.values[1] = shortcut
        present = self.values[: len(self.rows) + 3]
        if self.adds_layer_input and (layer := name.rpartition(".")[0]) != self.layer:
            self.layer, self.layer_input = layer, present[:-1].clone()
        if connection.adds_layer_input:
            present[: len(self.layer_input)] += self.layer_input
        blocks = _carried(connection, present, shortcut, branch)
        deviations = torch.cat([_deviation(block) for block in blocks])
        self.rows.append((deviations / output.std(correction=0)).tolist())
        if len(self.rows) == len(self.names):
            self.error = float((present.sum(0) - output).abs().max() / output.std(correction=0))
            self.values = self.layer_input = torch.empty(0)
            self._check(connection, args[0].dtype)

    def _check(self, connection: Any, dtype: torch.dtype) -> None:
        if not self.error < max(1e-3, 32 * torch.finfo(dtype).eps):
            raise ValueError(
                f"The components of {self.names[-1]} differ from its output by {self.error:.2g} standard deviations: "
                f"the model is not finite, or {type(connection).__name__} (or a connection before it) does not "
                "compute what its shortcut_scale, branch_scale and LayerNorm say."
            )

    def result(self, system: str) -> StackDependency:
        rows = [[float(f"{value:.4g}") for value in row] for row in self.rows]
        return StackDependency(system, self.names, [row[1:] for row in rows], [row[0] for row in rows], self.error)


def _carried(connection: Any, components: Tensor, shortcut: Tensor, branch: Tensor) -> Iterator[Tensor]:
    """Turn the components of x_{i-1} in place into those of x_i, of which the last is the branch's; yields blocks."""
    shortcut_scale, branch_scale = (getattr(connection, f"{name}_scale", 1.0) for name in ("shortcut", "branch"))
    components[:-1] *= shortcut_scale
    components[-1] = branch * branch_scale
    b = shortcut * shortcut_scale + branch * branch_scale
    blocks = components.split(max(1, _BLOCK // b.numel()))
    if isinstance(connection, PostLNConnection | KeelConnection | InjectedConnection):
        factor = connection.weight / (b.var(-1, correction=0, keepdim=True) + connection.eps).sqrt()
        for block in blocks:
            block -= block.mean(-1, keepdim=True)
            block *= factor
            if block is blocks[0]:
                block[0] += connection.bias
            yield block
    else:
        yield from blocks


def _deviation(components: Tensor) -> Tensor:
    """The standard deviation of each component: sqrt(E[x²] − E[x]²), forty times as fast as `std` on a CPU."""
    squares = torch.linalg.vector_norm(components, dim=(1, 2)).square() / components[0].numel()
    return (squares - components.mean((1, 2)).square()).clamp(min=0).sqrt()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


__all__ = ["LayerDependency", "StackDependency", "layer_dependency", "own_dependency"]

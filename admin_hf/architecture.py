"""The names of a Transformer's parts: its stacks, their sub-layers, and the stock classes.

A **sub-layer** is a branch and the connection that joins it with its shortcut. A **stack** is a list of layers that
all have the same sub-layers, and an **architecture** is the stacks of a model type of Transformers, with the classes
that a vanilla model has. The names are Marian's, which [`AdminForConditionalGeneration`] also uses for its weights.

```python
>>> from admin_hf.architecture import DECODER

>>> [sublayer.kind for sublayer in DECODER.sublayers]
['self-attention', 'encoder-attention', 'feed-forward']
>>> DECODER.index("layers.1.final_layer_norm"), DECODER.sublayer("layers.1.final_layer_norm").reads
(5, ('fc1',))

```
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.marian.configuration_marian import MarianConfig
from transformers.models.marian.modeling_marian import MarianModel, MarianMTModel
from transformers.models.pegasus.configuration_pegasus import PegasusConfig
from transformers.models.pegasus.modeling_pegasus import PegasusForConditionalGeneration, PegasusModel


@dataclass(frozen=True)
class Sublayer:
    """One branch of a layer and its surroundings, by the names of modules below the layer.

    Attributes:
        kind: the readable name of the branch.
        norm: the LayerNorm at the shortcut; in an Admin model, the residual connection replaces it.
        reads: the matrices that read the shortcut: modules with a weight, or parameters, such as
            `self_attn.in_proj_weight`. For attention: queries, keys and values in this order, except that keys and
            values of encoder-attention read the encoder's output.
        ends: the matrix that ends the branch.
    """

    kind: str
    norm: str
    reads: tuple[str, ...]
    ends: str


@dataclass(frozen=True)
class Stack:
    """A list of layers in a module of the base model, each with the same sub-layers in turn.

    Attributes:
        name: name of the stack and, unless `module` is another path below the base model, of its module.
        sublayers: in execution order. A layer may lack some, as BERT's lack encoder-attention.
        prefix: beginning of the names of its inputs, such as `decoder_` in `decoder_input_ids`.
        layers: path of the list of layers below the module.
        front: path below the base model of the LayerNorm whose output is the first layer's input, apart from dropout;
            empty if there is none.
        time_first: whether hidden states are `(length, rows, d_model)`.
    """

    name: str
    sublayers: tuple[Sublayer, ...]
    prefix: str = ""
    layers: str = "layers"
    front: str = ""
    module: str | None = None
    time_first: bool = False

    @property
    def path(self) -> str:
        """Path of the list of layers, below the base model."""
        return f"{self.name if self.module is None else self.module}.{self.layers}".strip(".")

    def depth(self, config: PretrainedConfig) -> int:
        """The number of sub-layers of a model's stack."""
        return len(self.sublayers) * int(getattr(config, f"{self.name}_layers"))

    def index(self, norm: str) -> int:
        """The place of a sub-layer in the stack, from 0, by its norm's name below it: `layers.0.final_layer_norm`."""
        layer, _, name = norm.removeprefix(f"{self.layers}.").partition(".")
        return int(layer) * len(self.sublayers) + [sublayer.norm for sublayer in self.sublayers].index(name)

    def sublayer(self, norm: str) -> Sublayer:
        """The sub-layer with this norm, such as `layers.0.final_layer_norm`."""
        return self.sublayers[self.index(norm) % len(self.sublayers)]


@dataclass(frozen=True)
class Architecture:
    """A model type of Transformers: its stacks in execution order, and its classes.

    Attributes:
        stacks: in execution order.
        residual: the residual system that computes what the stock classes compute.
        config, base, translation: the classes of configuration, bare model, and model with an output layer.
    """

    stacks: tuple[Stack, ...]
    residual: str
    config: type[PretrainedConfig]
    base: type[PreTrainedModel]
    translation: type[PreTrainedModel]


# The matrices of a layer of Marian's: of an attention, and of the feed-forward branch
QUERY, KEY, VALUE, OUTPUT = "q_proj", "k_proj", "v_proj", "out_proj"
INNER, OUTER = "fc1", "fc2"

_SELF_ATTENTION = Sublayer(
    "self-attention",
    "self_attn_layer_norm",
    (f"self_attn.{QUERY}", f"self_attn.{KEY}", f"self_attn.{VALUE}"),
    f"self_attn.{OUTPUT}",
)
_ENCODER_ATTENTION = Sublayer(
    "encoder-attention", "encoder_attn_layer_norm", (f"encoder_attn.{QUERY}",), f"encoder_attn.{OUTPUT}"
)
_FEED_FORWARD = Sublayer("feed-forward", "final_layer_norm", (INNER,), OUTER)

ENCODER = Stack("encoder", (_SELF_ATTENTION, _FEED_FORWARD))
DECODER = Stack("decoder", (_SELF_ATTENTION, _ENCODER_ATTENTION, _FEED_FORWARD), "decoder_")
# The stacks of an Admin model, by name
STACKS = {stack.name: stack for stack in (ENCODER, DECODER)}

MARIAN = Architecture((ENCODER, DECODER), "admin", MarianConfig, MarianModel, MarianMTModel)
PEGASUS = Architecture((ENCODER, DECODER), "pre_ln", PegasusConfig, PegasusModel, PegasusForConditionalGeneration)
# By model type: what an Admin model can be folded into, and start from
ARCHITECTURES = {architecture.config.model_type: architecture for architecture in (MARIAN, PEGASUS)}

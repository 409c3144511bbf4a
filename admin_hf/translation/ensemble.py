"""An ensemble: several models with one vocabulary that translate together."""

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput


# Transformers' name of a cache: `cache`, and up to 5.23 `past_key_values`
_CACHE = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"

# What members must share: a token is the same id for all of them
_SHARED = ("vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id")


# Differences to a translation model of Transformers:
# - the encoder's output is that of all members, side by side
# - the logits are the logarithm of the mean of the members' probabilities
# - every member has its own cache
class Ensemble(PreTrainedModel, GenerationMixin):
    """Models whose next token is chosen by the mean of their probabilities.

    It generates like any model, with stock `generate` and the generation settings of the first member. Depths, widths
    and classes of the members may differ.

    Args:
        members: translation models with one vocabulary, on one device. They are used, not copied.

    Raises:
        ValueError: there is no member, or vocabularies or special tokens differ.

    Example:

    ```python
    model = Ensemble([AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in ("seed-1", "seed-2")])
    translate(model, tokenizer, ["Ein Hund rennt."])
    ```
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, members: Sequence[PreTrainedModel]) -> None:
        if not members:
            raise ValueError("An ensemble needs at least one model.")
        for number, member in enumerate(members):
            _check_member(member, members[0], number)
        shared: dict[str, Any] = {name: getattr(members[0].config, name, None) for name in _SHARED}
        super().__init__(PreTrainedConfig(is_encoder_decoder=True, **shared))
        limits = [limit for member in members if (limit := getattr(member.config, "max_position_embeddings", None))]
        self.config.max_position_embeddings = min(limits, default=None)
        self.members = nn.ModuleList(members)
        self.generation_config = copy.deepcopy(members[0].generation_config)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate makes no cache: each member does, with its own depth

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _Encoders(self.members)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """The log-probabilities of the next tokens.

        Args:
            input_ids: `(batch, source)`.
            attention_mask: `(batch, source)`.
            decoder_input_ids: `(batch, target)`, or only its last token if there are caches.
            encoder_outputs: outputs of `get_encoder()`; the last hidden state is
                `(batch, source, sum of the widths)`.
            kwargs: the caches, by the name that Transformers has for them.

        Returns:
            `logits`: log of the mean of the members' probabilities, `(batch, target, vocabulary)` in float32.
        """
        encoded: Any = encoder_outputs or self.get_encoder()(input_ids, attention_mask)
        given: _Caches | None = kwargs.get(_CACHE)
        widths = [cast(Any, member).config.hidden_size for member in self.members]
        log_probabilities, caches = [], []
        for number, (member, hidden) in enumerate(
            zip(self.members, encoded.last_hidden_state.split(widths, dim=-1), strict=True)
        ):
            output = member(
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden.to(member.dtype)),
                use_cache=use_cache,
                return_dict=True,
                **{_CACHE: given.caches[number] if given is not None else None},
            )
            log_probabilities.append(output.logits.float().log_softmax(-1))
            caches.append(output[_CACHE] if use_cache else None)
        mean = torch.stack(log_probabilities).logsumexp(0) - math.log(len(self.members))
        return Seq2SeqLMOutput(logits=mean, **{_CACHE: cast(Any, _Caches(caches)) if use_cache else None})


class _Encoders(nn.Module):
    """The members' encoders."""

    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(cast(Any, member).get_encoder() for member in members)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> BaseModelOutput:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "return_dict": True}
        hidden = [encoder(**inputs).last_hidden_state for encoder in self.encoders]
        return BaseModelOutput(last_hidden_state=torch.cat(hidden, dim=-1))


class _Caches:
    """What `generate` asks of a cache, of all members' caches."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self.caches = caches

    def get_seq_length(self, layer: int = 0) -> int:
        return self.caches[0].get_seq_length(layer)

    def reorder_cache(self, beams: Tensor) -> None:
        for cache in self.caches:
            cache.reorder_cache(beams)


def _check_member(member: PreTrainedModel, first: PreTrainedModel, number: int) -> None:
    for name in _SHARED:
        found, expected = (getattr(model.config, name, None) for model in (member, first))
        if found != expected:
            raise ValueError(
                f"The models of an ensemble need one vocabulary, but {name} of the first is {expected} and of number "
                f"{number + 1} {found}: use models that were trained with the same tokenizer."
            )

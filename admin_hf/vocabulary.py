"""The vocabulary of a vanilla model: the embeddings that converters expect for its tokenizer."""

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.marian.modeling_marian import MarianMTModel

from .positions import save_own_tables
from .special_tokens import BANNING_BIAS, check_tokenizer, vocabulary_size


Model = TypeVar("Model", bound=PreTrainedModel)

# The weights with one row per entry; the bias of the logits has one column per entry
EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "lm_head.weight")


def fit_vocabulary(model: Model, tokenizer: PreTrainedTokenizerBase) -> Model:
    """Return the model with an embedding for each entry of its tokenizer, without those that no entry uses.

    A vocabulary that was rounded up for speed has unused embeddings, and CTranslate2's converter refuses them. It also
    drops the last row of a Marian model, because it expects `<pad>` there. If another token is last, a row of zeros
    that is never predicted is added after it. The logits of all entries do not change.

    Args:
        model: a vanilla model from [`reparameterize`]. It is returned itself if it fits.
        tokenizer: the tokenizer of both languages; with one vocabulary per language, nothing is changed.

    Raises:
        ValueError: the model was not made for this tokenizer (see [`check_tokenizer`]).
    """
    check_tokenizer(model, tokenizer)
    entries = rows = vocabulary_size(tokenizer)
    if isinstance(model, MarianMTModel) and tokenizer.convert_ids_to_tokens(entries - 1) != "<pad>":
        rows += 1
    sizes = {getattr(model.config, name, None) for name in ("vocab_size", "decoder_vocab_size")} - {None}
    if getattr(tokenizer, "separate_vocabs", False) or sizes == {rows}:
        return model

    def fitted(name: str, value: Tensor) -> Tensor:
        if name.endswith(EMBEDDINGS):
            return torch.cat([value[:entries], value.new_zeros(rows - entries, value.shape[1])])
        if name.endswith("final_logits_bias"):
            return torch.cat([value[:, :entries], value.new_full((1, rows - entries), BANNING_BIAS)], dim=1)
        return value

    config: Any = copy.deepcopy(model.config)
    for name in ("vocab_size", "decoder_vocab_size"):
        if hasattr(config, name):
            setattr(config, name, rows)
    with torch.random.fork_rng(devices=[]):  # a constructor draws weights
        result: Any = type(model)(config)
    result.to(model.device, model.dtype).eval()
    result.load_state_dict({name: fitted(name, value) for name, value in model.state_dict().items()})
    result.generation_config = copy.deepcopy(model.generation_config)
    save_own_tables(result)
    return cast(Model, result)


__all__ = ["fit_vocabulary"]

"""The ids of padding and sentence end that a model takes from its tokenizer, and checks of tokenizer and batch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


# The bias that bans a token. Not -inf: Trainer's label smoother sums log-probabilities over the vocabulary.
BANNING_BIAS = -1e4
# A bias below this bans a token, whatever its rounding.
BANNED = -1e3

MENDED = (
    "Make a new model by `AdminForConditionalGeneration(AdminConfig.for_tokenizer(tokenizer, …))`; a trained one "
    "needs the tokenizer that was saved with it."
)

# Special tokens by their purpose; a tokenizer may have others, such as language codes
_ENDS, _STARTS = ("eos_token", "sep_token"), ("pad_token", "eos_token", "bos_token", "cls_token")


def required_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The ids of padding and of the end of a sentence.

    Raises:
        ValueError: the tokenizer lacks one of them, or one token is both.
    """
    for name, kind, token in (("pad_token", "padding", "<pad>"), ("eos_token", "end-of-sentence", "</s>")):
        if getattr(tokenizer, f"{name}_id") is None:
            raise ValueError(
                f"The tokenizer has no {kind} token: choose one of its own, `tokenizer.{name} = …`, or add one, "
                f"`tokenizer.add_special_tokens({{{name!r}: {token!r}}})`, before you make the model."
            )
    pad, eos = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    if pad == eos:
        raise ValueError(
            f"The tokenizer pads with its end-of-sentence token {tokenizer.eos_token!r}, which could never be learnt: "
            "add another, `tokenizer.add_special_tokens({'pad_token': '<pad>'})`, before you make the model."
        )
    return pad, eos


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of embeddings that a tokenizer needs: one for each id up to its greatest."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with other special tokens than those that the model was made with.

    A model with other ids trains without an error, but treats a real word as a special token: it never predicts it, or
    starts from it. This checks what the model really does: which tokens it bans, which embedding is that of padding,
    and which tokens generation starts from and ends with. Trainer overwrites ids of the configuration with those of
    the tokenizer, which changes none of this.

    Args:
        model: an Admin model, or a stock model with Marian's or Pegasus's architecture.
        tokenizer: the tokenizer that encodes the sentences of the model.

    Raises:
        ValueError: the tokenizer has no padding or end-of-sentence token, or more entries than the model, or ids
            differ. The message names each one.

    Example:

    ```python
    model = AdminForConditionalGeneration(AdminConfig.for_tokenizer(tokenizer, encoder_layers=18, decoder_layers=18))
    check_tokenizer(model, tokenizer)
    ```
    """
    pad, eos = required_ids(tokenizer)
    config, generation = model.config, getattr(model, "generation_config", None)
    entries = vocabulary_size(tokenizer)
    size = min(config.vocab_size, getattr(config, "decoder_vocab_size", None) or config.vocab_size)
    if entries > size:
        raise ValueError(f"The tokenizer has {entries:,} entries, but the model's vocabulary {size:,}. {MENDED}")

    def ids(name: str) -> set[int]:
        """What configuration and generation settings say."""
        values = [getattr(holder, name, None) for holder in (config, generation)]
        return {i for value in values if value is not None for i in (value if isinstance(value, list) else [value])}

    others = set(tokenizer.all_special_ids) - _own(tokenizer, tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    ends, found_ends = _own(tokenizer, _ENDS) | others, ids("eos_token_id")
    embedding = model.get_input_embeddings()
    bias = getattr(model, "final_logits_bias", None)
    banned = [] if bias is None or bias.device.type == "meta" else (bias[0] < BANNED).nonzero().flatten().tolist()
    padding_idx = getattr(embedding, "padding_idx", None)
    padding = ids("pad_token_id") | ({padding_idx} if isinstance(padding_idx, int) else set())
    # An action of the model, the ids that it uses, and the ids that it should use
    checks: list[tuple[str, set[int], set[int], int]] = [
        ("pads with", padding, {pad}, pad),
        ("never predicts", {i for i in banned if i < entries}, {pad}, pad),
        ("ends sentences with", found_ends, ends if eos in found_ends else {eos}, eos),
        ("ends the longest sentences with", ids("forced_eos_token_id"), ends, eos),
        ("starts decoding from", ids("decoder_start_token_id"), _own(tokenizer, _STARTS) | others, pad),
    ]
    wrong = [
        f"it {what} {_named(i, tokenizer)} instead of {_named(expected, tokenizer)}"
        for what, found, allowed, expected in checks
        for i in sorted(found)
        if i not in allowed
    ]
    if wrong:
        raise ValueError(f"The model was not made for this tokenizer: {'; '.join(wrong)}. {MENDED}")


def _own(tokenizer: PreTrainedTokenizerBase, names: Iterable[str]) -> set[int]:
    return {i for i in (getattr(tokenizer, f"{name}_id") for name in names) if i is not None}


def _named(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
    return f"{token_id}" if token is None else f"{token_id} ({token!r})"


def check_padding(batch: Mapping[str, Any], pad_token_id: int) -> None:
    """Refuse a batch with wrong padding: labels that contain the padding id, or sources padded on the left.

    Args:
        batch: the arguments of the model's forward, as tensors; entries may be missing or None.

    Raises:
        ValueError: the padding is wrong; the message says what to do.
    """
    labels, mask, ids = batch.get("labels"), batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(labels, Tensor) and (count := int((labels == pad_token_id).sum())):
        raise ValueError(
            f"labels contain the padding id {pad_token_id} ({count} of {labels.numel()} entries): the loss would "
            "count padding as words, which this model never predicts. Pad labels with −100, as "
            "`DataCollatorForSeq2Seq(tokenizer, model=model)` does (label_pad_token_id=-100)."
        )
    if isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.dim() == 2 and mask.shape == ids.shape:
        left = (mask[:, 0] == 0) & (ids[:, 0] == pad_token_id) & mask.bool().any(1)
        if rows := int(left.sum()):
            raise ValueError(
                f"{rows} of {len(ids)} sources are padded on the left: the model counts positions from the first "
                "column, so that the same sentence would differ from batch to batch. Set "
                "`tokenizer.padding_side = 'right'`."
            )


def never_ends(batch: Mapping[str, Any], eos_token_ids: Sequence[int]) -> bool:
    """Whether no target of a batch contains the end of a sentence, so that a model could not learn to stop."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or not eos_token_ids or not bool((labels != -100).any()):
        return False
    return not bool(torch.isin(labels, torch.tensor(eos_token_ids, device=labels.device)).any())


__all__ = ["check_padding", "check_tokenizer", "never_ends"]

"""Compares two models that should compute the same, on random batches: logits and decoded tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .architecture import STACKS
from .observation import observed
from .special_tokens import BANNED


# Longest row that is compared: memory grows with its square.
MAX_LENGTH = 1024


def verify(model: PreTrainedModel, vanilla: PreTrainedModel, tolerance: float) -> None:
    """Compare two models on random batches, both in eval mode and with the same dtype.

    Args:
        tolerance: largest difference allowed, as a share of the largest output of `model`.

    Raises:
        ValueError: their outputs differ by more, or they decode different tokens and no tie explains it.
    """
    generator = torch.Generator().manual_seed(0)
    longest = min(model.config.max_position_embeddings, MAX_LENGTH)
    for rows, length in ((4, min(24, longest)), (1, longest)):
        batch = _random_batch(model, rows, length, generator)
        expected, found = _outputs(model, batch), _outputs(vanilla, batch)
        largest = float((expected - _bias(model)).abs().max())
        difference = float((expected - found).abs().max())
        if not difference <= tolerance * largest:
            raise ValueError(
                f"The vanilla model's outputs differ by {difference:.2g} from the model's, {tolerance * largest:.2g} "
                "is allowed, so nothing was exported. The first to differ is "
                f"{_first_difference(model, vanilla, batch)}: its connection, or the one before, does not compute "
                "what its scales say."
            )
        if rows > 1 and model.can_generate():
            _compare_greedy(model, vanilla, batch, 2 * tolerance * largest)


def _first_difference(model: PreTrainedModel, vanilla: PreTrainedModel, batch: dict[str, Tensor]) -> str:
    """The projection that ends the first branch whose output differs between the two models by more than a factor."""
    ends = tuple(sublayer.ends for stack in STACKS.values() for sublayer in stack.sublayers)
    expected, found = (_branch_outputs(either, ends, batch) for either in (model, vanilla))
    differing = (name for name, output in expected.items() if not output.allclose(found[name], 1e-5, 1e-7))
    return next(differing, "the output layer")


def _branch_outputs(model: PreTrainedModel, ends: tuple[str, ...], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[name] = output / output.norm()

    with observed(((name, module) for name, module in model.named_modules() if name.endswith(ends)), keep):
        model(**batch, use_cache=False)
    return outputs


def _random_batch(model: PreTrainedModel, rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tokens but padding; every row but the first is shorter than the one before, and padded."""
    config = model.config
    sides = {}
    for prefix, vocab_size in (("", config.vocab_size), ("decoder_", config.decoder_vocab_size or config.vocab_size)):
        ids = torch.randint(vocab_size - 1, (rows, length), generator=generator)
        ids += ids >= config.pad_token_id
        lengths = torch.linspace(length, min(2, length), rows).long()
        mask = torch.arange(length) < lengths[:, None]
        sides[f"{prefix}input_ids"] = ids.where(mask, config.pad_token_id).to(model.device)
        sides[f"{prefix}attention_mask"] = mask.long().to(model.device)
    sides["decoder_input_ids"][:, 0] = config.decoder_start_token_id
    return sides


def _outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the real positions but of banned tokens (as padding is); hidden states without an output layer."""
    outputs = model(**batch, use_cache=False)
    real = batch["decoder_attention_mask"].bool()
    if not model.can_generate():
        return outputs.last_hidden_state[real]
    return outputs.logits[real].masked_fill(model.final_logits_bias < BANNED, 0.0)


def _bias(model: Any) -> Tensor | float:
    if not model.can_generate():
        return 0.0
    return model.final_logits_bias.masked_fill(model.final_logits_bias < BANNED, 0.0)


def _compare_greedy(model: Any, vanilla: Any, batch: dict[str, Tensor], margin: float) -> None:
    config = model.config
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_length=min(16, config.max_position_embeddings),
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for m in (model, vanilla):  # on copies; otherwise `generate` would complete the settings from the models' own
        m.generation_config = settings
    expected, found = (m.generate(**source) for m in (model, vanilla))
    steps = min(expected.sequences.shape[1], found.sequences.shape[1])
    differs = expected.sequences[:, :steps] != found.sequences[:, :steps]
    for row in differs.any(1).nonzero().flatten().tolist():
        step = int(differs[row].int().argmax()) - 1  # the first token is the decoder's start
        best, second = expected.logits[step][row].topk(2).values.tolist()
        if best - second > margin:
            raise ValueError(
                f"The vanilla model decodes other tokens than the model: at step {step} of greedy decoding the best "
                f"two logits are {best - second:.2g} apart, so nothing was exported."
            )


__all__ = ["verify"]

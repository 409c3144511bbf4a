"""Engines that search for translations and score them: a model of Transformers, or one of CTranslate2."""

import copy
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..observation import modes_restored


Ids = list[int]


class Engine(Protocol):
    """Translates batches of token ids.

    Attributes:
        generation_config: the default settings of its search.
        positions: the most tokens of a source or target; None if that is not limited, or not known.
    """

    generation_config: GenerationConfig
    positions: int | None

    def search(self, sources: list[Ids], prefix: Ids, settings: GenerationConfig) -> list[list[Ids]]:
        """The best `settings.num_return_sequences` translations of each source, the best first.

        Args:
            prefix: forced beginning of every translation; the results do not contain it.
            settings: `max_length` counts the decoder's start token and the prefix, as in Transformers.

        Returns:
            Ids with the end-of-sentence token, or without it if `max_length` was reached before.
        """

    def score(self, sources: list[Ids], prefix: Ids, targets: list[list[Ids]]) -> list[list[float]]:
        """log p(target | source, prefix) of the results of `search`."""


class TransformersEngine:
    """Translates with `generate` of a model.

    Raises:
        ValueError: the model is not an encoder-decoder that generates.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not (model.can_generate() and model.config.is_encoder_decoder):
            raise ValueError(
                f"{type(model).__name__} does not translate: expected an encoder-decoder with a language model head, "
                "such as AutoModelForSeq2SeqLM loads."
            )
        self.model: Any = model
        self.generation_config: GenerationConfig = self.model.generation_config
        self.positions: int | None = getattr(model.config, "max_position_embeddings", None)

    def search(self, sources: list[Ids], prefix: Ids, settings: GenerationConfig) -> list[list[Ids]]:
        start = [self._start, *prefix]
        decoder_input_ids = torch.tensor([start] * len(sources), device=self.model.device)
        with modes_restored(self.model):
            # The same weights with only these settings; settings passed as an argument would be completed from the
            # model's own
            model = copy.copy(self.model.eval())
            model.generation_config = settings
            rows = model.generate(**self._inputs(sources), decoder_input_ids=decoder_input_ids)
        found = [_until(ids[len(start) :], self._ends, self._pad) for ids in rows.tolist()]
        each = len(found) // len(sources)
        return [found[first : first + each] for first in range(0, len(found), each)]

    @torch.no_grad()
    def score(self, sources: list[Ids], prefix: Ids, targets: list[list[Ids]]) -> list[list[float]]:
        start, inputs, columns = [self._start, *prefix], self._inputs(sources), []
        with modes_restored(self.model):
            encoder_outputs = self.model.eval().get_encoder()(**inputs, return_dict=True)
            for rank in zip(*targets, strict=True):  # one translation of each source at a time, to save memory
                decoder_input_ids, _ = self._padded([[*start, *target[:-1]] for target in rank])
                labels, mask = self._padded(list(rank))
                logits = self.model(
                    encoder_outputs=encoder_outputs,
                    attention_mask=inputs["attention_mask"],
                    decoder_input_ids=decoder_input_ids,
                ).logits[:, len(start) - 1 :]
                log_p = logits.float().log_softmax(-1).gather(2, labels[:, :, None])[:, :, 0]
                columns.append(log_p.masked_fill(mask == 0, 0).sum(1).tolist())
        return [list(scores) for scores in zip(*columns, strict=True)]

    def _inputs(self, sources: list[Ids]) -> dict[str, Tensor]:
        return dict(zip(("input_ids", "attention_mask"), self._padded(sources), strict=True))

    def _padded(self, rows: list[Ids]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        ids = [row + [self._pad] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    @property
    def _start(self) -> int:
        return int(self._setting("decoder_start_token_id", "bos_token_id"))

    @property
    def _ends(self) -> Ids:
        ends = self._setting("eos_token_id")
        return ends if isinstance(ends, list) else [ends]

    @property
    def _pad(self) -> int:
        pad = self._setting("pad_token_id", "eos_token_id")
        return int(pad[0] if isinstance(pad, list) else pad)

    def _setting(self, *names: str) -> Any:
        """The first of these settings that has a value, of the generation or of the model."""
        holders = (self.generation_config, self.model.config)
        values = [getattr(holder, name, None) for name in names for holder in holders]
        if not (found := [value for value in values if value is not None]):
            raise ValueError(f"The model has no {names[0]}: set it in its configuration.")
        return found[0]


class CTranslate2Engine:
    """Translates with CTranslate2.

    Its search ends with as many finished translations as beams, like `early_stopping=True` of Transformers.

    Args:
        translator: a `ctranslate2.Translator`.
        tokenizer: the tokenizer of the model that was converted.
        generation_config: the settings of the search; CTranslate2 does not store any.
        positions: the most tokens of a source or target, which CTranslate2 does not store.
    """

    def __init__(
        self,
        translator: Any,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig | None = None,
        positions: int | None = None,
    ) -> None:
        self.translator, self.tokenizer = translator, tokenizer
        self.generation_config, self.positions = generation_config or GenerationConfig(), positions

    def search(self, sources: list[Ids], prefix: Ids, settings: GenerationConfig) -> list[list[Ids]]:
        try:
            results = self._translate(sources, prefix, settings)
        except RuntimeError as error:  # only a source beyond the table of positions is found so late
            raise ValueError(
                f"CTranslate2 cannot translate a line: {error}. If the line is too long, name the model that it "
                "was converted from by --tokenizer: its config.json has the limit, and longer lines are cut."
            ) from error
        return [
            [cast(Ids, self.tokenizer.convert_tokens_to_ids(tokens))[len(prefix) :] for tokens in result.hypotheses]
            for result in results
        ]

    def _translate(self, sources: list[Ids], prefix: Ids, settings: GenerationConfig) -> list[Any]:
        found: list[Any] = self.translator.translate_batch(
            self._tokens(sources),
            target_prefix=self._tokens([prefix] * len(sources)) if prefix else None,
            beam_size=settings.num_beams,
            num_hypotheses=settings.num_return_sequences,
            length_penalty=1.0 if settings.length_penalty is None else settings.length_penalty,
            repetition_penalty=settings.repetition_penalty or 1.0,
            no_repeat_ngram_size=settings.no_repeat_ngram_size or 0,
            max_input_length=0,  # by default it cuts silently
            max_decoding_length=settings.max_length - 1,  # it does not count the start
            min_decoding_length=0,  # 1 by default: the first step's softmax then lacks the end
            return_end_token=True,
        )
        return found

    def score(self, sources: list[Ids], prefix: Ids, targets: list[list[Ids]]) -> list[list[float]]:
        pairs = [(source, target) for source, found in zip(sources, targets, strict=True) for target in found]
        results = self.translator.score_batch(
            self._tokens([source for source, _ in pairs]),
            self._tokens([[*prefix, *target] for _, target in pairs]),
            max_batch_size=len(sources),
            max_input_length=0,
        )
        # It also scores the end that it appends, which is not part of the translation
        ranges = [slice(len(prefix), len(prefix) + len(target)) for _, target in pairs]
        scores = [sum(result.log_probs[part]) for result, part in zip(results, ranges, strict=True)]
        each = len(targets[0])
        return [scores[first : first + each] for first in range(0, len(scores), each)]

    def _tokens(self, rows: Sequence[Ids]) -> list[Any]:
        return [self.tokenizer.convert_ids_to_tokens(row) for row in rows]


def _until(ids: Ids, ends: Ids, pad: int) -> Ids:
    """The ids up to the first end of a sentence, or without the padding after them if there is none."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    while ids and ids[-1] == pad:
        ids = ids[:-1]
    return ids

"""Seq2SeqTrainer for translation: scores against the text itself, and stops when it is asked to."""

import logging
import signal
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PredictionOutput

from .metrics import TranslationMetric


logger = logging.getLogger(__name__)


# Differences to Seq2SeqTrainer:
# - BLEU, chrF and TER against the references' text, where the data set has it, not against detokenised labels
# - the model smooths labels itself (config.label_smoothing), so Trainer's label smoother stays off
# - evaluation keeps the order of its data set, and shortcut scales get no weight decay
# - the folder of the run, with its checkpoints and arguments, is never what is pushed to the Hub
class TranslationTrainer(Seq2SeqTrainer):
    """A [`~transformers.Seq2SeqTrainer`] that scores translations.

    Args:
        metric: what scores translations.
        kwargs: as [`~transformers.Seq2SeqTrainer`], with the tokenizer as `processing_class`.
    """

    def __init__(self, metric: TranslationMetric, **kwargs: Any) -> None:
        super().__init__(compute_metrics=self._score, **kwargs)
        self.label_smoother = None
        self.metric = metric
        self.signatures: dict[str, str] = {}
        self._references: list[str] | None = None

    def evaluate(self, eval_dataset: Dataset | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._references = _references(eval_dataset if eval_dataset is not None else self.eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> PredictionOutput:
        self._references = _references(test_dataset)
        return super().predict(test_dataset, *args, **kwargs)

    def end_autocast(self) -> None:
        """Compute in the weights' own precision from here on, as the users of the saved model will."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.native_amp = False

    def decode(self, predictions: np.ndarray) -> list[str]:
        """Detokenise generated ids, `(sentences, longest)`, padded with −100 or the padding id."""
        tokenizer: PreTrainedTokenizerBase = self.processing_class
        return tokenizer.batch_decode(
            np.where(predictions < 0, tokenizer.pad_token_id, predictions), skip_special_tokens=True
        )

    def _score(self, prediction: EvalPrediction) -> dict[str, float]:
        if not self.args.predict_with_generate or self._references is None:
            return {}
        # Several processes fill the last batch up with sentences from the start
        predictions = self.decode(prediction.predictions[: len(self._references)])
        scores = self.metric.compute(predictions=predictions, references=self._references)
        self.signatures = {name: score for name, score in scores.items() if isinstance(score, str)}
        return {name: score for name, score in scores.items() if name not in self.signatures}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.lengths = sampler.lengths[:]  # a list at once: a column of a data set is read one by one
        return sampler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = True) -> None:
        super().save_model(output_dir, _internal_call=True)  # a call of the user's would push the folder

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # training_args.bin holds all arguments, but is no place for a token
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _get_eval_sampler(self, eval_dataset: Dataset) -> SequentialSampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Tied weights and positions are never saved, so that they are missing is nothing to warn of
        expected = {*self.model.all_tied_weights_keys, *self.model._keys_to_ignore_on_save}
        if load_result.unexpected_keys or not expected.issuperset(load_result.missing_keys):
            super()._issue_warnings_after_load(load_result)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".omega")]


def _references(dataset: Dataset | None) -> list[str] | None:
    return list(dataset["target"]) if dataset is not None and "target" in dataset.column_names else None


class TranslationCollator(DataCollatorForSeq2Seq):
    """Pads sources with the padding token and labels with −100; source text alone has no labels, not `labels=None`."""

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        return {name: value for name, value in super().__call__(features, return_tensors).items() if value is not None}


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint when the process is asked to stop (Ctrl-C or SIGTERM).

    The update (and evaluation) under way is finished, then a checkpoint is saved. A second Ctrl-C stops at once.

    Attributes:
        received: the signal that was received, if any.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        logger.warning(f"{self.received.name} received: saving a checkpoint after the update or evaluation under way.")

    def _stop(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    # Also in the middle of an evaluation, which comes before the save of the same update
    on_step_end = on_prediction_step = on_evaluate = _stop

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

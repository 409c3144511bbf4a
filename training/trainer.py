"""Seq2SeqTrainer for translation: token batches, the paper's optimisation, scores against the text itself."""

import functools
import logging
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import GradScalerKwargs
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from admin_hf.compilation import CompiledPass, why_not_compiled
from admin_hf.monitoring import ResidualMonitor, perplexity
from admin_hf.parallel_text import as_written, is_blank
from admin_hf.sharding import sharding

from .batching import BucketCollator, Buckets, TokenBatchSampler, longest_side, round_up
from .checkpointing import ResumableTrainer
from .metrics import MultilingualMetric, TranslationMetric
from .monitor import TranslationProgress, UpdateMonitor
from .moving_average import MovingAverage
from .optimization import RADAM, radam, warm_up_from
from .segmentation import BpeDropout, DropoutCollator
from .signals import outlive_signals


logger = logging.getLogger(__name__)


# Differences to Seq2SeqTrainer:
# - BLEU, chrF and TER against the references' text, where the data set has it, not against detokenised labels
# - the model smooths labels itself (config.label_smoothing), so Trainer's label smoother stays off
# - `--max_tokens` makes batches of a number of tokens; RAdam, a warm-up that starts above 0, a window of loss scaling
# - `--ema_decay` averages the weights; the average is evaluated and saved, and is the model when training is over
# - `--bpe_dropout` draws the segmentation of training pairs when batches are made
# - the loss of an evaluation is the mean over all its targets, not over batches of few and of many
# - every update is watched: for logs, for the progress bar, and for divergence
# - `--torch_compile` compiles the layers for training alone, and replays CUDA graphs of batches of few shapes
# - evaluation keeps the order of its data set
# - the folder of the run, with its checkpoints and arguments, is never what is pushed to the Hub
class TranslationTrainer(ResumableTrainer):
    """A [`~transformers.Seq2SeqTrainer`] that scores translations.

    Args:
        metric: what scores translations.
        residuals: what watches the model's residual connections, for the logs.
        segmentation: what draws the segmentation of training pairs anew, if anything.
        kwargs: as [`~transformers.Seq2SeqTrainer`], with the tokenizer as `processing_class`.
    """

    def __init__(
        self,
        metric: TranslationMetric | MultilingualMetric,
        residuals: ResidualMonitor | None = None,
        segmentation: BpeDropout | None = None,
        **kwargs: Any,
    ) -> None:
        own = kwargs["model"].generation_config
        super().__init__(compute_metrics=self._score, **kwargs)
        if self.args.generation_config is not None:  # Trainer forgets what the file does not say, as special tokens
            given, self.model.generation_config = self.model.generation_config, own
            own.update(**given.to_diff_dict())
        self.monitor = UpdateMonitor(self.accelerator, self.args.fp16_min_scale, residuals)
        self.add_callback(self.monitor)
        self.moving_average = MovingAverage(self.model, self.args.ema_decay)
        if self.args.ema_decay:
            self.add_callback(self.moving_average)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TranslationProgress(self.monitor))
        self.label_smoother = None
        self.segmentation = segmentation
        self.metric = metric
        self.signatures: dict[str, str] = {}
        # What is evaluated, while there is an evaluation
        self._evaluated_set: Dataset | None = None
        # Sum of losses and number of targets, while there is an evaluation
        self._evaluated: torch.Tensor | None = None

    def evaluate(self, eval_dataset: Dataset | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._evaluated_set, self.signatures = eval_dataset if eval_dataset is not None else self.eval_dataset, {}
        with self.moving_average.in_place():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> PredictionOutput:
        self._evaluated_set, self.signatures = test_dataset, {}
        return super().predict(test_dataset, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._evaluated = torch.zeros(2, device=self.args.device)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            loss, targets = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
        finally:
            self._evaluated = None
        if targets:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / targets
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        if (labels := inputs.get("labels")) is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        last = self.accelerator.gradient_state
        if last.end_of_dataloader and last.remainder > 0:
            # Several processes fill the last batches up with sentences from the start
            is_real = torch.arange(len(labels)) + self.args.process_index * len(labels) < last.remainder
            labels = labels.masked_fill(~is_real.to(labels.device).unsqueeze(1), -100)
        loss, *others = super().prediction_step(model, inputs | {"labels": labels}, *args, **kwargs)
        targets = labels.ne(-100).sum().to(loss.device)
        self._evaluated += torch.stack([torch.where(targets > 0, loss * targets, 0.0), targets])
        return loss, *others

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        # The loss of a batch in an evaluation is the mean over its own targets
        return super()._get_num_items_in_batch(*args, **kwargs) if self._evaluated is None else None

    def end_autocast(self) -> None:
        """Compute in the weights' own precision from here on, as the users of the saved model will."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.native_amp = False

    def end_sharding(self) -> None:
        """Save and evaluate a whole model from here on, though weights were spread over the processes in training."""
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False

    def translations(self, predictions: np.ndarray, dataset: Dataset) -> list[str]:
        """The lines that generated ids stand for, as they are scored and written: one each, blank for a blank source.

        Args:
            predictions: `(sentences, longest)`, padded with −100 or the padding id. Several processes fill the last
                batch up with sentences from the start, which are left out.
            dataset: what was translated, with the column `source`.
        """
        sources = dataset["source"][:]
        tokenizer: PreTrainedTokenizerBase = self.processing_class
        ids = np.where(predictions < 0, tokenizer.pad_token_id, predictions)[: len(sources)]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return ["" if is_blank(source) else as_written(text) for source, text in zip(sources, texts, strict=True)]

    def _score(self, prediction: EvalPrediction) -> dict[str, float]:
        dataset = self._evaluated_set
        if not self.args.predict_with_generate or dataset is None or "target" not in dataset.column_names:
            return {}
        columns = {
            "predictions": self.translations(prediction.predictions, dataset),
            "references": dataset["target"][:],
            **{name: dataset[name][:] for name in ("language",) if name in dataset.column_names},
        }
        is_scored = [not is_blank(target) for target in columns["references"]]
        if not any(is_scored):
            return {}
        scores = self.metric.compute(**{name: [*compress(column, is_scored)] for name, column in columns.items()})
        self.signatures = {name: score for name, score in scores.items() if isinstance(score, str)}
        return {name: score for name, score in scores.items() if name not in self.signatures}

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        if self.segmentation is not None:
            return self.segmentation.lengths(self.train_dataset)
        return self.train_dataset.with_format("numpy")["length"][:]

    @functools.cached_property
    def buckets(self) -> Buckets:
        """The shapes of training batches under `--torch_compile`."""
        size = {"max_tokens": self.args.max_tokens} if self.args.max_tokens else {"rows": self.args.train_batch_size}
        return Buckets(int(self._lengths.max()), self.args.length_multiple, **size)

    @functools.cached_property
    def train_collator(self) -> Any:
        """What makes a batch of training pairs."""
        collator, longest = self.data_collator, None
        if self.args.torch_compile:
            collator = BucketCollator(self.processing_class, self.accelerator.unwrap_model(self.model), self.buckets)
            longest = self.buckets.longest
        elif self.args.max_tokens:
            longest = functools.partial(longest_side, self.args.max_tokens, self.args.length_multiple)
        return collator if self.segmentation is None else DropoutCollator(self.segmentation, collator, longest)

    @functools.cached_property
    def batch_sampler(self) -> TokenBatchSampler:
        """The batches of `--max_tokens`."""
        lengths, multiple = self._lengths, self.args.length_multiple
        return TokenBatchSampler(
            self.buckets.round_up(lengths) if self.args.torch_compile else round_up(lengths, multiple),
            self.args.max_tokens,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            multiple_of=self.args.gradient_accumulation_steps * self.args.world_size,
        )

    def get_train_dataloader(self) -> DataLoader:
        if self.args.max_tokens is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=self.batch_sampler,
            collate_fn=self.train_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=outlive_signals,
        )
        return self.accelerator.prepare(loader)  # which deals whole batches out to the processes in turn

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last &= is_training  # every sentence is scored and translated
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        if is_training:
            inner.collate_fn = self.train_collator
        inner.worker_init_fn = functools.partial(outlive_signals, then=inner.worker_init_fn)
        return loader

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        if self.segmentation is not None:
            self.train_collator.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def _remove_unused_columns(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        if self.segmentation is not None and dataset is self.train_dataset:
            return dataset  # its collator reads columns that the model does not
        return super()._remove_unused_columns(dataset, *args, **kwargs)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        if args.max_tokens is None:
            return super().get_total_train_batch_size(args)
        pairs, batches = len(self.train_dataset), len(self.batch_sampler)
        return round(pairs / batches * args.gradient_accumulation_steps * args.world_size)

    # --- optimisation ---

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        if args.optim == RADAM:
            return radam(args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)
        return Seq2SeqTrainer.get_optimizer_cls_and_kwargs(args, model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if created and self.args.warmup_init_lr and isinstance(scheduler, LambdaLR):
            initial = self.args.warmup_init_lr / self.args.learning_rate
            scheduler = warm_up_from(scheduler, initial, self.args.get_warmup_steps(num_training_steps))
        self.lr_scheduler = scheduler
        return scheduler

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        args = super()._build_accelerator_args(**kwargs)
        args.pop("dynamo_plugin", None)  # the model as a whole is never compiled
        args["kwargs_handlers"].append(GradScalerKwargs(growth_interval=self.args.fp16_scale_window))
        # Or each batch waits for the GPU. No argument of the run, for nothing that is computed depends on it
        args["dataloader_config"].non_blocking = self.args.device.type == "cuda"
        return args

    @functools.cached_property
    def compiled_pass(self) -> CompiledPass | None:
        """The training pass of `--torch_compile`; None without it, and where it cannot be."""
        if not self.args.torch_compile:
            return None
        model = self.accelerator.unwrap_model(self.model)
        if (kind := sharding(self.args)) is not None:
            reason: str | None = f"{kind} spreads the weights."
        elif self.args.n_gpu > 1:
            reason = f"one process drives {self.args.n_gpu} GPUs; start one for each with torchrun."
        else:
            reason = why_not_compiled(model)
        if reason is not None:
            logger.warning(f"--torch_compile: this run is not compiled, because {reason}")
            return None
        logger.info(
            "Compiling the layers: the first updates take about a minute, and the first of each shape takes a while."
        )

        def loss(num_items_in_batch: torch.Tensor, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with self.compute_loss_context_manager():
                loss, outputs = super(TranslationTrainer, self).compute_loss(
                    model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
                )
            return loss, outputs["nll_loss"]

        scaler = self.accelerator.scaler
        scale = {} if scaler is None else {"scale": scaler.scale}
        return CompiledPass(model, loss, backend=self.args.torch_compile_backend, **scale)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self.compiled_pass is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # a schedule-free one
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        loss, nll = self.compiled_pass({**inputs, "num_items_in_batch": num_items_in_batch})
        if self.accelerator.sync_gradients:
            self.compiled_pass.average_gradients()
        self.monitor.add(loss / self.accelerator.num_processes, nll, inputs)
        return loss

    # --- what a run shows ---

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            # Trainer has multiplied the loss by the number of processes, over which DDP averages gradients
            self.monitor.add(loss.detach().mean() / self.accelerator.num_processes, outputs["nll_loss"].sum(), inputs)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.monitor.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.monitor.grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.monitor.log()
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        super().log(logs, start_time)

    # --- saving ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = True) -> None:
        super().save_model(output_dir, _internal_call=True)  # a call of the user's would push the folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.monitor.check_weights(self.state, self.model)
        with self.moving_average.in_place():
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.moving_average.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.args.ema_decay and checkpoint is not None:
            self.moving_average.load(Path(checkpoint))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.moving_average.finish()
        return super()._finalize_training(*args, **kwargs)  # which may load the best checkpoint

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


class EarlyStopping(EarlyStoppingCallback):
    """Trainer's, with a checkpoint when it stops, so that the run is seen to be finished."""

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_save = True

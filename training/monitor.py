"""What each update was: loss, likelihood, tokens, speed, over all processes; for logs, progress bar and divergence."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from admin_hf.monitoring import ResidualMonitor, perplexity

from .divergence import MAX_OVERFLOWS, Divergence, first_non_finite
from .optimization import LossScaleClamp


# A loss is above its start when the last 20 are all above the largest of the first 10. The noise of a loss that only
# stays where it is gets there in about one of 10,000 runs of 10,000 updates.
START, WINDOW = 10, 20
# Without warm-up the first updates may be exploding already: the start is at most this multiple of the first loss
MAX_START = 3.0


class UpdateMonitor(TrainerCallback, ExportableState):
    """Sums up the batches of each update over all processes, and stops training that has diverged.

    Divergence is a loss, a gradient or weights about to be saved that are NaN or infinite, a loss above its start (and
    that of a uniform guess) once warm-up is over, or ten overflows of float16 in a row at the smallest loss scale.

    Attributes:
        loss: of the last update.
        grad_norm: of the gradient that the next update is made with, where the Trainer says it; in float16 it may
            overflow, which only halves the loss scale.

    Args:
        accelerator: the Trainer's.
        min_scale: the smallest loss scale of float16.
        residuals: what watches the residual connections, if anything.

    Raises:
        Divergence: on all processes alike, before the weights are changed or saved.
    """

    def __init__(self, accelerator: Accelerator, min_scale: float, residuals: ResidualMonitor | None = None) -> None:
        self.accelerator = accelerator
        self.residuals = residuals
        self.first_losses: list[float] = []  # of the first updates of the run, and of the last ones
        self.last_losses: list[float] = []
        self.clamp = LossScaleClamp(min_scale)
        self.loss = math.nan
        self.grad_norm: Tensor | float | None = None
        self._update = torch.zeros(5, device=accelerator.device)  # of the update under way, on this process
        self._logged = torch.zeros(5)  # of the updates since the last log, on all
        self._updates, self._seconds, self._then = 0, 0.0, 0.0
        self._scale: float | None = None
        self._inputs: Mapping[str, Any] = {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"first_losses": self.first_losses, "last_losses": self.last_losses}}

    def add(self, loss: Tensor, nll: Tensor, inputs: Mapping[str, Any]) -> None:
        """Add a batch: its shares of the update's loss and negative log-likelihood, and what it holds."""
        labels, sources = inputs["labels"], inputs["input_ids"]
        targets = labels.ne(-100).sum()
        tokens, slots = targets + inputs["attention_mask"].sum(), labels.numel() + sources.numel()
        self._update += torch.stack([loss, nll, targets, tokens, tokens.new_tensor(slots)]).to(self._update)
        self._inputs = inputs

    @property
    def tokens_per_second(self) -> float:
        """Targets per second of training, since the last log."""
        return float(self._logged[2]) / self._seconds if self._seconds else math.nan

    def check_weights(self, state: TrainerState, model: nn.Module) -> None:
        """Raise a Divergence if weights are not finite. To be asked on all processes before a checkpoint is saved."""
        if not all(gather_object([all(bool(weight.isfinite().all()) for weight in model.parameters())])):
            self._diverged(f"weights are not finite after update {state.global_step}", state, model)

    def log(self) -> dict[str, float]:
        """The means of the updates since this was asked last; `tokens` are targets without padding."""
        _, nll, _, tokens, slots = (self._logged / max(self._updates, 1)).tolist()
        values = {
            "nll": nll,
            "perplexity": perplexity(nll),
            "tokens_per_second": self.tokens_per_second,
            "pad_fraction": 1 - tokens / slots if slots else math.nan,
        }
        if self._scale is not None:
            values["loss_scale"] = self._scale
        self._logged.zero_()
        self._updates, self._seconds = 0, 0.0
        return values | (self.residuals.metrics() if self.residuals is not None else {})

    # --- events of the Trainer, in the order of an update ---

    def _start_clock(self, *args: Any, **kwargs: Any) -> None:
        self._then = time.perf_counter()

    on_train_begin = on_evaluate = on_save = _start_clock  # evaluating and saving is not training

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start_clock()
        if args.logging_strategy == IntervalStrategy.EPOCH:
            self._watch_residuals(args)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.logging_strategy == IntervalStrategy.STEPS and (state.global_step + 1) % state.logging_steps == 0:
            self._watch_residuals(args)

    def _watch_residuals(self, args: TrainingArguments) -> None:
        if self.residuals is not None and not args.torch_compile:
            self.residuals.watch_next_pass()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        update = self.accelerator.reduce(self._update, reduction="sum").cpu()
        self._logged += update
        self._updates += 1
        self._update.zero_()
        self.loss = float(update[0])
        self._scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else None
        if not math.isfinite(self.loss):
            self._diverged(f"the loss of update {state.global_step + 1} is {self.loss}", state, model)
        is_float16 = self.accelerator.mixed_precision == "fp16"
        if self.grad_norm is not None and not is_float16 and not math.isfinite(self.grad_norm):
            norm = float(self.grad_norm)
            self._diverged(f"the gradient norm of update {state.global_step + 1} is {norm}", state, model)
        if len(self.first_losses) < START:
            self.first_losses.append(self.loss)
        self.last_losses = [*self.last_losses, self.loss][-WINDOW:]
        guess = math.log(model.config.vocab_size)  # a trained model starts below, and may be worse after warm-up
        start = max(guess, min(max(self.first_losses), MAX_START * self.first_losses[0]))
        warm = state.global_step >= args.get_warmup_steps(state.max_steps) + WINDOW
        if warm and min(self.last_losses) > start:
            self._diverged(
                f"{WINDOW} losses after warm-up are all above the {start:.2f} of "
                f"{'a uniform guess' if start == guess else 'the start'}; now {self.loss:.2f}",
                state,
                model,
            )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._scale is None:
            return
        if self.clamp.update(self.accelerator.scaler, self._scale) >= MAX_OVERFLOWS:
            self._diverged(
                f"{MAX_OVERFLOWS} updates in a row overflowed at the smallest loss scale, {self._scale}", state, model
            )

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._then
        self._start_clock()

    def _diverged(self, what: str, state: TrainerState, model: nn.Module | None) -> None:
        layers = [layer for layer in gather_object([first_non_finite(model, self._inputs)]) if layer is not None]
        raise Divergence(
            f"Training diverged: {what}.", state.global_step, self.loss, self._scale, next(iter(layers), None)
        )


class TranslationProgress(ProgressCallback):
    """Trainer's progress bar with loss and target tokens per second beside it, and a line for each log."""

    # What a line shows; the rest is for TensorBoard and its like, and in trainer_state.json
    SHOWN = ("epoch", "loss", "nll", "perplexity", "learning_rate", "grad_norm", "loss_scale", "tokens_per_second")

    def __init__(self, monitor: UpdateMonitor) -> None:
        super().__init__()
        self.monitor = monitor

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:  # the time left is that of the updates of this session
            self.training_bar.initial = self.training_bar.n = self.training_bar.last_print_n = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(
                f"loss {self.monitor.loss:.3f}, {self.monitor.tokens_per_second:,.0f} tokens/s", refresh=False
            )
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "nll" in logs:
            logs = {name: logs[name] for name in self.SHOWN if name in logs}
        super().on_log(args, state, control, logs=logs, **kwargs)

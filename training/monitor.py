"""Facts on each update (loss, likelihood, tokens, speed) over all processes, for logs, progress bar and divergence."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from admin_hf.monitoring import ResidualMonitor, perplexity

from .divergence import MAX_OVERFLOWS, Divergence, first_non_finite
from .late_values import LateValues
from .optimization import LossScaleClamp, skipping_optimizer


# A loss is above its start when the last 20 are all above the largest of the first 10. The noise of a loss that only
# stays where it is gets there in about one of 10,000 runs of 10,000 updates.
START, WINDOW = 10, 20
# Without warm-up the first updates may be exploding already: the start is at most this multiple of the first loss
MAX_START = 3.0


@dataclass
class _Update:
    """The facts on an update that the host knows before its numbers arrive."""

    number: int  # from 1
    warm: bool  # after warm-up, by so much that all of the last losses are
    model: nn.Module
    inputs: Mapping[str, Any]


class UpdateMonitor(TrainerCallback, ExportableState):
    """Sums up the batches of each update over all processes, and stops training that has diverged.

    Divergence is a loss, a gradient or weights about to be saved that are NaN or infinite, a loss above its start (and
    that of a uniform guess) once warm-up is over, or ten overflows of float16 in a row at the smallest loss scale.

    On a CPU, an update is checked before it changes the weights. On a GPU, reading a number would make the CPU wait in
    every update. There the numbers are read one update late: before the next update changes the weights (overflows
    just after), before each log and each save, and at the end of an epoch. If the optimiser is one of PyTorch's fused
    ones, the GPU itself skips an update whose loss or gradient is not finite, so the weights do not change. With other
    optimisers it may spoil the weights; no checkpoint is saved of them.

    Attributes:
        late: whether numbers are read one update late, as on a GPU.
        loss: loss of the last update that was read; NaN before.
        grad_norm: norm of the gradient of the next update, if the Trainer gives it; in float16 it may overflow, which
            only halves the loss scale.

    Args:
        accelerator: the Trainer's.
        min_scale: the smallest loss scale of float16.
        residuals: the monitor of the residual connections, if any.

    Raises:
        Divergence: on all processes alike.
    """

    def __init__(self, accelerator: Accelerator, min_scale: float, residuals: ResidualMonitor | None = None) -> None:
        self.accelerator = accelerator
        self.residuals = residuals
        self.late = accelerator.device.type == "cuda"
        self.first_losses: list[float] = []  # of the first updates of the run, and of the last ones
        self.last_losses: list[float] = []
        self.clamp = LossScaleClamp(min_scale, accelerator.device)
        self.loss = math.nan
        self.grad_norm: Tensor | float | None = None
        # Of the current update, on this process: loss, nll, target and source tokens
        self._sums: Tensor | None = None
        self._inputs: Mapping[str, Any] = {}
        self._update: _Update | None = None  # the last one that was handed on to be read, and its loss scale
        self._scale_before: Tensor | None = None
        self._skips: Optimizer | None = None  # the optimiser, if it skips an update by itself
        self._values: LateValues[_Update] = LateValues()
        self._overflows: LateValues[_Update] = LateValues()
        self._scale: float | None = None
        self._then = 0.0
        self._begin_log()

    def _begin_log(self) -> None:
        self._read = np.zeros(3)  # nll, target and source tokens of the updates that were read, on all processes
        self._updates_read = 0
        self._updates_made, self._slots, self._seconds = 0, 0, 0.0  # on this process

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"first_losses": self.first_losses, "last_losses": self.last_losses}}

    @torch.no_grad()
    def add(self, loss: Tensor, nll: Tensor, inputs: Mapping[str, Any]) -> None:
        """Add a batch to the current update, without reading it.

        Args:
            loss: its share of the update's loss, a scalar. Like `nll` it may be overwritten after this call.
            nll: its share of the update's negative log-likelihood, a scalar.
            inputs: `input_ids`, `attention_mask` and `labels`, each `(batch, length)`, and other arguments of the
                model. The last batch is kept until the update has been read, to look for the first module with an
                output that is not finite. If it is overwritten earlier, like the buffers of a CUDA graph, a later
                batch is used.
        """
        labels, sources = inputs["labels"], inputs["input_ids"]
        is_target = labels.ne(-100)
        targets = is_target.sum(dtype=torch.float32)
        # Rows without a target only fill up a batch
        tokens = (inputs["attention_mask"] * is_target.any(1, keepdim=True)).sum(dtype=torch.float32)
        sums = torch.stack([loss.float(), nll.float(), targets, tokens])
        self._sums = sums if self._sums is None else self._sums + sums
        self._slots += labels.numel() + sources.numel()
        self._inputs = inputs

    @property
    def tokens_per_second(self) -> float:
        """Targets per second of training, since the last log: those of the mean update in the time of the mean one."""
        if not self._updates_read or not self._seconds:
            return math.nan
        return float(self._read[1]) / self._updates_read * self._updates_made / self._seconds

    def check_weights(self, state: TrainerState, model: nn.Module) -> None:
        """Raise a Divergence if an update until now has diverged, or weights are not finite.

        Call it on all processes before a checkpoint is saved.
        """
        self._catch_up()
        if not all(gather_object([all(bool(weight.isfinite().all()) for weight in model.parameters())])):
            last = _Update(state.global_step + 1, warm=False, model=model, inputs=self._inputs)
            self._diverged(f"weights are not finite after update {state.global_step}", last)

    def log(self) -> dict[str, float]:
        """The means of the updates since the last call; `tokens` are targets without padding."""
        self._catch_up()
        self._stop_clock()  # a GPU may only now have done what was asked of it
        nll, targets, sources = self._read.tolist()
        slots = sum(gather_object([self._slots]))
        nll /= max(self._updates_read, 1)
        values = {
            "nll": nll,
            "perplexity": perplexity(nll),
            "tokens_per_second": self.tokens_per_second,
            "pad_fraction": 1 - (targets + sources) / slots if slots else math.nan,
        }
        if self._scale is not None:
            values["loss_scale"] = self._scale
        self._begin_log()
        return values | (self.residuals.metrics() if self.residuals is not None else {})

    # --- what has been read ---

    def _catch_up(self, *args: Any, held_back: int = 0, **kwargs: Any) -> None:
        """Check all updates but the last `held_back`, in order."""
        for update, values in self._values.arrived(held_back):
            self._check(update, values)
        for update, (overflows,) in self._overflows.arrived(held_back):
            if overflows >= MAX_OVERFLOWS:
                what = f"{MAX_OVERFLOWS} updates in a row overflowed at the smallest loss scale, {self._scale}"
                self._diverged(what, update)

    def _check(self, update: _Update, values: list[float]) -> None:
        grad_norm, loss, nll, targets, sources, *scale = values
        self._read += nll, targets, sources
        self._updates_read += 1
        self.loss, self._scale = loss, scale[0] if scale else None
        if not math.isfinite(loss):
            self._diverged(f"the loss of update {update.number} is {loss}", update)
        if self.accelerator.mixed_precision != "fp16" and not math.isfinite(grad_norm):
            self._diverged(f"the gradient norm of update {update.number} is {grad_norm}", update)
        if len(self.first_losses) < START:
            self.first_losses.append(loss)
        self.last_losses = [*self.last_losses, loss][-WINDOW:]
        # A trained model starts below a uniform guess, and may be worse after warm-up
        guess = math.log(update.model.config.vocab_size)
        start = max(guess, min(max(self.first_losses), MAX_START * self.first_losses[0]))
        if update.warm and min(self.last_losses) > start:
            self._diverged(
                f"{WINDOW} losses after warm-up are all above the {start:.2f} of "
                f"{'a uniform guess' if start == guess else 'the start'}; now {loss:.2f}",
                update,
            )

    def _diverged(self, what: str, update: _Update) -> None:
        found = gather_object([first_non_finite(update.model, update.inputs)])
        layer = next((layer for layer in found if layer is not None), None)
        raise Divergence(f"Training diverged: {what}.", update.number - 1, self.loss, self._scale, layer)

    # --- events of the Trainer, in the order of an update ---

    def _start_clock(self, *args: Any, **kwargs: Any) -> None:
        self._then = time.perf_counter()

    def _stop_clock(self) -> None:
        self._seconds += time.perf_counter() - self._then
        self._start_clock()

    on_evaluate = on_save = _start_clock  # evaluating and saving is not training

    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # Left by an earlier training that was broken off
        self._sums = None
        self._values.clear()
        self._overflows.clear()
        self._begin_log()
        self._skips = skipping_optimizer(optimizer)
        self._start_clock()

    def on_epoch_begin(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        self._start_clock()
        if args.logging_strategy == IntervalStrategy.EPOCH:
            self._watch_residuals()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        if args.logging_strategy == IntervalStrategy.STEPS and (state.global_step + 1) % state.logging_steps == 0:
            self._watch_residuals()

    def _watch_residuals(self) -> None:
        if self.residuals is not None:
            self.residuals.watch_next_pass()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        sums, self._sums = self._sums, None
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        parts, scaler = [self._grad_norm(sums), sums], self.accelerator.scaler
        if scaler is not None:
            self._scale_before = self.clamp.scale(scaler)
            parts.append(self._scale_before.reshape(1))
        values = torch.cat(parts)
        warm = state.global_step >= args.get_warmup_steps(state.max_steps) + WINDOW
        self._update = _Update(state.global_step + 1, warm, kwargs["model"], self._inputs)
        self._values.push(self._update, values)
        self._catch_up(held_back=int(self.late))
        if self.late and self._skips is not None and scaler is None:
            # As a GradScaler tells fused optimisers of an overflow: 1.0 is to skip. 0 · x is NaN where x is not finite
            self._skips.found_inf = values[:2].mul(0).sum().ne_(0)

    def _grad_norm(self, like: Tensor) -> Tensor:
        """The gradient norm, `(1,)`, with dtype and device of `like`; 0 where the Trainer does not say it."""
        norm = self.grad_norm
        if not isinstance(norm, Tensor):
            return like.new_full((1,), 0.0 if norm is None else norm)  # by a kernel: a copy from the host would wait
        if hasattr(norm, "full_tensor"):  # of weights that are spread over the processes
            norm = norm.full_tensor()
        return norm.detach().to(like).reshape(1)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if hasattr(self._skips, "found_inf"):
            del self._skips.found_inf
        if self._scale_before is not None:
            overflows = self.clamp.update(self.accelerator.scaler, self._scale_before)
            self._overflows.push(self._update, overflows.reshape(1))
            self._catch_up(held_back=int(self.late))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._updates_made += 1
        self._stop_clock()

    on_epoch_end = _catch_up  # and so at the end of training


class TranslationProgress(ProgressCallback):
    """Trainer's progress bar with loss and target tokens per second, and a line for each log."""

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
        speed = self.monitor.tokens_per_second
        if self.training_bar is not None and not math.isnan(speed):  # or nothing has been read since the last log
            self.training_bar.set_postfix_str(f"loss {self.monitor.loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "nll" in logs:
            logs = {name: logs[name] for name in self.SHOWN if name in logs}
        super().on_log(args, state, control, logs=logs, **kwargs)

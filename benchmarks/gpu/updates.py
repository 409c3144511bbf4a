"""Whole updates on a GPU, by the real trainers: how long they take, how much memory, and in which kernels."""

import contextlib
import contextvars
import dataclasses
import gc
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import MarianConfig, MarianMTModel, Trainer, TrainerCallback, set_seed

from admin_hf import AdminForConditionalGeneration, AdminProfilingCallback, profile_residuals
from training.model import build_model
from training.signals import StopOnSignal

from .. import systems
from ..record import cost, figure, memory, speed
from ..systems import SEED, Batch, Shape
from ..turns import Over


STOCK = "stock"
PLAIN = "Admin, Seq2SeqTrainer"
OURS = "Admin, run_translation.py"
COMPILED = "Admin, --torch_compile"
SYSTEMS = (STOCK, PLAIN, OURS, COMPILED)
MEASURED_ALONE = (STOCK, COMPILED, OURS)  # for memory, in which the plain trainer is as ours

BATCHES = 8  # different ones, of one shape
WARM_UP = 5  # updates: the first profiles, the second compiles, the third is captured
FASTER = 3  # a turn of the compiled system has so many times the updates

# Times as fast as stock, of the systems as they are and of the compiled one
EAGER_TARGET = 1.0
COMPILED_TARGETS = {"tiny": 4.0, "base": 3.0, "deep": 3.0}
MEMORY, OMEGA, PROFILING, PRODUCTS = 0.6, 1.02, 2.0, 3.0


@dataclass(frozen=True)
class GPUShape(Shape):
    """A model's shape, and its batches: `rows` of `length` positions a side, of which half or more are tokens."""

    rows: int = 256
    length: int = 32
    dropout: float = 0.1

    def overrides(self, residual: str = "admin") -> str:
        changes = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), str(self.dropout))
        changes |= {"encoder_residual": residual, "decoder_residual": residual}
        return ",".join([super().overrides(), *(f"{name}={value}" for name, value in changes.items())])


SHAPES = {
    "tiny": GPUShape(128, 256, 4, layers=4, updates=12),
    "base": GPUShape(512, 2048, 8, layers=6, vocab_size=32_000, updates=10),
    "deep": GPUShape(512, 2048, 8, layers=18, vocab_size=32_000, updates=4),
    "small": GPUShape(128, 256, 4, layers=6, vocab_size=1000, rows=16, length=20, dropout=0.0),  # of the checks
}


@dataclass(frozen=True)
class Bench:
    """What all parts share.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        rounds: turns of every system.
        folder: for what trainers write.
    """

    device: str
    shapes: dict[str, GPUShape]
    rounds: int
    folder: Path

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def backend(self) -> str:
        """Of torch.compile; a dry run need not wait for a compiler."""
        return "inductor" if self.is_gpu else "eager"

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def timed(self, compute: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of a computation, and its result; the GPU is waited for at the ends alone."""
        self.synchronize()
        start = time.perf_counter()
        result = compute()
        self.synchronize()
        return time.perf_counter() - start, result

    def to_device(self, batch: Batch) -> Batch:
        return {name: x.to(self.device) for name, x in batch.items()}


# --- trainers -------------------------------------------------------------------------------------


def fresh() -> None:
    """Free what earlier parts have left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def batches(shape: GPUShape) -> list[Batch]:
    """Different batches on the host, as a DataLoader gives them; both sides are padded to one length."""
    generator = torch.Generator().manual_seed(SEED)
    pad = shape.vocab_size - 1

    def side(padding: int) -> torch.Tensor:
        lengths = torch.randint(shape.length // 2, shape.length + 1, (shape.rows, 1), generator=generator)
        ids = torch.randint(2, pad, (shape.rows, shape.length), generator=generator)
        return ids.where(torch.arange(shape.length) < lengths, padding)

    found = []
    for _ in range(BATCHES):
        sources, labels = side(pad), side(-100)
        shifted = torch.cat([torch.full((shape.rows, 1), pad), labels[:, :-1]], 1)
        found.append({"input_ids": sources, "attention_mask": sources.ne(pad).long(), "labels": labels})
        found[-1]["decoder_input_ids"] = shifted.masked_fill(shifted == -100, pad)
    return found


def targets_of_a_batch(shape: GPUShape) -> float:
    return statistics.mean(int(batch["labels"].ne(-100).sum()) for batch in batches(shape))


def build(bench: Bench, system: str, shape: GPUShape, dtype: str, residual: str = "admin", **changes: Any) -> Trainer:
    """The trainer of a system, on the batches of its shape; `changes` are to its arguments."""
    options = systems.training_options(bench.folder, dtype, fp16=dtype == "float16", max_grad_norm=1.0)
    options |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    options |= {"use_cpu": not bench.is_gpu} | changes
    tokenizer, dataset = systems.word_tokenizer(shape.vocab_size), batches(shape) * 10_000
    if system in (OURS, COMPILED):
        ours = {"config_overrides": shape.overrides(residual)}
        if system == COMPILED:
            ours |= {"torch_compile": True, "torch_compile_backend": bench.backend}
        trainer: Trainer = systems.our_trainer(systems.our_arguments(shape, options, **ours), tokenizer, dataset)
        trainer.train_collator = systems.only
        trainer.remove_callback(StopOnSignal)  # signals can be caught in the main thread alone
    else:
        model = new_model(bench, shape)
        trainer = systems.plain_trainer(stock_model(model) if system == STOCK else model, options, tokenizer, dataset)
        if system == PLAIN:
            trainer.add_callback(AdminProfilingCallback())
    trainer.data_collator = systems.only
    return trainer


def new_model(bench: Bench, shape: GPUShape) -> AdminForConditionalGeneration:
    """The model that run_translation.py begins with, on the CPU; always with the same weights."""
    arguments = systems.our_arguments(shape, systems.training_options(bench.folder, "float32"))
    systems.quiet()
    set_seed(SEED)
    return build_model(arguments, systems.word_tokenizer(shape.vocab_size))


def stock_model(model: AdminForConditionalGeneration) -> MarianMTModel:
    """Stock Marian of the same shape, with new weights: what a vanilla model is."""
    names = {field.name for field in dataclasses.fields(MarianConfig)}
    names -= {"model_type", "architectures", "transformers_version", "dtype"}
    return MarianMTModel(MarianConfig(**{name: x for name, x in model.config.to_dict().items() if name in names}))


class Stepper:
    """A trainer that trains in a thread of its own, some updates at a time, so that several can take turns.

    Whoever asks for updates waits for them, so only one thread runs at a time.

    Example:

    ```python
    with Stepper(trainer) as stepper:
        stepper.step(5)
    ```
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._left: int | None = None
        gate = TrainerCallback()
        gate.on_step_begin = self._wait
        trainer.add_callback(gate)
        # The compiler's options are those of the thread that set them
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._train,), daemon=True)

    def step(self, updates: int) -> None:
        """Train so many updates.

        Raises:
            what the trainer raises; it has ended then.
        """
        if self._thread.ident is None:
            self._thread.start()
        self._asked.put(updates)
        if (error := self._done.get()) is not None:
            raise error

    def turn(self, bench: Bench, updates: int) -> float:
        """Seconds of so many updates."""
        return bench.timed(lambda: self.step(updates))[0]

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._thread.ident is not None:
            self._asked.put(0)
            self._thread.join()
        del self.trainer

    def _wait(self, *args: Any, **kwargs: Any) -> None:
        if not self._left:
            if self._left is not None:
                self._done.put(None)
            self._left = self._asked.get()
            if not self._left:
                raise Over
        self._left -= 1

    def _train(self) -> None:
        try:
            self.trainer.train()
        except Over:
            return
        except BaseException as error:
            self._done.put(error)


# --- parts ----------------------------------------------------------------------------------------


def compare(bench: Bench, name: str, dtype: str, names: Sequence[str] = SYSTEMS) -> dict[str, Any]:
    """Let the systems take turns; and the kernels of an update, and what profiling costs."""
    shape, measured = bench.shapes[name], {}
    updates = {system: shape.updates * (FASTER if system == COMPILED else 1) for system in names}
    with contextlib.ExitStack() as stack:
        steppers = {}
        for system in names:
            stepper = steppers[system] = stack.enter_context(Stepper(build(bench, system, shape, dtype)))
            first_two = stepper.turn(bench, 2)
            stepper.step(WARM_UP - 2)
            measured[system] = {"seconds": [], "updates": [updates[system]] * bench.rounds}
            measured[system] |= {"targets": targets_of_a_batch(shape), "first_two_seconds": first_two}
        for _ in range(bench.rounds):
            for system, stepper in steppers.items():
                measured[system]["seconds"].append(stepper.turn(bench, updates[system]))
        for system, stepper in steppers.items():
            measured[system] |= kernels(bench, stepper)
        figures = []
        for system in names:
            if system != STOCK:
                target = COMPILED_TARGETS[name] if system == COMPILED else EAGER_TARGET
                what = f"{name}, {dtype}: times as fast"
                figures.append(speed(what, measured, system, STOCK, "updates", at_least=target))
        if COMPILED in names:
            measured["profiling"] = _profiling(bench, steppers[OURS].trainer.model, shape)
            figures.append(cost(f"{name}: profiling", measured, "profiling", OURS, "updates", at_most=PROFILING))
    if products := measured.get(COMPILED, {}).get("product_ms"):
        ms = [1e3 * s / n for s, n in zip(*(measured[COMPILED][key] for key in ("seconds", "updates")), strict=True)]
        sides = f"{COMPILED}: {statistics.median(ms):.3g} ms", f"its matrix products: {products:.3g} ms"
        target = {"at_most": PRODUCTS} if name == "base" else {}
        figures.append(figure(f"{name}, {dtype}: time", *sides, [x / products for x in ms], **target))
    return {"measured": measured, "figures": figures}


def _profiling(bench: Bench, model: AdminForConditionalGeneration, shape: GPUShape) -> dict[str, Any]:
    batch = bench.to_device(batches(shape)[0])
    seconds = [bench.timed(lambda: profile_residuals(model, batch))[0] for _ in range(bench.rounds + 1)]
    return {"seconds": seconds[1:], "updates": [1] * bench.rounds}  # the first warms up


def peak_memory(bench: Bench, name: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Peak of what the allocator holds, for each system alone: weights, gradients, optimiser, activations."""
    measured = {}
    for system in MEASURED_ALONE:
        fresh()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        with Stepper(build(bench, system, bench.shapes[name], dtype)) as stepper:
            stepper.step(WARM_UP)
            bench.synchronize()
        measured[system] = {"peak_bytes": torch.cuda.max_memory_reserved(), "import_bytes": before}
    figures = []
    for system in MEASURED_ALONE[1:]:
        target = {"at_most": MEMORY} if system == COMPILED else {}
        figures.append(memory(f"{name}, {dtype}: peak memory", measured, system, STOCK, **target))
    return {"measured": measured, "figures": figures}


def cost_of_omega(bench: Bench, name: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Compiled updates with ω, in units of compiled updates of `post_ln`."""
    shape, measured, pair = bench.shapes[name], {}, ("admin", "post_ln")
    updates = FASTER * shape.updates
    with contextlib.ExitStack() as stack:
        steppers = {}
        for residual in pair:
            trainer = build(bench, COMPILED, shape, dtype, residual)
            steppers[residual] = stack.enter_context(Stepper(trainer))
            steppers[residual].step(WARM_UP)
            measured[residual] = {"seconds": [], "updates": [updates] * bench.rounds}
        for _ in range(bench.rounds):
            for residual, stepper in steppers.items():
                measured[residual]["seconds"].append(stepper.turn(bench, updates))
    figures = [cost(f"{name}, {dtype}: ω", measured, *pair, "updates", at_most=OMEGA)]
    return {"measured": measured, "figures": figures}


# --- kernels --------------------------------------------------------------------------------------

PRODUCT_NAMES = ("gemm", "nvjet", "cutlass", "xmma")
ATTENTION_NAMES = ("fmha", "flash", "sdpa")
OWN_ATTENTION = ("_forward_kernel", "_backward_kernel")  # of admin_hf.short_attention


def kernels(bench: Bench, stepper: Stepper, updates: int = 2) -> dict[str, Any]:
    """What a GPU computes in an update; nothing on a CPU."""
    if not bench.is_gpu:
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        stepper.step(updates)
        bench.synchronize()
    return summary(_device_events(profiler.key_averages()), updates)


def _device_events(events: Any) -> Iterator[tuple[str, float, int]]:
    for event in events:
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel and not getattr(event, "is_user_annotation", False):
            yield event.key, event.self_device_time_total, event.count


def summary(events: Iterator[tuple[str, float, int]], updates: int) -> dict[str, Any]:
    """Of names, microseconds and numbers of calls: an update's busy time, launches, and the ten longest kernels.

    Attention is counted apart from products, though its kernels have the names of both.
    """
    found = sorted(events, key=lambda event: -event[1])
    is_attention = {
        name: name in OWN_ATTENTION or any(part in name.lower() for part in ATTENTION_NAMES) for name, *_ in found
    }
    is_product = {name: any(part in name.lower() for part in PRODUCT_NAMES) for name, *_ in found}

    def milliseconds(chosen: Any) -> float:
        return sum(microseconds for name, microseconds, _ in found if chosen(name)) / 1e3 / updates

    return {
        "busy_ms": milliseconds(lambda name: True),
        "kernels": sum(count for *_, count in found) / updates,
        "product_ms": milliseconds(lambda name: is_product[name] and not is_attention[name]),
        "attention_ms": milliseconds(lambda name: is_attention[name]),
        "longest": [
            [name[:100], microseconds / 1e3 / updates, count / updates] for name, microseconds, count in found[:10]
        ],
    }

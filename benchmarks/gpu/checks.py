"""What must hold on a GPU: it computes what a CPU does, captured passes what eager ones do, and updates never wait."""

import copy
import math
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from admin_hf import AdminForConditionalGeneration, initialize_omega, loss, profile_residuals, reparameterize
from admin_hf.compilation import CompiledPass

from ..systems import Batch
from .updates import COMPILED, OURS, WARM_UP, Bench, GPUShape, Stepper, batches, build, new_model


Check = dict[str, Any]

# Largest relative differences of a loss and of all gradients: to float64, and of a compiled pass to an eager one
TO_FLOAT64 = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 0.1), "float16": (1e-3, 0.02)}
TO_EAGER = {"float32": (1e-5, 1e-4), "bfloat16": (1e-3, 5e-2)}
LOSS_SCALE = 65536.0
OVERFLOWS = 2.0**60  # a loss scale that no gradient in float16 bears


def within(what: str, found: float, at_most: float) -> Check:
    return {"what": what, "found": found, "at_most": at_most, "holds": bool(found <= at_most)}


def holds(what: str, is_so: Any, found: str = "") -> Check:
    return {"what": what, "found": found, "holds": bool(is_so)}


def difference(a: Tensor, b: Tensor) -> float:
    """The norm of their difference, relative to b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def tell(error: BaseException, frames: int = 4) -> str:
    """An error with the functions it came through, without folders."""
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}: {str(error)[:500]} ({' → '.join(places[-frames:])})"


# --- the same as on a CPU -------------------------------------------------------------------------


def profile(bench: Bench) -> list[Check]:
    shape = bench.shapes["small"]
    model, batch = new_model(bench, shape), batches(shape)[0]
    expected, found = profile_residuals(model, batch), profile_residuals(model.to(bench.device), batch)
    pairs = [
        (a, b)
        for stack in ("encoder", "decoder")
        for a, b in zip(getattr(found, stack).omega, getattr(expected, stack).omega, strict=True)
    ]
    return [within("ω as profiled on a CPU", max(abs(a / b - 1) for a, b in pairs), 1e-4)]


def precision(bench: Bench) -> list[Check]:
    """Loss and gradients against float64 on a CPU."""
    shape = bench.shapes["small"]
    batch = batches(shape)[0]
    model = new_model(bench, shape).train()
    model.config.label_smoothing = 0.1
    expected_loss, expected = _loss_and_gradients(copy.deepcopy(model).double(), batch, "float32")
    found = []
    for dtype, (of_loss, of_gradients) in TO_FLOAT64.items():
        if dtype == "float16" and not bench.is_gpu:
            continue
        scale = LOSS_SCALE if dtype == "float16" else 1.0
        on_device = copy.deepcopy(model).to(bench.device)
        value, gradients = _loss_and_gradients(on_device, bench.to_device(batch), dtype, scale)
        found.append(within(f"loss in {dtype} against float64", abs(value / expected_loss - 1), of_loss))
        found.append(within(f"gradients in {dtype} against float64", difference(gradients, expected), of_gradients))
    return found


def _loss_and_gradients(model: nn.Module, batch: Batch, dtype: str, scale: float = 1.0) -> tuple[float, Tensor]:
    with autocast(batch["labels"].device.type, dtype):
        value = model(**batch).loss
    (value * scale).backward()
    return float(value.detach()), flat_gradients(model) / scale


def flat_gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])


def autocast(device: str, dtype: str) -> torch.autocast:
    return torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")


def chunks(bench: Bench, vocab_size: int = 10_000, width: int = 64) -> list[Check]:
    """The loss of so many rows that it takes two chunks, against the losses of rows that one chunk holds."""
    is_cpu = torch.device(bench.device).type == "cpu"
    chunk = (loss.CHUNK_ELEMENTS if is_cpu else loss.GPU_CHUNK_ELEMENTS) // vocab_size
    rows, found = chunk + chunk // 2, []
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, width, generator=generator) / width**0.5 for size in (rows, vocab_size))
    labels = torch.randint(1, vocab_size, (1, rows), generator=generator)
    parts = [slice(None)], [slice(0, chunk), slice(chunk, rows)]
    for dtype in ("float32", "bfloat16"):
        results = []
        for part in parts:
            h, w = (x.to(bench.device, copy=True).requires_grad_() for x in (hidden[None], weight))
            bias, y = h.new_zeros(1, vocab_size), labels.to(bench.device)
            with autocast(h.device.type, dtype):
                values = [loss.linear_cross_entropy(h[:, at], w, bias, y[:, at], 0, 0.1, rows)[0] for at in part]
            value = sum(values[1:], values[0])
            value.backward()
            results.append((float(value.detach()), torch.cat([x.grad.flatten().double().cpu() for x in (h, w)])))
        (several, of_several), (one, of_one) = results
        found.append(within(f"loss in chunks, {dtype}", abs(several / one - 1), 1e-6))
        found.append(within(f"gradients in chunks, {dtype}", difference(of_several, of_one), TO_EAGER[dtype][1]))
    return found


def generation(bench: Bench) -> list[Check]:
    model, source = _profiled_model(bench)
    beams = {"num_beams": 4, "max_new_tokens": 16}
    cached, uncached = (model.generate(**source, **beams, use_cache=use) for use in (True, False))
    greedy = {"num_beams": 1, "do_sample": False, "max_new_tokens": 16}
    dynamic = model.generate(**source, **greedy)
    static = model.generate(**source, **greedy, cache_implementation="static", disable_compile=True)
    return [
        holds("beams with a cache are those without", torch.equal(cached, uncached)),
        holds("greedy tokens with a static cache are those with a dynamic one", torch.equal(dynamic, static)),
    ]


def export(bench: Bench) -> list[Check]:
    model, source = _profiled_model(bench)
    vanilla = reparameterize(model).eval()
    decoder_input_ids = source["input_ids"].flip(0)
    with torch.no_grad():
        pair = [each(**source, decoder_input_ids=decoder_input_ids).logits for each in (model, vanilla)]
    return [within("logits of the vanilla model", float((pair[0] - pair[1]).abs().max()), 2e-5)]


def _profiled_model(bench: Bench) -> tuple[AdminForConditionalGeneration, Batch]:
    shape = bench.shapes["small"]
    model, batch = new_model(bench, shape).to(bench.device).eval(), bench.to_device(batches(shape)[0])
    initialize_omega(model, profile_residuals(model, batch))
    return model, {name: batch[name] for name in ("input_ids", "attention_mask")}


# --- compiled and captured passes -----------------------------------------------------------------


def captured(bench: Bench) -> list[Check]:
    """A CUDA graph against the compiled pass that it captured, from the same random state."""
    model, with_graph, batch = _compiled(bench, bench.shapes["base"], "bfloat16")
    _, without, _ = _compiled(bench, bench.shapes["base"], "bfloat16", model)
    without.record = None
    for run in (with_graph, without):
        for _ in range(3):
            run(batch)

    def seeded(run: CompiledPass, seed: int) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        torch.manual_seed(seed)
        return run(batch)[0], flat_gradients(model)

    (replayed, of_replayed), (expected, of_expected) = seeded(with_graph, 1), seeded(without, 1)
    other, _ = seeded(with_graph, 2)
    return [
        within("loss of a replay against the same pass uncaptured", difference(replayed, expected), 1e-6),
        within("gradients of a replay against the same pass uncaptured", difference(of_replayed, of_expected), 1e-3),
        holds("replays of different random states differ", replayed != other, f"{float(replayed - other):.3g}"),
    ]


def compiled_is_eager(bench: Bench, dtype: str) -> list[Check]:
    """A compiled pass, replayed, against an eager one; without dropout."""
    shape = replace(bench.shapes["tiny"], dropout=0.0, layers=2)
    model, run, batch = _compiled(bench, shape, dtype)
    expected, of_expected = _loss_and_gradients(model, batch, dtype)
    for _ in range(3):
        model.zero_grad()
        value = float(run(batch)[0])
    of_loss, of_gradients = TO_EAGER[dtype]
    found = difference(flat_gradients(model), of_expected)
    return [
        within(f"loss of a compiled pass against an eager one, {dtype}", abs(value / expected - 1), of_loss),
        within(f"gradients of a compiled pass against an eager one, {dtype}", found, of_gradients),
    ]


def _compiled(
    bench: Bench, shape: GPUShape, dtype: str, model: AdminForConditionalGeneration | None = None
) -> tuple[AdminForConditionalGeneration, CompiledPass, Batch]:
    model = model or new_model(bench, shape).to(bench.device).train()

    def loss_of(**batch: Tensor) -> tuple[Tensor, ...]:
        with autocast(bench.device, dtype):
            return (model(**batch).loss,)

    return model, CompiledPass(model, loss_of, backend=bench.backend), bench.to_device(batches(shape)[0])


# --- whole updates --------------------------------------------------------------------------------


def no_wait(bench: Bench) -> list[Check]:
    """Updates in which a wait of the host for the GPU is an error; they neither log nor save."""
    found = []
    for system in (OURS, COMPILED):
        watch, problem = WaitsAreErrors(), ""
        with Stepper(build(bench, system, bench.shapes["base"], "bfloat16", logging_steps=10**6)) as stepper:
            stepper.trainer.add_callback(watch)  # after all others
            stepper.step(WARM_UP)
            watch.is_on = True
            try:
                stepper.step(3)
            except RuntimeError as error:
                problem = tell(error, frames=6)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(holds(f"{system}: an update never waits for the GPU", not problem, problem))
    return found


class WaitsAreErrors(TrainerCallback):
    """Within updates, when it is on."""

    is_on = False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.is_on:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.is_on:
            torch.cuda.set_sync_debug_mode("default")


def between_updates(bench: Bench) -> list[Check]:
    """Evaluation and generation between compiled updates, against an eager model of the same weights."""
    shape = bench.shapes["tiny"]
    batch = bench.to_device({name: x[:16] for name, x in batches(shape)[0].items()})
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = new_model(bench, shape).to(bench.device).eval()
    with Stepper(build(bench, COMPILED, shape, "bfloat16")) as stepper:
        stepper.step(WARM_UP)
        model = stepper.trainer.model.eval()
        plain.load_state_dict(model.state_dict())
        losses, tokens = [], []
        for each in (model, plain):
            with torch.no_grad(), autocast(bench.device, "bfloat16"):
                losses.append(each(**batch).loss.float())
                tokens.append(each.generate(**source, num_beams=2, max_new_tokens=8))
        stepper.step(3)  # goes on
        is_finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return [
        within("evaluation loss between compiled updates", difference(*losses), 1e-6),
        holds("beams between compiled updates", torch.equal(*tokens)),
        holds("compiled updates go on behind them", is_finite),
    ]


def resume(bench: Bench, dtype: str = "bfloat16", stop: int = 3, end: int = 7) -> list[Check]:
    """A compiled run that goes on from a checkpoint, against one that was not stopped."""
    run = bench.folder / "resumed"
    saves = {"output_dir": str(run), "max_steps": end, "save_strategy": "steps", "save_steps": stop}
    weights = []
    for checkpoint in (None, str(run / f"checkpoint-{stop}")):
        trainer = build(bench, COMPILED, bench.shapes["tiny"], dtype, **saves)
        trainer.train(resume_from_checkpoint=checkpoint)
        weights.append(torch.cat([p.detach().flatten().cpu() for p in trainer.model.parameters()]))
    is_equal = torch.equal(*weights)
    found = within(f"weights of a resumed run, {dtype}, against an uninterrupted one", difference(*weights), 1e-6)
    return [found, holds("they are equal bit for bit", is_equal)]


def loss_scale(bench: Bench, system: str) -> list[Check]:
    """The loss scale of float16 grows after `fp16_scale_window` updates, and halves at an overflow."""
    window = 4
    trainer = build(bench, system, bench.shapes["tiny"], "float16", fp16_scale_window=window)
    with Stepper(trainer) as stepper:
        scales = []
        for _ in range(2 * window):
            stepper.step(1)
            scales.append(trainer.accelerator.scaler.get_scale())
        expected = [LOSS_SCALE] * (window - 1) + [2 * LOSS_SCALE] * window + [4 * LOSS_SCALE]
        trainer.accelerator.scaler.update(OVERFLOWS)
        stepper.step(1)
        after = trainer.accelerator.scaler.get_scale()
    exponents = ", ".join(f"2^{math.log2(scale):g}" for scale in scales)
    return [
        holds(f"{system}: the loss scale doubles every {window} updates", scales == expected, exponents),
        holds(f"{system}: an overflow halves it", after == OVERFLOWS / 2, f"2^{math.log2(after):g} of 2^60"),
    ]

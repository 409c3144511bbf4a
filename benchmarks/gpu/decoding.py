"""Decoding on a GPU: `generate` of a vanilla model with a static cache and compiled steps, against its defaults.

Transformers compiles the steps of greedy search with a static cache by itself, but not those of beam search, whatever
`compile_config` says: `_beam_search` calls the model as it is. To reorder the beams it also puts new tensors into the
static cache in every step, and asks each layer on the host whether it is empty. [`compiled_steps`] mends all three.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from admin_hf.modeling_admin import given_cache

from ..record import speed
from .updates import Bench, batches, new_model, stock_model


STOCK, STATIC, COMPILED = "stock generate", "static cache", "static cache, compiled steps"
TARGET = 2.0  # times as fast as stock


def decode(bench: Bench, name: str, rows: int) -> dict[str, Any]:
    """Greedy search and 5 beams over `rows` sources, as long as they are, by a vanilla model in bfloat16."""
    shape = bench.shapes[name]
    model = stock_model(new_model(bench, shape)).eval().to(bench.device, torch.bfloat16)
    model.generation_config.eos_token_id = None  # all sentences are of one length
    batch = bench.to_device({key: batches(shape)[0][key][:rows] for key in ("input_ids", "attention_mask")})
    measured: dict[str, Any] = {}
    figures = []
    for beams in (1, 5):
        search = f"{beams} beams" if beams > 1 else "greedy"
        generate = functools.partial(
            model.generate, **batch, num_beams=beams, do_sample=False, max_new_tokens=shape.length
        )
        static = functools.partial(generate, cache_implementation="static")
        ways: dict[str, Callable[[], Tensor]] = {STOCK: generate, STATIC: static}
        if beams > 1:
            ways[COMPILED] = compiled_steps(model, bench.backend)(static)
        found = measured[search] = take_turns(bench, ways)
        for result in found.values():
            result |= {"rows": len(batch["input_ids"]), "new_tokens": shape.length}
        pairs = [(way, STOCK) for way in found if way != STOCK]
        targets = [{"at_least": TARGET} if way == pairs[-1][0] else {} for way, _ in pairs]
        what = f"{rows} rows, {search}: times as fast"
        figures += [speed(what, found, *pair, **target) for pair, target in zip(pairs, targets, strict=True)]
    return {"measured": measured, "figures": figures}


def take_turns(bench: Bench, ways: dict[str, Callable[[], Tensor]]) -> dict[str, dict[str, Any]]:
    """Seconds of each in each round, of its first call, and the share of sentences that are as the first way's."""
    found: dict[str, dict[str, Any]] = {}
    expected = None
    for name, generate in ways.items():
        seconds, ids = bench.timed(generate)
        expected = ids if expected is None else expected
        same = float((ids == expected).all(1).float().mean()) if ids.shape == expected.shape else 0.0
        found[name] = {"seconds": [], "first_seconds": seconds, "same_sentences": same}
        for _ in range(2):  # CUDA graphs are recorded in the second call
            generate()
    for _ in range(bench.rounds):
        for name, generate in ways.items():
            found[name]["seconds"].append(bench.timed(generate)[0])
    return found


# --- beams in compiled steps ----------------------------------------------------------------------


@contextmanager
def compiled_steps(model: PreTrainedModel, backend: str = "inductor") -> Iterator[None]:
    """Within this, beam search with a static cache runs all steps but the first compiled, on a GPU as CUDA graphs."""
    eager, compiled = model.forward, _compiled_forward(model, backend)

    @functools.wraps(eager)
    def forward(*args: Any, **inputs: Any) -> Any:
        return (compiled if _is_filled(given_cache(inputs)) else eager)(*args, **inputs)

    model.forward, model._reorder_cache = forward, reorder_in_place
    try:
        yield
    finally:
        del model.forward, model._reorder_cache


def _compiled_forward(model: PreTrainedModel, backend: str) -> Callable[..., Any]:
    """Compiled once, and kept by the model as `generate` keeps its own."""
    if not hasattr(model, "_compiled_forward"):
        graphs = {"mode": "reduce-overhead"} if backend == "inductor" else {}
        model._compiled_forward = torch.compile(model.forward, backend=backend, **graphs)
    return model._compiled_forward


def _is_filled(cache: Any) -> bool:
    """Whether the first step is over, which makes the tensors of a static cache."""
    return cache is not None and cache.self_attention_cache.layers[0].is_initialized


def reorder_in_place(cache: Any, beams: Tensor) -> Any:
    """Reorder the beams of a static cache, whose tensors CUDA graphs need where they are.

    What the decoder attends to in the source stays: it is the same for all beams of a sentence.
    """
    kept = [x for layer in cache.self_attention_cache.layers for x in (layer.keys, layer.values)]
    torch._foreach_copy_(kept, [x.index_select(0, beams) for x in kept])
    return cache


def rows(measured: dict[str, Any]) -> list[list[str]]:
    """Cells of a table: search, way, rows, seconds, tokens a second, seconds of the first call, equal sentences."""
    found = []
    for search, ways in measured.items():
        for way, result in ways.items():
            seconds = statistics.median(result["seconds"])
            rate = result["rows"] * result["new_tokens"] / seconds
            found.append([search, way, str(result["rows"]), f"{seconds:.3g}", f"{rate:,.0f}"])
            found[-1] += [f"{result['first_seconds']:.1f}", f"{result['same_sentences']:.0%}"]
    return found

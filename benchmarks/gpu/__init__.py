"""What a GPU does with this project, against stock Marian: updates, checks, decoding. `python -m benchmarks gpu`"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..page import table
from ..record import Missing, Settings, conditions
from . import checks, decoding, updates
from .checks import tell
from .updates import COMPILED, OURS, PLAIN, SHAPES, STOCK, Bench, GPUShape, fresh


TITLE = "On a GPU"
ABOUT = (
    "Whole updates by four trainers: stock Marian in `Seq2SeqTrainer`, this project's model in the same, and "
    "run_translation.py's trainer without and with `--torch_compile`. Batches come from the host. They have 256 rows "
    "of 32 positions per side, of which three quarters are tokens. Dropout is 0.1 everywhere, gradients are clipped "
    "at 1, and everything else has Trainer's defaults. Systems take turns in one process; peak memory is that of a "
    "system alone. The numbers hold for the GPU named below, and nothing is claimed for others:"
)
DONE, NO_TIME = "done", "no time"


class NoGPU(Missing):
    """There is no GPU."""

    code = 2


@dataclass(frozen=True)
class Part:
    """A measurement that stands alone.

    Attributes:
        seconds: what it may take; it is left out where less is left.
        run: gives any of `measured`, `figures` and `checks`.
        needs_gpu: whether a dry run leaves it out.
    """

    name: str
    seconds: float
    run: Callable[[Bench], Mapping[str, Any]]
    needs_gpu: bool = False


def _check(name: str, seconds: float, run: Callable[[Bench], list[checks.Check]], needs_gpu: bool = False) -> Part:
    return Part(f"check: {name}", seconds, lambda bench: {"checks": run(bench)}, needs_gpu)


EAGER = (STOCK, PLAIN, OURS)
# The most important first. Compiling a width takes longest; what follows on the same width finds it done.
PARTS = (
    Part("base, bfloat16", 80, partial(updates.compare, name="base", dtype="bfloat16")),
    Part("deep, bfloat16", 35, partial(updates.compare, name="deep", dtype="bfloat16")),
    _check("no wait", 12, checks.no_wait, needs_gpu=True),
    _check("captured", 8, checks.captured),
    Part("memory: base", 12, partial(updates.peak_memory, name="base"), needs_gpu=True),
    Part("tiny, bfloat16", 60, partial(updates.compare, name="tiny", dtype="bfloat16")),
    _check("resume", 8, checks.resume),
    _check("between updates", 6, checks.between_updates),
    _check("profile", 2, checks.profile),
    _check("precision", 4, checks.precision),
    _check("chunks", 3, checks.chunks),
    _check("generation", 5, checks.generation),
    _check("export", 6, checks.export),
    Part("decoding: 64 rows", 45, partial(decoding.decode, name="base", rows=64)),
    _check("loss scale", 4, partial(checks.loss_scale, system=OURS), needs_gpu=True),
    Part("tiny, float16", 8, partial(updates.compare, name="tiny", dtype="float16", names=EAGER), needs_gpu=True),
    Part("base, float16", 12, partial(updates.compare, name="base", dtype="float16", names=EAGER), needs_gpu=True),
    Part("ω: base", 45, partial(updates.cost_of_omega, name="base")),
    Part("memory: tiny", 10, partial(updates.peak_memory, name="tiny"), needs_gpu=True),
    Part("memory: deep", 30, partial(updates.peak_memory, name="deep"), needs_gpu=True),
    _check("compiled, bfloat16", 35, partial(checks.compiled_is_eager, dtype="bfloat16")),
    _check("compiled, float32", 35, partial(checks.compiled_is_eager, dtype="float32")),
    _check("loss scale, compiled", 40, partial(checks.loss_scale, system=COMPILED), needs_gpu=True),
    Part("decoding: 256 rows", 45, partial(decoding.decode, name="base", rows=256)),
)


def measure(
    settings: Settings, shapes: Mapping[str, GPUShape] = SHAPES, device: str = "cuda", parts: Sequence[Part] = PARTS
) -> Iterator[dict[str, Any]]:
    """Measure part after part, and give what is recorded so far after each.

    Args:
        settings: the common settings, of which `seconds` says how long this may take, and `parts` what names contain.
        shapes: of the models: "tiny", "base", "deep" and "small".
        device: "cpu" is a dry run, which leaves out what needs a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise NoGPU("a GPU is needed, and PyTorch sees none.")
    start = time.perf_counter()
    torch._dynamo.config.recompile_limit = 64  # by default as many as one model needs, and here are several
    results = conditions(settings) | {"gpu": torch.cuda.get_device_name() if device == "cuda" else "none (a dry run)"}
    results["versions"]["cuda"] = torch.version.cuda
    results["shapes"] = {name: asdict(shape) for name, shape in shapes.items()}
    found = before(settings, results)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, dict(shapes), settings.rounds, Path(folder))
        for part in parts:
            if settings.parts and not any(wanted in part.name for wanted in settings.parts):
                continue
            left = settings.seconds - (time.perf_counter() - start)
            result = found[part.name] = run(part, bench, left)
            print(f"{part.name}: {result['state']}, {result['seconds']:.1f} s", file=sys.stderr, flush=True)
            results["parts"] = {each.name: found[each.name] for each in parts if each.name in found}
            results["figures"] = [figure for each in results["parts"].values() for figure in each.get("figures", [])]
            yield results
    print("\n".join([*table(results["figures"]), "", more(results)]))


def before(settings: Settings, results: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that an earlier command has measured, where this one measures others alone, on the same card."""
    path = settings.output / "gpu.json"
    if not settings.parts or not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    return earlier["parts"] if all(earlier[name] == results[name] for name in ("gpu", "versions", "shapes")) else {}


def run(part: Part, bench: Bench, left: float) -> dict[str, Any]:
    """What a part gives, its `state` and `seconds`; what goes wrong is told in the state."""
    if part.needs_gpu and not bench.is_gpu:
        return {"state": "needs a GPU", "seconds": 0.0}
    if left < part.seconds:
        return {"state": NO_TIME, "seconds": 0.0}
    start, result = time.perf_counter(), {}
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # what a training run prints
            fresh()
            result, state = dict(part.run(bench)), DONE
    except Exception as error:
        state = tell(error)
    return {"state": state, "seconds": time.perf_counter() - start} | result


# --- what is shown --------------------------------------------------------------------------------


def more(results: dict[str, Any]) -> str:
    """Tables of updates, of decoding and of checks, and what was not measured."""
    parts = results["parts"]
    tables = [_updates_table(parts), _decoding_table(parts), _checks_table(parts)]
    missing = [f"{name} ({_one_line(part['state'])})" for name, part in parts.items() if part["state"] != DONE]
    if missing:
        tables.append([f"Not measured: {'; '.join(missing)}."])
    return "\n\n".join("\n".join(lines) for lines in tables if lines)


def _updates_table(parts: dict[str, Any]) -> list[str]:
    rows = []
    for name, part in parts.items():
        for system, measured in part.get("measured", {}).items():
            if "first_two_seconds" not in measured:
                continue
            seconds = statistics.median(s / n for s, n in zip(measured["seconds"], measured["updates"], strict=True))
            cells = [name, system, f"{1e3 * seconds:.3g}", f"{measured['targets'] / seconds:,.0f}"]
            cells.append(f"{measured['first_two_seconds']:.1f}")
            kernels = ("kernels", ",.0f"), ("busy_ms", ".3g"), ("product_ms", ".3g"), ("attention_ms", ".3g")
            rows.append(cells + [f"{measured[key]:{form}}" if key in measured else "" for key, form in kernels])
    head = ["", "system", "ms an update", "targets/s", "first two updates, s", "kernels", "busy, ms", "in products"]
    return _table([*head, "in attention"], rows, texts=2)


def _decoding_table(parts: dict[str, Any]) -> list[str]:
    measured = [part["measured"] for name, part in parts.items() if name.startswith("decoding") and "measured" in part]
    head = ["search", "by", "rows", "s", "target tokens/s", "first call, s", "sentences as stock's"]
    return _table(head, [row for each in measured for row in decoding.rows(each)], texts=2)


def _checks_table(parts: dict[str, Any]) -> list[str]:
    rows = []
    for part in parts.values():
        for check in part.get("checks", []):
            found = check["found"] if isinstance(check["found"], str) else f"{check['found']:.2g}"
            limit = f"≤ {check['at_most']:g}" if "at_most" in check else ""
            rows.append([check["what"], "yes" if check["holds"] else "no", _one_line(found), limit])
    return _table(["check", "holds", "found", "allowed"], rows, texts=2)


def _table(head: list[str], rows: list[list[str]], texts: int) -> list[str]:
    """A table in Markdown whose first columns are texts and whose others are numbers; nothing without rows."""
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] if rows else []


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())

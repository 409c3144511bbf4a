"""Measures translation by Transformers and by CTranslate2, before and after the export of a trained model.

    python -m benchmarks.decoding runs/multi30k-4-4-tiny --source FILE.en --reference FILE.de

All systems get the same batches of sentences sorted by length, the same number of threads and the same search, on the
CPU. Measured is the way from source tokens in memory to target tokens, padding included. The systems take turns, so
that what else the machine does meets all of them.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from admin_hf import AdminForConditionalGeneration
from training.files import write_whole
from training.metrics import TranslationMetric
from training.tokenization import lowercases


Batch = list[list[int]]
Translate = Callable[[Batch, int], Batch]  # from source ids and the number of beams to target ids, with </s>
Name = tuple[str, str]  # of a system: what runs, and in which type of numbers

CONVERTER = Path(sys.executable).with_name("ct2-transformers-converter")  # the command that CTranslate2 installs
BEAMS = (1, 5)
MAX_LENGTH = 128  # target tokens, with </s>
WARM_UP = 2  # batches
PACKAGES = ("torch", "transformers", "ctranslate2", "sacrebleu")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="trained model with its tokenizer")
    parser.add_argument("--source", type=Path, required=True, metavar="FILE", help="text to translate")
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE", help="its translation, line by line")
    parser.add_argument("--sentences", type=int, metavar="N", help="use the first N only (default: all)")
    parser.add_argument("--batch_size", type=int, default=32, help="sentences in a batch (default: 32)")
    parser.add_argument("--threads", type=int, default=1, help="of every system (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each system (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("docs/performance/decoding.json"), metavar="JSON")
    arguments = parser.parse_args(argv)
    sources, references = (lines(path)[: arguments.sentences] for path in (arguments.source, arguments.reference))
    if len(sources) != len(references):
        parser.error(f"{arguments.source} has {len(sources)} lines, {arguments.reference} has {len(references)}.")

    transformers.logging.disable_progress_bar()
    results = measure(arguments, sources, references)
    write_whole(arguments.output, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(table(results))


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


# --- the systems ----------------------------------------------------------------------------------


def load_systems(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, threads: int) -> dict[Name, Translate]:
    """Load the model, and what it becomes when it is exported and converted."""
    torch.set_num_threads(threads)
    model = AdminForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    systems = {("Transformers, ω model", "float32"): with_transformers(model)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(vanilla := f"{folder}/vanilla", reparameterize=True)
        tokenizer.save_pretrained(vanilla)
        stock = AutoModelForSeq2SeqLM.from_pretrained(vanilla)
        systems["Transformers, exported", "float32"] = with_transformers(stock)
        for quantization in ("float32", "int8"):
            out = f"{folder}/{quantization}"
            options = ["--model", vanilla, "--output_dir", out, "--quantization", quantization]
            subprocess.run([CONVERTER, *options], check=True)
            translator = ctranslate2.Translator(out, inter_threads=1, intra_threads=threads)
            systems["CTranslate2, exported", translator.compute_type] = with_ctranslate2(translator, tokenizer)
    return systems


def with_transformers(model: PreTrainedModel) -> Translate:
    pad = model.eval().config.pad_token_id

    def translate(batch: Batch, beams: int) -> Batch:
        longest = max(map(len, batch))
        input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in batch])
        output = model.generate(
            input_ids=input_ids,
            attention_mask=input_ids.ne(pad).long(),
            num_beams=beams,
            early_stopping=beams > 1,  # CTranslate2 stops when it has as many hypotheses as beams
            max_length=MAX_LENGTH + 1,  # the decoder's start counts here
        )
        return [[token for token in ids[1:] if token != pad] for ids in output.tolist()]

    return translate


def with_ctranslate2(translator: ctranslate2.Translator, tokenizer: PreTrainedTokenizerBase) -> Translate:
    def translate(batch: Batch, beams: int) -> Batch:
        results = translator.translate_batch(
            [tokenizer.convert_ids_to_tokens(ids) for ids in batch],
            beam_size=beams,
            max_decoding_length=MAX_LENGTH,
            min_decoding_length=0,  # 1 by default: the first step's softmax then lacks </s>
            return_end_token=True,
        )
        return [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]

    return translate


# --- the measurement ------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, sources: list[str], references: list[str]) -> dict[str, Any]:
    """Time all systems and score their translations, and say under which conditions."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    ids = tokenizer(sources)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    batches = [[ids[i] for i in order[j : j + arguments.batch_size]] for j in range(0, len(ids), arguments.batch_size)]
    systems = load_systems(arguments.checkpoint, tokenizer, arguments.threads)
    metric = TranslationMetric(lowercase=lowercases(tokenizer))
    measurements = []
    for beams in BEAMS:
        for name, (seconds, translations) in take_turns(systems, batches, beams, arguments.rounds).items():
            texts = dict(zip(order, tokenizer.batch_decode(translations, skip_special_tokens=True), strict=True))
            scores = metric.compute(predictions=[texts[i] for i in range(len(ids))], references=references)
            tokens = sum(map(len, translations))
            measurements.append(
                {"system": name[0], "dtype": name[1], "beams": beams, "target_tokens": tokens, "seconds": seconds}
                | {"tokens_per_second": spread(tokens, seconds), "sentences_per_second": spread(len(ids), seconds)}
                | {"bleu": scores["bleu"], "bleu_signature": scores["bleu_signature"]}
            )
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    files = {name: getattr(arguments, name).name for name in ("checkpoint", "source", "reference")}  # no paths
    numbers = {name: getattr(arguments, name) for name in ("batch_size", "threads", "rounds")}
    numbers |= {"sentences": len(ids), "max_length": MAX_LENGTH}
    return files | numbers | {"versions": versions, "measurements": measurements}


def take_turns(
    systems: dict[Name, Translate], batches: list[Batch], beams: int, rounds: int
) -> dict[Name, tuple[list[float], Batch]]:
    """Seconds of each system in each round, and its translations."""
    for translate in systems.values():
        for batch in batches[:WARM_UP]:
            translate(batch, beams)
    seconds: dict[Name, list[float]] = {name: [] for name in systems}
    translations = {}
    for name in tqdm([*systems] * rounds, desc=f"{beams} beams", unit="turn"):
        start = time.perf_counter()
        translations[name] = [ids for batch in batches for ids in systems[name](batch, beams)]
        seconds[name].append(time.perf_counter() - start)
    return {name: (seconds[name], translations[name]) for name in systems}


def spread(count: int, seconds: list[float]) -> dict[str, float]:
    rates = [count / value for value in seconds]
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def table(results: dict[str, Any]) -> str:
    """The results as a table in Markdown, and below it the conditions."""
    rows = ["| system | dtype | beams | target tokens/s | sentences/s | BLEU |"]
    rows += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for entry in results["measurements"]:
        cells = [entry["system"], entry["dtype"], str(entry["beams"])]
        for name, digits in (("tokens_per_second", 0), ("sentences_per_second", 1)):
            median, lowest, highest = (f"{entry[name][key]:,.{digits}f}" for key in ("median", "min", "max"))
            cells.append(f"{median} ({lowest}–{highest})")
        rows.append(f"| {' | '.join(cells)} | {entry['bleu']:.2f} |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    conditions = (
        f"`{results['checkpoint']}`, {results['sentences']:,} sentences of {results['source']} sorted by length, "
        f"{results['batch_size']} in a batch, on a CPU, threads: {results['threads']}. Median (lowest–highest) of "
        f"{results['rounds']} rounds. {versions}. BLEU: `{results['measurements'][0]['bleu_signature']}`."
    )
    return "\n".join([*rows, "", conditions])


if __name__ == "__main__":
    main()

"""Translation by Transformers and by CTranslate2, of a trained model and of its vanilla model."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import ctranslate2
import torch
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from admin_hf import AdminForConditionalGeneration
from admin_hf.parallel_text import read_lines
from training.metrics import TranslationMetric
from training.tokenization import lowercases

from .record import Settings, conditions, cost, need, speed


TITLE = "Decoding"
ABOUT = (
    "A trained model, its exported vanilla model, and the latter in CTranslate2. All use the same batches of "
    "sentences, sorted by length, and the same search, and take turns in one process. The time is from source tokens "
    'in memory to target tokens, padding included. "ω" is the time of the model with ω, relative to the vanilla '
    'model\'s. "times as fast" compares CTranslate2 with Transformers:'
)

Batch = list[list[int]]
Translate = Callable[[list[Batch], int], Batch]  # from source ids and the number of beams to target ids, with </s>
Name = tuple[str, str]  # of a system: what runs, and in which type of numbers

CONVERTER = Path(sys.executable).with_name("ct2-transformers-converter")  # the command that CTranslate2 installs
BEAMS = (1, 5)
MAX_LENGTH = 128  # target tokens, with </s>
WARM_UP = 2  # batches
OMEGA, INT8 = 1.03, 4.0  # targets


# --- the systems ----------------------------------------------------------------------------------


def load_systems(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, threads: int) -> dict[Name, Translate]:
    """Load the model, and what it becomes when it is exported and converted."""
    torch.set_num_threads(threads)
    model = AdminForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    systems = {("Transformers, ω model", "float32"): with_transformers(model)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(vanilla := f"{folder}/vanilla", reparameterize=True)
        tokenizer.save_pretrained(vanilla)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(vanilla)
        systems["Transformers, vanilla", "float32"] = with_transformers(loaded)
        for quantization in ("float32", "int8"):
            out = f"{folder}/{quantization}"
            options = ["--model", vanilla, "--output_dir", out, "--quantization", quantization]
            subprocess.run([CONVERTER, *options], check=True)
            translator = ctranslate2.Translator(out, inter_threads=threads, intra_threads=1)
            systems["CTranslate2, vanilla", translator.compute_type] = with_ctranslate2(translator, tokenizer)
    return systems


def with_transformers(model: PreTrainedModel) -> Translate:
    pad = model.eval().config.pad_token_id

    def translate_batch(batch: Batch, beams: int) -> Batch:
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

    return lambda batches, beams: [ids for batch in batches for ids in translate_batch(batch, beams)]


def with_ctranslate2(translator: ctranslate2.Translator, tokenizer: PreTrainedTokenizerBase) -> Translate:
    def translate(batches: list[Batch], beams: int) -> Batch:
        results = translator.translate_batch(
            [tokenizer.convert_ids_to_tokens(ids) for batch in batches for ids in batch],
            max_batch_size=len(batches[0]),
            beam_size=beams,
            max_decoding_length=MAX_LENGTH,
            min_decoding_length=0,  # 1 by default: the first step's softmax then lacks </s>
            return_end_token=True,
        )
        return [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]

    return translate


# --- the measurement ------------------------------------------------------------------------------


def measure(
    settings: Settings, split: str = "val", sentences: int | None = None, batch_size: int = 32
) -> dict[str, Any]:
    """Time all systems and score their translations.

    Args:
        settings: the common settings, of which `checkpoint` and `data` are used.
        split: the files in `data` to translate from English to German.
        sentences: how many, from the start; all by default.
        batch_size: sentences in a batch.
    """
    files = [settings.data / f"{split}.{language}" for language in ("en", "de")]
    need([settings.checkpoint / "config.json"], "A trained model (--checkpoint)")
    need(files, "Multi30k (--data)")
    sources, references = ([*islice(read_lines(path), sentences)] for path in files)
    tokenizer = AutoTokenizer.from_pretrained(settings.checkpoint)
    ids = tokenizer(sources)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    batches = [[ids[i] for i in order[j : j + batch_size]] for j in range(0, len(ids), batch_size)]
    systems = load_systems(settings.checkpoint, tokenizer, settings.threads)
    metric = TranslationMetric(lowercase=lowercases(tokenizer))
    measurements = []
    for beams in BEAMS:
        for name, (seconds, translations) in take_turns(systems, batches, beams, settings.rounds).items():
            texts = dict(zip(order, tokenizer.batch_decode(translations, skip_special_tokens=True), strict=True))
            scores = metric.compute(predictions=[texts[i] for i in range(len(ids))], references=references)
            tokens = sum(map(len, translations))
            measurements.append(
                {"system": name[0], "dtype": name[1], "beams": beams, "target_tokens": tokens, "seconds": seconds}
                | {"tokens_per_second": spread(tokens, seconds), "sentences_per_second": spread(len(ids), seconds)}
                | {"bleu": scores["bleu"], "bleu_signature": scores["bleu_signature"]}
            )
    names = {"checkpoint": settings.checkpoint.name, "source": files[0].name, "reference": files[1].name}
    sizes = {"sentences": len(ids), "batch_size": batch_size, "max_length": MAX_LENGTH}
    results = names | sizes | conditions(settings)
    return results | {"measurements": measurements, "figures": figures(measurements)}


def figures(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ω model to vanilla model, and CTranslate2 to Transformers."""
    found = []
    for beams in BEAMS:
        search = f"{beams} beams" if beams > 1 else "greedy"
        measured = {f"{e['system']}, {e['dtype']}": e for e in measurements if e["beams"] == beams}
        omega, vanilla, *converted = measured
        found.append(cost(f"{search}: ω", measured, omega, vanilla, at_most=OMEGA))
        for name in converted:
            target = {"at_least": INT8} if beams == max(BEAMS) and "int8" in name else {}
            found.append(speed(f"{search}: times as fast", measured, name, vanilla, **target))
    return found


def take_turns(
    systems: dict[Name, Translate], batches: list[Batch], beams: int, rounds: int
) -> dict[Name, tuple[list[float], Batch]]:
    """Seconds of each system in each round, and its translations."""
    for translate in systems.values():
        translate(batches[:WARM_UP], beams)
    seconds: dict[Name, list[float]] = {name: [] for name in systems}
    translations = {}
    for name in tqdm([*systems] * rounds, desc=f"{beams} beams", unit="turn"):
        start = time.perf_counter()
        translations[name] = systems[name](batches, beams)
        seconds[name].append(time.perf_counter() - start)
    return {name: (seconds[name], translations[name]) for name in systems}


def spread(count: int, seconds: list[float]) -> dict[str, float]:
    rates = [count / value for value in seconds]
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def more(results: dict[str, Any]) -> str:
    """Speed and BLEU of all systems as a table in Markdown, and below it the conditions."""
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

"""The benchmarks at tiny size: what they record, not how fast anything is."""

import json
import multiprocessing
import resource
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from admin_hf.residual import profiled_connections
from benchmarks import BENCHMARKS, corpus, decoding, gpu, load, page, record, systems, training_step, turns
from benchmarks.__main__ import main
from benchmarks.gpu import Part, checks, updates
from benchmarks.gpu.decoding import compiled_steps
from benchmarks.gpu.updates import COMPILED, OURS, PLAIN, STOCK, Bench, GPUShape, Stepper
from benchmarks.omega import Alternating
from benchmarks.record import Settings
from benchmarks.systems import Shape
from training.embedded_data import write_embedded_data
from training.tokenization import save_tokenizer, train_tokenizer


TINY = Shape(16, 32, 2, layers=2, vocab_size=250, max_tokens=256, updates=2)
THREADS = torch.get_num_threads()
ROUNDS = 2

SYSTEMS = """
import os

def writes(turns, name, path):
    turns.next(name=name)
    for turn in range(10**6):
        with open(path, "a") as file:
            file.write(name)
        turns.next(turn=turn)

def fails(turns):
    turns.next()
    raise ArithmeticError("broken")

def dies(turns):
    turns.next()
    os._exit(3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text in `train.en`, `test.en`, … and a tokenizer for it in `model`."""
    folder = tmp_path_factory.mktemp("data")
    write_embedded_data(folder, train=200, validation=8, test=8)
    texts = [(folder / f"train.{side}").read_text().splitlines() for side in ("en", "de")]
    save_tokenizer(train_tokenizer(texts, vocab_size=250, lowercase=True), folder / "model")
    return folder


# --- turns ----------------------------------------------------------------------------------------


@pytest.fixture
def takers(tmp_path, monkeypatch):
    """A module whose functions take turns, which the processes can import too."""
    (tmp_path / "turn_takers.py").write_text(SYSTEMS)
    monkeypatch.syspath_prepend(tmp_path)
    import turn_takers

    yield turn_takers
    del sys.modules["turn_takers"]


@pytest.mark.slow
def test_systems_take_turns(takers, tmp_path):
    path, said = tmp_path / "turns", {}
    writers = {name: partial(takers.writes, name=name, path=str(path)) for name in "AB"}
    measured = turns.take_turns(writers, rounds=3, threads=1, check=said.update)
    assert path.read_text() == "ABABAB"
    assert said == {"A": {"name": "A"}, "B": {"name": "B"}}
    for name, result in measured.items():
        assert result["ready"] == said[name] and result["turn"] == [0, 1, 2] and len(result["seconds"]) == 3
        assert all(seconds > 0 for seconds in result["seconds"])
        assert result["peak_bytes"] >= result["import_bytes"] > 10**7
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("name, message", [("fails", "ArithmeticError: broken"), ("dies", "exit code 3")])
def test_a_process_that_fails_ends_the_benchmark(takers, name, message):
    with pytest.raises(turns.WorkerError, match=message):
        turns.take_turns({name: getattr(takers, name)}, rounds=2, threads=1)
    assert not multiprocessing.active_children()


def test_memory_is_what_the_system_says():
    block = torch.ones(2**24)
    assert 4 * block.numel() < turns.resident_bytes() <= turns.peak_bytes()
    del block
    largest = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert turns.peak_bytes() == pytest.approx(largest, rel=0.02)


# --- what is trained --------------------------------------------------------------------------------


def test_both_trainers_compute_the_same_loss_and_a_changed_weight_is_found(tmp_path):
    stock_folder = systems.export_stock(TINY, tmp_path)
    tokenizer, options = systems.word_tokenizer(TINY.vocab_size), systems.training_options(tmp_path, "float32")
    ours = systems.our_trainer(systems.our_arguments(TINY, options), tokenizer, [])
    batch = systems.random_batches(TINY, ours.data_collator)[0]

    def ready() -> dict:
        stock = systems.stock_trainer(stock_folder, options, tokenizer, [])
        pair = {"Admin, float32": ours, "stock, float32": stock}
        return {name: {"loss": systems.loss_without_dropout(trainer, batch)} for name, trainer in pair.items()}

    training_step.check_losses(ready())
    assert ours.model.model.encoder.layers[0].dropout == 0.1, "dropout is on again"

    weights = load_file(stock_folder / "model.safetensors")
    weights["model.decoder.layers.1.fc2.weight"] *= 1.05
    save_file(weights, stock_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not compute the same"):
        training_step.check_losses(ready())


def test_a_loss_that_is_not_a_number_is_found():
    with pytest.raises(ValueError, match="nan"):
        training_step.check_losses({"stock, float32": {"loss": 5.0}, "Admin, bfloat16": {"loss": float("nan")}})


def test_batches_are_the_same_everywhere_and_as_large_as_asked():
    tokenizer = systems.word_tokenizer(TINY.vocab_size)
    collator = systems.DataCollatorForSeq2Seq(tokenizer)
    first, second = (systems.random_batches(TINY, collator) for _ in range(2))
    assert len(first) == TINY.updates
    for a, b in zip(first, second, strict=True):
        assert all(a[name].equal(b[name]) for name in a)
        assert 0.6 * TINY.max_tokens < max(a["input_ids"].numel(), a["labels"].numel()) <= TINY.max_tokens
        assert a["input_ids"].max() == tokenizer.pad_token_id == TINY.vocab_size - 1
        assert a["labels"].max() < tokenizer.pad_token_id


# --- each benchmark -----------------------------------------------------------------------------------

SIZES = {
    "training_step": {"shapes": {"tiny": TINY}},
    "levers": {"shape": TINY},
    "memory": {"shapes": {"tiny": TINY}, "dtypes": ["float32"]},
    "omega": {"shapes": {"tiny": TINY}, "dtypes": ["float32"]},
    "corpus": {"shape": TINY, "batch_sizes": [4]},
    "data": {"shape": TINY, "workers": [2]},
    "growth": {"shape": TINY, "axes": {"layers": [1, 2]}},
    "very_deep": {"shape": TINY, "layers": (2, 1)},
    "startup": {"pairs": 200, "vocab_size": 250},
    "waiting": {
        "shape": TINY,
        "dtypes": ["float32"],
        "policies": {"asleep": {"OMP_WAIT_POLICY": "PASSIVE"}, "as it is": {}},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_benchmark_gives_a_file_and_a_section_of_the_page(name, folder, tmp_path):
    settings = Settings(THREADS, ROUNDS, data=folder)
    results = load(name).measure(settings, **SIZES[name])

    shutil.copy(page.DOCS / "performance_intro.md", tmp_path)
    path = tmp_path / "performance" / f"{name}.json"
    record.write(path, results)
    recorded = json.loads(path.read_text(encoding="utf-8"))
    assert str(folder) not in path.read_text() and str(Path.home()) not in path.read_text()
    rounds = 1 if name == "memory" else ROUNDS
    assert recorded["threads"] == THREADS and recorded["rounds"] == rounds and recorded["processor"]
    assert {"python", "torch", "transformers"} < recorded["versions"].keys()
    measured = list(systems_in(recorded["measured"]))
    assert measured and all(len(system["seconds"]) == rounds for system in measured)
    for figure in recorded["figures"]:
        assert len(figure["ratios"]) in (1, rounds) and all(ratio > 0 for ratio in figure["ratios"])

    page.main(tmp_path)
    text = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert f"## {load(name).TITLE}" in text
    assert all(f"| {figure['what']} | {figure['a']} | {figure['b']} | **" in text for figure in recorded["figures"])
    assert (tmp_path / "performance" / "growth.png").exists() == (name == "growth")


def systems_in(measured: dict):
    """The systems, wherever they are: by shape or not."""
    for value in measured.values():
        if "seconds" in value:
            yield value
        else:
            yield from systems_in(value)


def test_every_other_turn_is_that_of_post_ln(batch):
    class Begins:
        def next(self, **facts):
            pass

    model = randomize(tiny_model())
    post_ln = tiny_model(encoder_residual="post_ln", decoder_residual="post_ln")
    post_ln.load_state_dict(model.state_dict(), strict=False)
    losses = [model(**batch).loss, post_ln(**batch).loss]
    assert losses[0] != losses[1]
    omegas = [connection.omega for _, connection in profiled_connections(model)]
    alternating = Alternating(Begins(), model)
    for turn in range(4):
        alternating.next()
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        assert loss == losses[turn % 2]
        assert {value.grad is None for value in omegas} == {turn % 2 == 1}


def test_every_benchmark_is_tried():
    assert {*SIZES, "decoding", "gpu"} == set(BENCHMARKS)


def test_what_cannot_run_is_left_out(tmp_path, capsys):
    shutil.copy(page.DOCS / "performance_intro.md", tmp_path)
    assert main(["corpus", "decoding", "--data", str(tmp_path), "--checkpoint", str(tmp_path)], docs=tmp_path) == 1
    error = capsys.readouterr().err
    assert "corpus is left out: Multi30k (--data) is needed" in error and "train.en" in error
    assert "decoding is left out: A trained model (--checkpoint) is needed" in error
    assert not (tmp_path / "performance").exists() and (tmp_path / "performance.md").exists()


@pytest.mark.parametrize(
    "option, message", [(["speed"], "'speed' is no benchmark"), (["--rounds", "0"], "at least 1")]
)
def test_wrong_options_are_refused(option, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(option)
    assert message in capsys.readouterr().err


# --- on a GPU -------------------------------------------------------------------------------------

GPU_TINY = GPUShape(16, 32, 2, layers=1, vocab_size=250, updates=2, rows=4, length=8)
GPU_SHAPES = dict.fromkeys(("tiny", "base", "deep"), GPU_TINY) | {"small": replace(GPU_TINY, dropout=0.0)}


@pytest.fixture
def dry(tmp_path) -> Bench:
    """A dry run of what a GPU would do."""
    return Bench("cpu", GPU_SHAPES, ROUNDS, tmp_path)


def measure_dry(settings: Settings, **options) -> list[dict]:
    return [json.loads(json.dumps(each)) for each in gpu.measure(settings, GPU_SHAPES, "cpu", **options)]


@pytest.mark.slow
def test_all_that_a_gpu_would_do_is_tried(tmp_path, capsys):
    settings = Settings(THREADS, ROUNDS, seconds=10**6)
    *_, results = measure_dry(settings)
    printed = capsys.readouterr().out
    states = {name: part["state"] for name, part in results["parts"].items()}
    assert set(states.values()) == {"done", "needs a GPU"} and [*states] == [part.name for part in gpu.PARTS]
    assert {name for name, state in states.items() if state != "done"} == {p.name for p in gpu.PARTS if p.needs_gpu}

    assert results["gpu"] == "none (a dry run)" and results["versions"]["cuda"] is None
    systems_of_a_step = results["parts"]["base, bfloat16"]["measured"]
    assert [*systems_of_a_step] == [STOCK, PLAIN, OURS, COMPILED, "profiling"]
    assert systems_of_a_step[STOCK]["updates"] == [2, 2] and systems_of_a_step[COMPILED]["updates"] == [6, 6]
    assert all(len(each["seconds"]) == ROUNDS for each in systems_of_a_step.values())
    found = [check for part in results["parts"].values() for check in part.get("checks", [])]
    assert len(found) > 20 and not [check for check in found if not check["holds"]]
    same = [
        way["same_sentences"]
        for search in results["parts"]["decoding: 64 rows"]["measured"].values()
        for way in search.values()
    ]
    assert len(same) == 5 and min(same) > 0.5, "bfloat16 rounds otherwise where batches are cut otherwise"
    for figure in results["figures"]:
        assert len(figure["ratios"]) == ROUNDS and all(ratio > 0 for ratio in figure["ratios"])

    shutil.copy(page.DOCS / "performance_intro.md", tmp_path)
    record.write(tmp_path / "performance" / "gpu.json", results)
    page.main(tmp_path)
    text = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert f"## {gpu.TITLE}" in text and gpu.more(results) in text and gpu.more(results) in printed
    assert f"| base, bfloat16 | {COMPILED} |" in text and "| 5 beams | static cache, compiled steps | 4 |" in text
    assert "| loss in float32 against float64 | yes |" in text and "memory: base (needs a GPU)" in text
    assert "none (a dry run), " in text.splitlines()[-1]


def test_without_a_gpu_the_command_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "gpu is left out: a GPU is needed, and PyTorch sees none.\n"
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_or_does_not_fit_leaves_the_others():
    def fails(bench):
        raise ArithmeticError("broken | here")

    figure = record.figure("x", "a", "b", [2.0])
    parts = [
        Part("long", 10**6, fails),
        Part("broken", 1, fails),
        Part("fine", 1, lambda bench: {"figures": [figure], "checks": [checks.within("y", 1.0, 2.0)]}),
        Part("only there", 1, fails, needs_gpu=True),
    ]
    first, second, third, fourth = measure_dry(Settings(THREADS, ROUNDS, seconds=100), parts=parts)
    assert [*first["parts"]] == ["long"] and first["parts"]["long"] == {"state": "no time", "seconds": 0.0}
    assert second["parts"]["broken"]["state"].startswith("ArithmeticError: broken | here (")
    assert third["figures"] == fourth["figures"] == [figure]
    assert fourth["parts"]["only there"]["state"] == "needs a GPU"
    assert "long (no time); broken (ArithmeticError: broken / here (" in gpu.more(fourth)
    assert "| y | yes | 1 | ≤ 2 |" in gpu.more(fourth)


def test_parts_alone_keep_what_an_earlier_command_has_measured(tmp_path):
    def part(name, value):
        return Part(name, 1, lambda bench: {"checks": [checks.within("x", value, 9.0)]})

    def found(results):
        return {name: each["checks"][0]["found"] for name, each in results["parts"].items()}

    settings = Settings(THREADS, ROUNDS, output=tmp_path)
    *_, results = measure_dry(settings, parts=[part("check: a", 1.0), part("b", 2.0)])
    record.write(tmp_path / "gpu.json", results)
    alone = Settings(THREADS, ROUNDS, output=tmp_path, parts=("check",))
    changed = [part("check: a", 3.0), part("b", 4.0)]
    *_, results = measure_dry(alone, parts=changed)
    assert found(results) == {"check: a": 3.0, "b": 2.0}
    *_, results = measure_dry(settings, parts=changed)
    assert found(results) == {"check: a": 3.0, "b": 4.0}

    record.write(tmp_path / "gpu.json", results | {"gpu": "another card"})
    *_, results = measure_dry(alone, parts=changed)
    assert found(results) == {"check: a": 3.0}


def test_what_grows_is_written_as_it_grows(tmp_path, monkeypatch):
    def measure(settings):
        for value in range(3):
            yield {"value": value}
            assert json.loads((tmp_path / "gpu.json").read_text()) == {"value": value}

    monkeypatch.setattr(gpu, "measure", measure)
    assert main(["gpu", "--output", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_trainers_take_turns_of_some_updates(dry):
    with (
        Stepper(updates.build(dry, OURS, GPU_TINY, "float32")) as a,
        Stepper(updates.build(dry, STOCK, GPU_TINY, "float32")) as b,
    ):
        for turn in range(1, 4):
            assert a.turn(dry, 2) > 0
            b.step(3)
            assert (a.trainer.state.global_step, b.trainer.state.global_step) == (2 * turn, 3 * turn)
        a_thread = a._thread
    assert not a_thread.is_alive()


def test_what_a_trainer_raises_reaches_who_asked_for_updates(dry):
    trainer = updates.build(dry, PLAIN, GPU_TINY, "float32")
    with Stepper(trainer) as stepper:
        stepper.step(1)
        trainer.compute_loss = lambda *args, **kwargs: 1 / 0
        with pytest.raises(ZeroDivisionError) as error:
            stepper.step(2)
    assert checks.tell(error.value).startswith("ZeroDivisionError: division by zero (")
    assert "test_benchmarks.py" in checks.tell(error.value) and "/" not in checks.tell(error.value).partition("(")[2]


def test_systems_of_a_gpu_differ_in_what_their_names_say(dry):
    trainers = {name: updates.build(dry, name, GPU_TINY, "bfloat16") for name in updates.SYSTEMS}
    assert [type(trainer.model).__name__ for trainer in trainers.values()] == [
        "MarianMTModel",
        *["AdminForConditionalGeneration"] * 3,
    ]
    assert [type(trainer).__name__ for trainer in trainers.values()] == [
        *["Seq2SeqTrainer"] * 2,
        *["TranslationTrainer"] * 2,
    ]
    assert [trainer.args.torch_compile for trainer in trainers.values()] == [False, False, False, True]
    for trainer in trainers.values():
        assert trainer.args.bf16 and trainer.args.max_grad_norm == 1.0 and "adamw" in trainer.args.optim
        config = trainer.model.config
        assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.1, 0.1)
        assert (config.d_model, config.encoder_layers, config.decoder_ffn_dim) == (16, 1, 32)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["labels"].shape == batch["decoder_input_ids"].shape == (4, 8)
    weights = [sum(p.numel() for p in trainer.model.parameters()) for trainer in trainers.values()]
    assert weights[1] == weights[2] == weights[3] == weights[0] + 16 * 3  # ω of all sub-layers but the first two


def test_batches_of_a_gpu_are_of_one_shape_and_three_quarters_full():
    shape = GPUShape(16, 32, 2, layers=1, vocab_size=250, rows=64, length=16)
    found = updates.batches(shape)
    assert len({tuple(batch["labels"].flatten().tolist()) for batch in found}) == len(found) == 8
    for batch in found:
        assert all(x.shape == (64, 16) for x in batch.values())
        assert 0.65 < batch["attention_mask"].float().mean() < 0.85
        assert (batch["input_ids"] == 249).equal(batch["attention_mask"] == 0)
        assert (batch["decoder_input_ids"][:, 0] == 249).all()
        kept = batch["labels"][:, :-1] != -100
        assert (batch["decoder_input_ids"][:, 1:][kept] == batch["labels"][:, :-1][kept]).all()
    assert updates.targets_of_a_batch(shape) == pytest.approx(64 * 12, rel=0.05)


def test_kernels_are_summed_up_by_what_they_compute():
    events = [
        ("sm90_xmma_gemm_bf16", 3000.0, 6),
        ("fmha_cutlassF_bf16", 450.0, 1),
        ("_forward_kernel", 50.0, 1),
        ("Memset", 1.0, 1),
        ("add", 99.0, 9),
    ]
    found = updates.summary(iter(events), updates=2)
    assert found["kernels"] == 9 and found["busy_ms"] == pytest.approx(1.8)
    assert found["product_ms"] == 1.5 and found["attention_ms"] == 0.25
    assert found["longest"][0] == ["sm90_xmma_gemm_bf16", 1.5, 3.0] and len(found["longest"]) == 5


def test_waits_are_errors_within_updates_alone(dry, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(checks, "COMPILED", OURS)  # compiling takes a while
    assert [check["holds"] for check in checks.no_wait(dry)] == [True, True]
    assert modes == [*["error", "default"] * 3, "default"] * 2

    def waits(mode):
        if mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", waits)
    found = checks.no_wait(dry)
    assert [check["holds"] for check in found] == [False, False]
    assert found[0]["found"].startswith("RuntimeError: called a synchronizing CUDA operation (")


@pytest.mark.slow
def test_beams_of_compiled_steps_are_those_of_plain_ones(dry):
    model = updates.stock_model(randomize(updates.new_model(dry, GPU_TINY)))
    model = randomize(model, scale=0.3).eval()
    batch = updates.batches(GPU_TINY)[0]
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    beams = {"num_beams": 4, "max_new_tokens": 12}
    expected = model.generate(**source, **beams)
    calls = []
    model._compiled_forward = lambda *args, **inputs: calls.append(1) or type(model).forward(model, *args, **inputs)
    with compiled_steps(model):
        assert model.generate(**source, **beams, cache_implementation="static").equal(expected)
    assert len(calls) >= expected.shape[1] - 2 and not {"forward", "_reorder_cache"} & vars(model).keys()


def test_versions_are_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(record, "PACKAGES", ("torch", "no-such-package"))
    assert [*record.conditions(Settings())["versions"]] == ["python", "torch"]


# --- figures --------------------------------------------------------------------------------------


def test_ratios_are_taken_in_the_same_round():
    measured = {"A": {"seconds": [1.0, 2.0, 4.0]}, "B": {"seconds": [3.0, 2.0, 8.0]}}
    assert record.speed("x", measured, "A", "B")["ratios"] == pytest.approx([3.0, 1.0, 2.0])
    assert record.cost("x", measured, "A", "B")["ratios"] == [1 / 3, 1.0, 0.5]
    for name, counts in (("A", [1, 1, 1]), ("B", [10, 10, 10])):
        measured[name]["updates"] = counts
    figure = record.cost("x", measured, "A", "B", "updates", at_most=2.0)
    assert figure["ratios"] == pytest.approx([10 / 3, 10, 5]) and figure["at_most"] == 2.0
    assert (figure["a"], figure["b"]) == ("A: 2 s", "B: 300 ms")


def test_memory_is_counted_from_the_imports_on():
    measured = {"A": {"peak_bytes": 40e6, "import_bytes": 30e6}, "B": {"peak_bytes": 70e6, "import_bytes": 30e6}}
    figure = record.memory("x", measured, "A", "B")
    assert figure["ratios"] == [0.25] and figure["b"] == "B: 40 MB"


def test_the_table_shows_median_spread_and_target():
    figures = [
        record.figure("fast", "A", "B", [3.0, 1.0, 1.5], at_least=1.5),
        record.figure("cheap", "A", "B", [1.5, 1.0, 3.0], at_most=1.4),
        record.figure("little", "A", "B", [0.9, 1.01749, 1.2], at_most=1.02),
        record.figure("alone", "A", "B", [0.25]),
    ]
    assert page.table(figures)[2:] == [
        "| fast | A | B | **1.5** (1–3) | ≥ 1.5 | yes |",
        "| cheap | A | B | **1.5** (1–3) | ≤ 1.4 | no |",
        "| little | A | B | **1.017** (0.9–1.2) | ≤ 1.02 | yes |",
        "| alone | A | B | **0.25** |  |  |",
    ]


def test_exponents_are_those_of_the_growth():
    points = {str(n): {"s": {"seconds": [2e-3 * n**1.5], "updates": [2]}} for n in (2, 4, 16)}
    for n, point in points.items():
        point["s"] |= {"peak_bytes": 100 + 7 * int(n), "import_bytes": 100}
    assert load("growth")._exponents(points, "s") == pytest.approx({"seconds": 1.5, "bytes": 1.0})


def test_the_batch_size_is_the_largest_that_needs_no_more_memory():
    assert corpus.largest({16: 100, 32: 200, 64: 300}, 250) == 32
    assert corpus.largest({16: 100}, 50) == 16


# --- decoding -------------------------------------------------------------------------------------


def settings_of(folder: Path, **changes) -> Settings:
    return Settings(THREADS, ROUNDS, data=folder, checkpoint=folder / "model", **changes)


@pytest.mark.slow
def test_decoding_is_measured_for_every_system(folder, tmp_path):
    special = {"vocab_size": 250, "pad_token_id": 249, "eos_token_id": 0}
    tiny_model(max_position_embeddings=256, **special).save_pretrained(folder / "model")
    results = decoding.measure(settings_of(folder), split="test", sentences=6, batch_size=4)

    record.write(tmp_path / "decoding.json", results)
    recorded = (tmp_path / "decoding.json").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "decoding.json"] and str(folder) not in recorded
    assert results["checkpoint"] == "model" and results["source"] == "test.en" and results["reference"] == "test.de"
    assert (results["sentences"], results["batch_size"], results["rounds"]) == (6, 4, ROUNDS)
    assert results["threads"] == THREADS
    assert {"torch", "transformers", "ctranslate2", "sacrebleu"} < results["versions"].keys()

    measurements = results["measurements"]
    assert [entry["beams"] for entry in measurements] == [1] * 4 + [5] * 4
    assert [entry["dtype"] for entry in measurements[:3]] == ["float32"] * 3
    assert measurements[3]["dtype"].startswith("int8")
    for beams in (1, 5):
        same = [entry for entry in measurements if entry["beams"] == beams and entry["dtype"] == "float32"]
        assert len({(entry["target_tokens"], entry["bleu"]) for entry in same}) == 1, "all three translate the same"
    for entry in measurements:
        assert len(entry["seconds"]) == 2 and "case:lc" in entry["bleu_signature"]
        speed = entry["tokens_per_second"]
        assert speed["min"] == pytest.approx(entry["target_tokens"] / max(entry["seconds"]))
        assert speed["min"] <= speed["median"] <= speed["max"]
        assert entry["sentences_per_second"]["max"] == pytest.approx(6 / min(entry["seconds"]))
    omega, exported, _, int8 = (entry["seconds"] for entry in measurements[4:])
    figures = {(f["what"], f["a"].partition(":")[0]): f for f in results["figures"]}
    assert figures["5 beams: ω", "Transformers, ω model, float32"]["ratios"] == pytest.approx(
        [a / b for a, b in zip(omega, exported, strict=True)]
    )
    assert results["figures"][-1]["ratios"] == pytest.approx([b / a for a, b in zip(int8, exported, strict=True)])
    assert [f.get("at_least") for f in results["figures"]] == [None] * 5 + [4.0]
    assert decoding.more(results) in "\n".join(page.section("decoding", results))


def test_translations_are_scored_in_the_order_of_the_file(folder, tmp_path, monkeypatch):
    copy = lambda batches, beams: [ids for batch in batches for ids in batch]  # noqa: E731
    names = ("omega", "exported")
    monkeypatch.setattr(decoding, "load_systems", lambda *arguments: {(name, "int64"): copy for name in names})
    shutil.copytree(folder / "model", tmp_path / "model")
    tiny_config().save_pretrained(tmp_path / "model")
    for language in ("en", "de"):
        shutil.copy(folder / "test.en", tmp_path / f"copy.{language}")
    results = decoding.measure(settings_of(tmp_path), split="copy", batch_size=3)
    assert results["sentences"] == 8
    assert [entry["bleu"] for entry in results["measurements"]] == [pytest.approx(100)] * 4


def test_the_table_of_decoding_shows_median_and_spread():
    rate = {"median": 1234.5, "min": 1000.0, "max": 2000.0}
    entry = {"system": "Marian", "dtype": "int8", "beams": 5, "tokens_per_second": rate, "sentences_per_second": rate}
    results = {"checkpoint": "run", "source": "test.en", "sentences": 1000, "batch_size": 32, "threads": 1}
    results |= {"rounds": 3, "versions": {"torch": "2.13"}}
    entry |= {"bleu": 30.125, "bleu_signature": "nrefs:1|x"}
    text = decoding.more(results | {"measurements": [entry]})
    assert "| Marian | int8 | 5 | 1,234 (1,000–2,000) | 1,234.5 (1,000.0–2,000.0) | 30.12 |" in text
    assert "1,000 sentences of test.en" in text and "torch 2.13" in text and "`nrefs:1|x`" in text

"""A stock model of opus-mt's kind with its sentencepiece tokenizer: gone on from, deepened, exported."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from layouts import TEXTS, save_layout
from test_deepening import stock_model
from tiny_runs import arguments, flags
from tiny_runs import run as script
from transformers import AutoTokenizer, MarianMTModel, Seq2SeqTrainingArguments

from admin_hf import AdminConfig, AdminForConditionalGeneration
from admin_hf.__main__ import main


SPIECE = ("source.spm", "target.spm", "vocab.json")


@pytest.fixture(scope="module")
def opus(tmp_path_factory) -> Path:
    """A folder as opus-mt's are, with 64 positions."""
    folder = tmp_path_factory.mktemp("opus")
    save_layout("marian", folder)
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    stock_model(vocab_size=pad + 1, pad_token_id=pad, decoder_start_token_id=pad).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split, lines in (("train", TEXTS), ("validation", TEXTS[:2]), ("test", TEXTS[:2])):
        (folder / f"{split}.en").write_text("".join(f"{line[:40]}\n" for line in lines), encoding="utf-8")
        (folder / f"{split}.de").write_text(f"{TEXTS[0][:20]}\n" * len(lines), encoding="utf-8")
    return folder


def go_on(opus: Path, text: Path, output: Path, **changes) -> int:
    """The script's run, without any flag for lengths."""
    given = {"model_name_or_path": opus, "config_overrides": None, "vocab_size": None, "max_steps": 2}
    given |= {"val_max_target_length": None, "max_tokens": 256, "per_device_train_batch_size": None}
    return script(text, output, **given | {"report_to": "none"} | changes)


# --- the script -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def all_said(caplog) -> Iterator[None]:
    with caplog.at_level("INFO", logger="training.model"):
        yield


def test_an_opus_mt_model_is_deepened_trained_and_exported(opus, text, tmp_path, caplog):
    run = tmp_path / "run"
    assert go_on(opus, text, run, encoder_layers=3, decoder_layers=4, save_strategy="steps", save_steps=2) == 0
    said = caplog.text
    assert f"{opus} is deepened from 2 encoder and 2 decoder layers to 3 and 4" in said
    assert "--max_source_length is 64 here, because the model has 64 positions" in said
    profiled = (run / "residual_profile.json").stat().st_mtime_ns
    config = AdminConfig.from_pretrained(run)
    assert (config.encoder_layers, config.decoder_layers, config.max_position_embeddings) == (3, 4, 64)
    vanilla = MarianMTModel.from_pretrained(run / "vanilla")
    assert len(vanilla.model.encoder.layers) == 3 and len(vanilla.model.decoder.layers) == 4
    for name in SPIECE:
        assert (run / "vanilla" / name).read_bytes() == (opus / name).read_bytes()
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")(TEXTS) == AutoTokenizer.from_pretrained(opus)(TEXTS)

    assert (
        go_on(opus, text, run, encoder_layers=3, decoder_layers=4, save_strategy="steps", save_steps=2, max_steps=3)
        == 0
    )
    assert (run / "residual_profile.json").stat().st_mtime_ns == profiled, "a run that goes on is not profiled again"
    # The run by itself, without the flags: its own model says how long sentences may be
    evaluated = {"model_name_or_path": None, "do_train": None, "do_eval": True, "max_tokens": None}
    caplog.clear()
    assert go_on(opus, text, run, **evaluated) == 0
    assert "is deepened" not in caplog.text


def test_without_the_flags_a_model_is_gone_on_from_as_it_is(opus, text, tmp_path, caplog):
    assert go_on(opus, text, tmp_path, encoder_layers=2) == 0
    assert "is deepened" not in caplog.text
    assert not (tmp_path / "residual_profile.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": 1}, "cannot be deepened: encoder_layers=1 is less than the 2 that the model has"),
        ({"decoder_layers": 0}, "--decoder_layers 0 must be at least 1"),
        (
            {"model_name_or_path": None, "encoder_layers": 4},
            "for a new model, give --config_overrides encoder_layers=4",
        ),
        (
            {"do_train": None, "do_eval": True, "encoder_layers": 4},
            "deepens the model of --model_name_or_path and needs --do_train",
        ),
        (
            {"max_source_length": 65},
            "The arguments allow sequences of up to 65 tokens, but the model's max_position_embed",
        ),
        ({"max_target_length": 65}, "sequences of up to 65 tokens"),
        ({"val_max_target_length": 65}, "sequences of up to 65 tokens"),
    ],
)
def test_flags_that_cannot_be_met_are_refused_before_the_data(opus, text, tmp_path, capsys, changes, message):
    assert go_on(opus, text, tmp_path / "out", **changes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_default_lengths_are_multiples_where_lengths_are(opus, text, tmp_path, caplog):
    assert go_on(opus, text, tmp_path, pad_to_multiple_of=24, max_tokens=240, max_steps=1) == 0
    assert "--max_target_length is 48 here, because the model has 64 positions" in caplog.text
    recorded = json.loads((tmp_path / "arguments.json").read_text())
    assert recorded["max_source_length"] == recorded["val_max_target_length"] == 48


def test_the_python_of_the_guide_runs(opus, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[1] / "docs" / "continuing.md").read_text(encoding="utf-8")
    loading, training = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    opened = {}
    exec(loading.replace("Helsinki-NLP/opus-mt-en-de", str(opus)).replace("=12", "=3"), opened)
    assert type(opened["model"]) is AdminForConditionalGeneration and opened["model"].config.decoder_layers == 3
    tokenizer, sides = opened["tokenizer"], ((text / f"train.{side}").read_text("utf-8") for side in ("en", "de"))
    rows = [tokenizer(source, text_target=target) for source, target in zip(*map(str.splitlines, sides), strict=True)]
    options = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "output_dir": "deeper"}
    given = {"args": Seq2SeqTrainingArguments(**options), "dataset": Dataset.from_list([dict(row) for row in rows])}
    exec(training, opened | given)
    assert opened["model"].is_profiled
    vanilla, again = MarianMTModel.from_pretrained("en-de"), AutoTokenizer.from_pretrained("en-de")
    ids = again([line[:40] for line in TEXTS[:3]], padding=True, return_tensors="pt")
    options = {"num_beams": 2, "max_length": 12}
    assert torch.equal(vanilla.generate(**ids, **options), opened["model"].eval().generate(**ids, **options))


# --- without sentencepiece --------------------------------------------------------------------------

# The finders of packages do not see it, which is what it is not to be installed
WITHOUT_SENTENCEPIECE = """
import json, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "sentencepiece" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
import run_translation
from admin_hf.__main__ import main

for command in json.loads(sys.argv[1]):
    code = main(command) if command[0] != "run_translation" else run_translation.main(command[1:])
    print(f"=== {code}", file=sys.stderr)
"""


@pytest.mark.slow
def test_every_command_that_needs_sentencepiece_names_it(opus, text, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    assert go_on(opus, text, run, save_strategy="steps", save_steps=1) == 0
    given = {"model_name_or_path": opus, "config_overrides": None, "vocab_size": None}
    commands = [
        ["export", str(opus), str(out)],
        ["average", str(run), str(out), "--last", "2"],
        ["analyze", "dependency", str(run), "--text", *(f"{text}/train.{side}" for side in ("en", "de"))],
        ["run_translation", *flags(arguments(text, out, **given))],
        ["report", str(run), "--output", str(tmp_path / "report.html")],
    ]
    commands[2] += ["--output", str(out)]
    program = [sys.executable, "-c", WITHOUT_SENTENCEPIECE, json.dumps(commands)]
    result = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    *said, reported = result.stderr.split("=== 2\n")
    needed = "cannot be loaded: it needs the package sentencepiece (pip install sentencepiece)."
    names = (opus, run / "checkpoint-2", run, opus)
    assert [part.splitlines()[-1] for part in said] == [f"error: The tokenizer {name} {needed}" for name in names]
    assert reported.endswith("=== 0\n"), "the other parts of a report need none"
    assert not out.exists(), "refused before anything is written"
    assert "it needs the package sentencepiece" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_model_without_a_tokenizer_needs_no_sentencepiece(tmp_path):
    """Transformers asks for the package before it looks for a tokenizer's files."""
    tiny_model().save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), str(tmp_path / "out")]
    program = [sys.executable, "-c", WITHOUT_SENTENCEPIECE, json.dumps([command])]
    result = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.stderr.endswith("=== 0\n"), result.stderr
    assert "has no tokenizer that can be loaded" in result.stdout

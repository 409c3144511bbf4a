"""The page of a run: real tiny runs, hostile ones, and a real browser."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import padded_batch, randomize, tiny_config, tiny_model
from matplotlib import pyplot
from tiny_runs import run
from transformers import MarianConfig, MarianMTModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from admin_hf import AdminForConditionalGeneration, initialize_omega, profile_residuals
from admin_hf.__main__ import main
from admin_hf.monitoring import ResidualMonitor
from admin_hf.report import write_report
from admin_hf.report.figures import MAX_POINTS, thinned
from admin_hf.report.measure import newest_model, residual_variances, starting_model
from admin_hf.report.page import formulas, without_folders
from admin_hf.report.sections import model_line
from admin_hf.report.text import predictions, read_pairs
from admin_hf.report.weights import omega
from admin_hf.residual import residual_connections
from admin_hf.run.folder import Run, is_number


SECTIONS = ["scores", "curves", "translations", "omega", "dependency", "layers", "arguments"]
SCRIPT = "<script>alert(1)</script>"
TOKEN = "hf_" + "abcdEFGH" * 4


class Page(HTMLParser):
    """The text of each section, its notes, its pictures, and all attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, str] = {"top": ""}
        self.notes: dict[str, list[str]] = {}
        self.pictures: dict[str, list[str]] = {}
        self.section, self.inside = "top", ""
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        values = dict(attributes)
        if tag == "section":
            self.section = values["id"]
            self.texts[self.section], self.notes[self.section], self.pictures[self.section] = "", [], []
        if tag == "svg":
            self.pictures[self.section].append("")
        if values.get("class") == "note":
            self.notes[self.section].append("")
        self.inside = "note" if values.get("class") == "note" else tag

    def handle_data(self, text):
        self.texts[self.section] += text
        if self.inside == "note":
            self.notes[self.section][-1] += text

    def handle_endtag(self, tag):
        self.texts[self.section] += " "
        self.inside = ""

    @property
    def sections(self) -> list[str]:
        return list(self.notes)


def page_of(folder: Path, tmp_path: Path) -> Page:
    return Page(write_report(folder, tmp_path / "page.html"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    options = {"do_eval": True, "do_predict": True, "num_beams": 2, "max_steps": 6, "logging_steps": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 2, "label_smoothing_factor": 0.1}
    assert run(data, folder, **options, hub_token=TOKEN, average_last=2, report_to="none") == 0
    return folder


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory) -> Page:
    return page_of(finished, tmp_path_factory.mktemp("page"))


@pytest.fixture
def going_on(finished, tmp_path) -> Path:
    """What a run that is going on has: checkpoints, and one that is being written."""
    folder = tmp_path / "going_on"
    shutil.copytree(finished, folder)
    results = [*folder.glob("*results.json"), folder / "model.safetensors", folder / "trainer_state.json"]
    for path in (*results, folder / "generated_predictions.txt"):
        path.unlink()
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-6/trainer_state.json").write_text('{"global_step": 6, "log_hi')
    return folder


# --- what is on it ---------------------------------------------------------------------------------


def test_a_finished_run_has_every_part(page):
    assert page.sections == SECTIONS
    assert not any(page.notes.values()), page.notes
    assert [value for name, value in page.attributes if name == "href" and len(value) < 20] == [
        f"#{name}" for name in SECTIONS
    ]
    counts = {name: len(pictures) for name, pictures in page.pictures.items() if pictures}
    # Loss, perplexity, scores, rate, gradient, speed, ω, variance ratio; β at start and end; gradients and variances
    assert counts == {"curves": 8, "omega": 2, "dependency": 4, "layers": 4}
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(set(labels)) == 1 + sum(counts.values()), "every picture says what it shows"
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    assert "Finished after 6 updates." in page.texts["top"]
    assert len(page.source) < 2e6


def test_numbers_are_those_of_the_run(finished, page):
    texts = page.texts
    results = json.loads((finished / "results.json").read_text())
    for split in ("eval", "test"):
        for metric in ("bleu", "moses_bleu", "chrf", "ter", "loss"):
            assert f"{results['scores'][f'{split}_{metric}']:.2f}" in texts["scores"]
        assert results["scores"][f"{split}_bleu_signature"] in texts["scores"]
    assert f"{results['parameters'] / 1e6:.2f} M" in texts["top"]
    assert "the mean of 2 checkpoints, checkpoint-4 to checkpoint-6" in texts["scores"]
    log = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 2 and all(f"{loss:.2f}" in texts["scores"] for loss in losses)
    assert f"{losses[-1]:.3f}" in texts["top"] and f"perplexity {math.exp(losses[-1]):.2f}" in texts["top"]


def test_curves_are_drawn_through_the_logged_values(finished, page):
    """SVG's coordinates are a linear function of them, whatever matplotlib does in between."""
    log = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    rates = np.array([entry["learning_rate"] for entry in log if "learning_rate" in entry])
    figure = re.search(r'aria-label="Learning rate".*?</figure>', page.source, re.DOTALL)[0]
    paths = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", path) for path in re.findall(r'<path d="([^"]*)"', figure)]
    drawn = [np.array(path, dtype=float) for path in paths if len(path) == len(rates) == 6]
    assert any(abs(np.corrcoef(points[:, 1], rates)[0, 1] + 1) < 1e-6 for points in drawn)


def test_translations_are_those_of_the_test_file(finished, page, data):
    text = " ".join(page.texts["translations"].split())
    files = (data / "test.en", data / "test.de", finished / "generated_predictions.txt")
    lines = [[" ".join(line.split()) for line in path.read_text().splitlines()] for path in files]
    samples = [
        f"source {source} reference {reference} translation {translation or '(empty)'}"
        for source, reference, translation in zip(*lines, strict=True)
    ]
    assert len(samples) == 12 and " ".join(samples[:8]) in text and samples[8] not in text


def test_predictions_stand_beside_their_sources_until_training_goes_on(finished, data, tmp_path):
    for name in ("arguments.json", "results.json"):
        shutil.copyfile(finished / name, tmp_path / name)
    (tmp_path / "generated_predictions.txt").write_text("".join(f"line {i}\n" for i in range(12)))
    sources, references = ((data / f"test.{side}").read_text().splitlines()[:5] for side in ("en", "de"))
    expected = [(*pair, f"line {i}") for i, pair in enumerate(zip(sources, references, strict=True))]
    assert predictions(Run(tmp_path), 5) == expected
    (tmp_path / "results.json").unlink()
    assert predictions(Run(tmp_path), 5) == []


def test_arguments_that_were_set_come_first(page):
    first, _, others = " ".join(page.texts["arguments"].split()).partition(" others ")
    for argument in ("learning_rate 0.01", "max_steps 6", "label_smoothing_factor 0.1", "vocab_size 250"):
        assert argument in first
    assert "weight_decay 0.0" in others and "weight_decay" not in first
    assert "max_grad_norm 1.0" in others


@pytest.mark.parametrize("form", ["text", "jsonl", "json", "csv", "tsv", "source"])
def test_sentences_are_read_in_every_form(tmp_path, form):
    pairs = [("A, b \u2028c", 'Ein "d"'), ("<E>", "F")]
    rows = [{"translation": {"en": source, "de": target}} for source, target in pairs]
    path = tmp_path / f"test.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "csv":
        path.write_text('de,en\n"Ein ""d""","A, b \u2028c"\nF,<E>\n')
    elif form == "tsv":
        path.write_text('en\tde\nA, b \u2028c\tEin "d"\n<E>\tF\n')
    else:
        path = tmp_path / "test"
        Path(f"{path}.en").write_text("A, b \u2028c\n<E>\n")
        if form == "text":
            Path(f"{path}.de").write_text('Ein "d"\nF\n')
    arguments = {"test_file": str(path), "source_lang": "en", "target_lang": "de"}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    expected = [(source, None if form == "source" else target) for source, target in pairs]
    assert [sample[:2] for sample in read_pairs(Run(tmp_path), "test", 8)] == expected
    assert [sample[:2] for sample in read_pairs(Run(tmp_path), "test", 1)] == expected[:1]


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_a_blank_row_stands_beside_its_own_translation(tmp_path, form):
    """run_translation.py translates it too: as a blank line."""
    separator = {"csv": ",", "tsv": "\t"}[form]
    rows = (
        ["en,de", "a,A", "", '"b" c,B', ",", "d,D"]
        if form == "tsv"
        else ["en,de", "a,A", "", '"""b"" c",B', "", "d,D"]
    )
    (tmp_path / f"test.{form}").write_text("".join(f"{row}\n".replace(",", separator) for row in rows))
    arguments = {"test_file": str(tmp_path / f"test.{form}"), "source_lang": "en", "target_lang": "de"}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    (tmp_path / "results.json").write_text(json.dumps({"scores": {"test_bleu": 1.0}}))
    (tmp_path / "generated_predictions.txt").write_text("1\n\n3\n\n5\n")
    expected = [("a", "A", "1"), ("", "", ""), ('"b" c', "B", "3"), ("", "", ""), ("d", "D", "5")]
    assert predictions(Run(tmp_path), 8) == expected


@pytest.mark.parametrize("value", [True, "3", None, float("nan"), -float("inf"), 10**400, [1]])
def test_what_cannot_be_drawn_is_no_number(value):
    assert not is_number(value) and is_number(3) and is_number(-0.5)


# --- what is measured ------------------------------------------------------------------------------


def test_the_start_is_the_model_that_the_run_started_from(data, tmp_path):
    """At a learning rate of 0 training ends with it."""
    assert run(data, tmp_path, max_steps=1, learning_rate=0.0, seed=7, report_to="none") == 0
    trained = AdminForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    model, how = starting_model(Run(tmp_path), padded_batch())
    assert "seed, 7" in how and "profiled" in how
    assert model.state_dict().keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_a_stock_model_did_not_start_as_admin_does(tmp_path):
    config = {name: value for name, value in tiny_config().to_dict().items() if "residual" not in name}
    MarianMTModel(MarianConfig(**config | {"model_type": "marian"})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trains a stock model \(marian\)"):
        starting_model(Run(tmp_path), padded_batch())


def test_a_run_that_was_not_profiled_is_not_shown_as_admin(tmp_path):
    torch.manual_seed(7)
    model = AdminForConditionalGeneration(tiny_config())
    model.save_pretrained(tmp_path)
    (tmp_path / "arguments.json").write_text('{"seed": 7}')
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    start, how = starting_model(Run(tmp_path), padded_batch())
    assert how.endswith("from the run's seed, 7, with every ω at 1, because the run was not profiled.")
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in model.state_dict().items())
    assert model_line(Run(tmp_path)).startswith("admin (ω not profiled), 2+2 layers")
    assert dict(omega(Run(tmp_path)).findings)["expected"].startswith("The model was not profiled")
    initialize_omega(model, profile_residuals(model, padded_batch()))
    model.save_pretrained(tmp_path)
    assert model_line(Run(tmp_path)).startswith("admin, 2+2 layers")
    assert dict(omega(Run(tmp_path)).findings)["expected"].startswith("Admin starts each ω_i")


@pytest.mark.parametrize("systems", [("admin", "admin"), ("pre_ln", "post_ln")])
def test_variances_are_those_that_the_monitor_divides(systems):
    model = randomize(tiny_model(encoder_residual=systems[0], decoder_residual=systems[1]))
    monitor = ResidualMonitor(model)
    monitor.watch_next_pass()
    with torch.no_grad():
        model(**padded_batch())
    expected, before = monitor.metrics(), {name: value.clone() for name, value in model.state_dict().items()}
    for stack, (branch, shortcut) in residual_variances(model, padded_batch()).items():
        ratios = np.array(branch) / np.array(shortcut)
        assert len(ratios) == len(list(residual_connections(getattr(model.model, stack))))
        assert ratios.min() == pytest.approx(expected[f"{stack}_variance_ratio_min"], rel=1e-4)
        assert ratios.max() == pytest.approx(expected[f"{stack}_variance_ratio_max"], rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_thinned_curves_keep_length_and_mean():
    values = np.random.default_rng(0).normal(size=8 * MAX_POINTS).tolist()
    assert len(thinned(values)) == MAX_POINTS and thinned(values[:MAX_POINTS]) == values[:MAX_POINTS]
    assert np.mean(thinned(values)) == pytest.approx(np.mean(values))
    assert len(thinned(values[: MAX_POINTS + 1])) <= MAX_POINTS


def test_formulas_are_set_and_names_of_files_are_not():
    assert formulas("β²_{i,i} is i^-0.53 at x_12") == "β²<sub>i,i</sub> is i<sup>-0.53</sup> at x<sub>12</sub>"
    assert formulas("β_ij") == "β<sub>ij</sub>"
    assert formulas("post_ln, residual_profile.json") == "post_ln, residual_profile.json"
    assert formulas("x_{<b>}") == "x<sub>&lt;b&gt;</sub>"


# --- runs that have less ---------------------------------------------------------------------------


def test_a_run_that_goes_on_shows_its_newest_whole_checkpoint(going_on, data, tmp_path):
    page = page_of(going_on, tmp_path)
    assert page.sections == SECTIONS
    assert page.notes.pop("scores") == ["Final scores come when training has ended."]
    assert not any(page.notes.values()), page.notes
    assert "Not finished: update 4 of 6 (67%)" in page.texts["top"]
    assert "translated by update 4" in page.texts["translations"]
    assert (data / "validation.de").read_text().splitlines()[7].strip() in page.texts["translations"]
    assert "From update 0 to 4" in page.texts["omega"]
    assert "β of the encoder (admin), update 4" in page.texts["dependency"]


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_missed(going_on):
    run = Run(going_on)
    assert run.weights == going_on / "checkpoint-4"
    shutil.rmtree(run.weights)
    assert newest_model(run)[1] == "update 2"


def test_a_diverged_run_without_a_checkpoint_says_what_happened(data, tmp_path):
    folder = tmp_path / "diverged"
    diverging = {"learning_rate": 50, "lr_scheduler_type": "constant", "max_steps": 60, "warmup_steps": 0}
    assert run(data, folder, **diverging, optim="adamw_torch", report_to="none") == 3
    record = json.loads((folder / "divergence.json").read_text())
    page = page_of(folder, tmp_path)
    assert page.sections == ["divergence", *SECTIONS]
    assert record["reason"] in page.texts["divergence"] and "There is no checkpoint." in page.texts["divergence"]
    assert f"Diverged at update {record['step']}" in page.texts["top"]
    assert len(page.pictures["omega"]) == 2, "the profile"
    for section in ("curves", "translations", "omega", "dependency", "layers"):
        assert len(page.notes[section]) == 1 and len(page.notes[section][0]) < 120
    assert "learning_rate" in page.texts["arguments"]


def test_a_run_of_a_plain_trainer_has_a_page(tmp_path):
    model = AdminForConditionalGeneration(tiny_config(encoder_residual="pre_ln", decoder_residual="post_ln"))
    batch = padded_batch()
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(batch["labels"]))]
    options = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    args = Seq2SeqTrainingArguments(str(tmp_path / "plain"), **options, disable_tqdm=True)
    Seq2SeqTrainer(model=model, args=args, train_dataset=rows).train()
    page = page_of(tmp_path / "plain", tmp_path)
    assert page.sections == SECTIONS and "Finished after 2 updates." in page.texts["top"]
    assert "pre_ln encoder, post_ln decoder, 2+2 layers, width 16" in page.texts["top"]
    assert "The run has no arguments.json." in page.notes["arguments"][0]
    assert "has no ω" in page.notes["omega"][0] and page.notes["translations"]
    assert "random tokens" in page.texts["layers"] and "names no seed" in page.texts["layers"]
    assert len(page.pictures["dependency"]) == 4 and len(page.pictures["curves"]) == 3


ODD_LOG = '{"log_history": [1, {"step": "x"}, {"step": 3, "loss": "y"}]}'


@pytest.mark.parametrize("content", ["", '{"a', "[1, 2]", ODD_LOG])
def test_damaged_files_leave_gaps_and_no_error(going_on, tmp_path, content):
    for path in going_on.rglob("*.json"):
        if not (path.name == "config.json" and content == ODD_LOG):  # which is the configuration of a large model
            path.write_text(content)
    (going_on / "divergence.json").write_text('{"step": {}, "last_checkpoint": 3}')
    (going_on / "checkpoint-4/model.safetensors").write_bytes(b"\xff" * 100)
    assert page_of(going_on, tmp_path).sections == ["divergence", *SECTIONS]


def test_what_is_no_run_is_refused_before_anything_is_written(finished, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "page.html"
    output.write_text("older")
    for folder, sentence in ((tmp_path / "empty", "contains no run"), (tmp_path / "none", "There is no folder")):
        assert main(["report", str(folder), "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert sentence in error and str(folder) in error and error.count("\n") == 1
    assert main(["report", str(finished), "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert output.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "page.html"]


def test_the_command_writes_into_the_run_and_changes_nothing_else(going_on, capsys):
    def files():
        return {path: path.read_bytes() for path in going_on.rglob("*") if path.is_file()}

    before = files()
    assert main(["report", str(going_on)]) == 0
    assert f"{going_on / 'report.html'}: " in capsys.readouterr().out
    after = files()
    assert (going_on / "report.html").stat().st_mode & 0o777 == 0o644
    assert after.pop(going_on / "report.html").startswith(b"<!DOCTYPE html>") and after == before


# --- runs of strangers -----------------------------------------------------------------------------


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def hostile(finished, tmp_path) -> Path:
    folder = tmp_path / f"a&b {SCRIPT.replace('/', '')}"
    shutil.copytree(finished, folder)
    image = '"><img src=http://example.org/x onerror=alert(1)>'
    edit(folder / "arguments.json", output_dir=image, optim=SCRIPT, hub_token="secret-token", api_key="secret-key")
    edit(
        folder / "arguments.json",
        run_name=["/home/somebody/x", f"{SCRIPT} {{{{ 7 * 191 }}}} {TOKEN}"],
        project=f"--token={TOKEN}",
    )
    edit(folder / "arguments.json", cache_dir="/home/somebody/cache", trackio_space_id=f"me_{TOKEN}")
    (folder / "generated_predictions.txt").write_text(f"{SCRIPT}\n{image}\n" * 6)
    scores = json.loads((folder / "results.json").read_text())["scores"]
    edit(folder / "results.json", weights=[image, SCRIPT], scores=scores | {"test_bleu_signature": image})
    (folder / "divergence.json").write_text(json.dumps({"reason": SCRIPT, "step": image, "last_checkpoint": image}))
    profile = json.loads((folder / "residual_profile.json").read_text())
    profile["encoder"]["names"][0] = SCRIPT
    edit(folder / "residual_profile.json", **profile)
    for place in (folder, folder / "checkpoint-6"):
        (place / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\nclass C: pass\n")
        edit(place / "config.json", auto_map={"AutoConfig": "code.C", "AutoModelForSeq2SeqLM": "code.T"})
        changes = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}}
        edit(place / "tokenizer_config.json", **changes)
    return folder


def test_nothing_of_a_stranger_runs_or_leads_elsewhere(hostile, tmp_path):
    page = page_of(hostile, tmp_path)
    assert page.sections == ["divergence", *SECTIONS]
    assert SCRIPT in page.texts["top"] and SCRIPT in page.texts["translations"], "as text"
    assert "{{ 7 * 191 }}" in page.texts["top"] and "1337" not in page.texts["top"]
    assert not {"script", "img", "link", "iframe", "object", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert "url(http" not in page.source and "@import" not in page.source
    assert not (tmp_path / "ran").exists(), "code beside a checkpoint"


def test_no_secret_and_no_folder_of_a_machine_is_on_the_page(hostile, tmp_path):
    source = page_of(hostile, tmp_path).source
    for secret in (TOKEN, TOKEN[8:], "secret-token", "secret-key", "HUB_TOKEN", "/home/somebody", str(hostile.parent)):
        assert secret not in source, secret
    assert "max_tokens" in source, "which is none"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no file without an end")
def test_files_without_an_end_are_not_read(tmp_path):
    (tmp_path / "results.json").symlink_to("/dev/zero")
    arguments = {"validation_file": "/dev/zero", "source_lang": "en", "target_lang": "de"}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    assert Run(tmp_path).scores == {}
    with pytest.raises(FileNotFoundError):
        read_pairs(Run(tmp_path), "validation", 1)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/jane doe/runs/x", "x"),
        ("No such file: '/home/jane doe/x.en'", "No such file: 'x.en'"),
        ("See /home/jane/b and ~/c/d.", "See b and d."),
        ("file:///home/jane/x, a:/home/jane/b", "x, a:b"),
        ("C:\\Users\\jane\\x", "x"),
        ("https://example.org/a/b and src/c", "https://example.org/a/b and src/c"),
    ],
)
def test_of_a_path_the_last_part_is_left(text, shown):
    assert without_folders(text) == shown


# --- in a browser ----------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def browse(address: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Open a page with a fresh profile; what its console says is in stderr."""
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        *flags,
        address,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("size", ["1100,1600", "500,1600"])
def test_the_page_opens_in_a_browser(finished, tmp_path, size):
    page, picture = write_report(finished, tmp_path / "page.html"), tmp_path / "page.png"
    shown = browse(page.as_uri(), tmp_path, f"--window-size={size}", f"--screenshot={picture}")
    assert "CONSOLE" not in shown.stderr
    pixels = pyplot.imread(picture)[..., :3]
    assert pixels.shape[1::-1] == tuple(map(int, size.split(",")))
    ink = np.abs(pixels - pixels[0, 0]).max(-1) > 0.3
    assert 0.005 < ink.mean() < 0.5, "neither blank nor a blot"
    assert ink[len(ink) // 2 :].any(), "down to the end"
    text = Page(page).texts["top"].split()
    dom = browse(page.as_uri(), tmp_path, "--dump-dom").stdout
    assert all(word in dom for word in text if word.isalnum()) and "<svg" in dom

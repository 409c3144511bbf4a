"""What the documentation shows, runs."""

import doctest
import json
import re
import statistics
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import families
import pytest
import torch
from conftest import PAD, padded_batch
from peft import PeftModel
from test_reparameterization import logits, trained_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BertForMaskedLM, MarianMTModel, Seq2SeqTrainingArguments

import admin_hf
from admin_hf.__main__ import build_parser
from admin_hf.analysis.dependency import LayerDependency, StackDependency
from admin_hf.analysis.gradients import GradientNorms, StackGradients
from admin_hf.analysis.output_change import ChangeCurve, Fit, OutputChange
from admin_hf.architecture import STACKS
from admin_hf.families import FAMILIES
from admin_hf.residual import SYSTEMS
from benchmarks import BENCHMARKS, decoding
from benchmarks.__main__ import build_parser as build_benchmarks_parser
from benchmarks.page import markdown
from benchmarks.systems import word_tokenizer
from training import arguments
from training.experiments import deepening
from training.model import config_changes


REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
GUIDES = "analysis continuing distributed fairseq publishing serving systems training translating".split()
NAMES = ["README.md", *(f"docs/{name}.md" for name in GUIDES)]
CONTRIBUTING = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
PACKAGES = ("admin_hf", "training", "benchmarks", "website")
PAGES = {name: (REPO / name).read_text(encoding="utf-8") for name in NAMES}
MODULES = "residual configuration_admin deepening modeling_admin monitoring profiling reparameterization".split()


@pytest.mark.parametrize(
    "name", [*(f"admin_hf.{name}" for name in MODULES), "admin_hf.encoding", "training.batching", "training.metrics"]
)
def test_examples_in_docstrings_run(name):
    try:
        result = doctest.testmod(import_module(name))
        assert result.attempted > 0 and result.failed == 0
    finally:
        SYSTEMS.pop("half_branch", None)


def test_the_python_example_of_the_readme_runs(capsys):
    exec(re.search(r"## In Python\n\n```python\n(.*?)```", README, re.DOTALL)[1], {})
    assert "encoder.layers.0.self_attn_layer_norm" in capsys.readouterr().out


@pytest.mark.slow
def test_the_readmes_trainer_runs_as_printed(tmp_path):
    (code,) = re.findall(r"two callbacks do everything.*?```python\n(.*?)```", README, re.DOTALL)
    tokenizer = word_tokenizer(50)
    args = Seq2SeqTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    dataset = [{"input_ids": [5, 6, 7, 0], "labels": [9, 8, 0]}] * 8
    names = {"tokenizer": tokenizer, "args": args, "dataset": dataset}
    exec(code, names)
    names["trainer"].train()
    assert names["model"].is_profiled
    names["trainer"].save_model()
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) is MarianMTModel


@pytest.mark.slow
def test_the_readmes_stock_model_runs_as_printed():
    (code,) = re.findall(r"folds it into\s+their weights:\n\n```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert type(names["vanilla"]) is type(names["model"]) is BertForMaskedLM
    assert not any("omega" in name for name in names["vanilla"].state_dict())
    assert any("omega" in name for name in names["model"].state_dict())


def test_the_page_on_lora_ends_with_a_vanilla_model(tmp_path, monkeypatch):
    """Stock Marian computes what the model and its adapters compute."""
    monkeypatch.chdir(tmp_path)
    tokenizer = word_tokenizer(PAD + 1)
    model = trained_model(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained("en-de"), tokenizer.save_pretrained("en-de")
    dataset = [{"input_ids": [5, 6, 7, tokenizer.eos_token_id], "labels": [9, 8, 7, tokenizer.eos_token_id]}] * 8
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "docs/lora.md").read_text(encoding="utf-8"), re.DOTALL)
    short = code.replace("max_steps=1000", "max_steps=8, use_cpu=True, report_to=[], disable_tqdm=True")
    assert short != code
    names = {"dataset": dataset}
    exec(short, names)
    batch = padded_batch()
    vanilla = AutoModelForSeq2SeqLM.from_pretrained("en-de-medical")
    assert type(vanilla) is MarianMTModel and AutoTokenizer.from_pretrained("en-de-medical").pad_token_id == PAD
    torch.testing.assert_close(logits(vanilla, batch), logits(names["model"].eval(), batch), rtol=0, atol=2e-5)
    assert (logits(vanilla, batch) - logits(model, batch)).abs().max() > 1e-2, "it has learnt something"
    again = PeftModel.from_pretrained(model, "en-de-adapter").eval()
    assert torch.equal(logits(again, batch), logits(names["model"], batch))


@pytest.mark.parametrize("page", [*PAGES, "docs/lora.md", "docs/tour.md", "docs/fidelity.md", "CONTRIBUTING.md"])
def test_what_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (REPO / page).read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert link.startswith("https://") or ((REPO / page).parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_library_are_understood(page):
    commands = re.findall(r"^python -m admin_hf (.*?)(?: +#.*)?$", PAGES[page], re.MULTILINE)
    assert commands
    for command in commands:
        build_parser().parse_args(command.split())


def test_names_that_the_pages_import_exist():
    imported = re.findall(r"^from (admin_hf[.\w]*) import (.*)$", "\n".join(PAGES.values()), re.MULTILINE)
    assert len(imported) >= 4
    for module, names in imported:
        for name in names.split(","):
            assert hasattr(import_module(module), name.strip()), name


def test_the_tests_that_the_page_on_fidelity_names_are_there():
    page = (REPO / "docs/fidelity.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", page)
    there = "\n".join(path.read_text(encoding="utf-8") for path in (REPO / "tests").glob("test_*.py"))
    assert len(named) >= 6
    for name in named:
        assert f"def {name}(" in there, name


def test_the_tour_names_what_there_is_to_read():
    tour = (REPO / "docs/tour.md").read_text(encoding="utf-8")
    stops = re.findall(r"\[`([\w/]+\.py)`\]\([^)]*\),\s+`([\w.]+)`", tour)
    assert len(stops) > 20
    for path, name in stops:
        assert resolve_name(f"{path.removesuffix('.py').replace('/', '.')}:{name}"), name


def test_the_tree_names_every_module_and_nothing_else():
    (tree,) = re.findall(r"^```\n(run_translation\.py .*?)^```$", CONTRIBUTING, re.DOTALL | re.MULTILINE)
    named, above = [], Path()
    for line in tree.splitlines():
        assert (row := re.fullmatch(r"((?:  )*)(?:# .*|([\w.]+/?) +\S.*)", line)), line
        if row[2] is not None:
            above = Path(*above.parts[: len(row[1]) // 2], row[2])
            named.append(above)
    assert len(named) == len(set(named))
    assert [path for path in named if not (REPO / path).exists()] == []
    modules = {path.relative_to(REPO) for name in PACKAGES for path in (REPO / name).rglob("*.py")}
    assert {path for path in named if path.suffix == ".py"} == {Path("run_translation.py"), *modules}


def test_the_readmes_commands_are_understood(tmp_path, capsys):
    commands = re.findall(r"^python run_translation\.py (.*?[^\\])(?: +#[^\n]*)?$", README, re.DOTALL | re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        parsed = arguments.parse_arguments(command.replace("\\\n", " ").split())
        config_changes(parsed.model, admin_hf.AdminConfig)


def test_make_targets_of_the_documentation_exist():
    targets = set(re.findall(r"^([a-z]+):.*## ", (REPO / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md", "docs/performance.md"):
        named = set(re.findall(r"(?:`|^|\| `)make ([a-z]+)", (REPO / page).read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, page


def test_the_commands_of_the_benchmarks_are_understood():
    page = (REPO / "docs/performance.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m benchmarks (.*?)(?: +#.*)?$", page, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        assert set(build_benchmarks_parser().parse_args(command.split()).names) <= set(BENCHMARKS)


def test_measured_tables_are_those_of_the_recorded_numbers():
    measured = json.loads((REPO / "docs/performance/decoding.json").read_text(encoding="utf-8"))
    assert decoding.more(measured) in PAGES["docs/translating.md"]
    assert markdown() == (REPO / "docs/performance.md").read_text(encoding="utf-8")


def test_losses_of_deepened_models_are_those_that_were_recorded():
    measured = json.loads((REPO / "docs/deepening.json").read_text(encoding="utf-8"))
    assert deepening.markdown(measured) in PAGES["docs/continuing.md"]


def test_the_quoted_verdicts_of_the_analyses_are_those_of_the_recorded_numbers():
    """Each is computed anew of the numbers in docs/analysis/."""
    page = " ".join(PAGES["docs/analysis.md"].split())
    recorded = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (REPO / "docs/analysis").iterdir()}
    found = {name: recorded.pop(f"dependency-{name}") for name in ("admin", "pre_ln", "post_ln")}
    for values in found.values():
        stacks = {stack: StackDependency(**values[stack]) for stack in STACKS}
        assert f'"{LayerDependency(stacks).verdict()}"' in page
    gradients = recorded.pop("gradients")
    for values in gradients.values():
        stacks = {stack: StackGradients(**values[stack]) for stack in STACKS}
        assert f'"{GradientNorms(stacks).verdict()}"' in page
    assert len(gradients) == 3
    values = recorded.pop("output-change")
    curves = [curve | {fit: Fit(**curve[fit]) for fit in ("linear", "logarithmic")} for curve in values["curves"]]
    depths = {name: values[name] for name in ("sublayers", "d_model", "seed")}
    assert f'"{OutputChange(curves=[ChangeCurve(**curve) for curve in curves], **depths).verdict()}"' in page
    assert not recorded


def test_the_readmes_speeds_are_those_of_the_recorded_numbers():
    measured = json.loads((REPO / "docs/performance/training_step.json").read_text(encoding="utf-8"))
    for dtype in ("float32", "bfloat16"):
        same = [f for f in measured["figures"] if dtype in f["a"] and dtype in f["b"]]
        medians = [statistics.median(figure["ratios"]) for figure in same]
        assert f"{min(medians):.1f} to {max(medians):.1f} times as fast in {dtype}" in README.replace("\n", " ")
    growth = json.loads((REPO / "docs/performance/growth.json").read_text(encoding="utf-8"))["figures"]
    names = [f"layers {n}: times as fast" for n in (6, 12, 24, 50, 100)] + ["vocabulary 1,000: times as fast"]
    medians = [statistics.median(figure["ratios"]) for figure in growth if figure["what"] in names]
    assert len(medians) == 6
    assert f"{min(medians):.2f} to {max(medians):.1f} times as fast" in README.replace("\n", " ")


def test_every_family_that_can_have_omega_is_listed():
    text = (REPO / "docs" / "architectures.md").read_text(encoding="utf-8")
    table = text[text.index("## Which models") : text.index("## Systems")]
    rows = [row.split(" | ") for row in re.findall(r"^\| (`.*?) \|$", table, re.MULTILINE)]
    listed, tested = ({name for row in rows for name in re.findall(r"`([^`]+)`", row[column])} for column in (0, 2))
    assert listed == set(FAMILIES) and tested == set(families.FAMILIES)

"""What the documentation shows, runs."""

import doctest
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

import run_translation
from admin_hf.residual import SYSTEMS
from training import arguments
from training.model import config_changes


REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
MODULES = ["residual", "configuration_admin", "modeling_admin", "profiling"]


@pytest.mark.parametrize("name", [*(f"admin_hf.{name}" for name in MODULES), "training.metrics"])
def test_examples_in_docstrings_run(name):
    try:
        result = doctest.testmod(import_module(name))
        assert result.attempted > 0 and result.failed == 0
    finally:
        SYSTEMS.pop("half_branch", None)


def test_the_first_python_example_of_the_readme_runs(capsys):
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})
    assert "encoder.layers.0.self_attn_layer_norm" in capsys.readouterr().out


def test_what_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (REPO / link).exists(), link


def test_the_readmes_commands_are_understood(tmp_path, capsys):
    commands = re.findall(r"^python run_translation\.py (.*?[^\\])$", README, re.DOTALL | re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        parsed = arguments.parse_arguments(command.replace("\\\n", " ").split())
        config_changes(parsed[0], run_translation.AdminConfig)


def test_make_targets_of_the_documentation_exist():
    targets = set(re.findall(r"^([a-z]+):.*## ", (REPO / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:`|^|\| `)make ([a-z]+)", (REPO / page).read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, page


@pytest.mark.parametrize("recipe", sorted(REPO.glob("hub_configs/*/recipe.json")), ids=lambda path: path.parent.name)
def test_recipes_are_valid_and_name_their_own_folder(recipe, monkeypatch):
    monkeypatch.chdir(REPO)
    parsed = arguments.parse_arguments([str(recipe.relative_to(REPO))])
    values = json.loads(recipe.read_text())
    assert values["config_name"] == f"hub_configs/{recipe.parent.name}"
    run_translation.check_model(parsed[0])

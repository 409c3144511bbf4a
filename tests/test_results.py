import json
import re
from pathlib import Path

import pytest
from conftest import tiny_config

from training import results
from training.errors import InputError


def fake_run(folder: Path, residual: str, bleu: float) -> Path:
    """The JSON files that a run leaves, with numbers that can be recognised on the page."""
    tiny_config(encoder_residual=residual, decoder_residual=residual).save_pretrained(folder)
    arguments = dict.fromkeys((*results.SHOWN, "config_overrides"), None)
    arguments |= {
        "config_name": "hub_configs/demo",
        "max_steps": 20,
        "output_dir": "runs/x",
        "seed": 1234,
        "train_file": "a/path/of/a/machine",
    }
    profile = {"names": ["a", "b"], "branch_variances": [0.3, 0.2], "shortcut_variances": [1, 1], "omega": [1.0, 1.5]}
    history = [
        {"step": 10, "loss": 5.25},
        {"step": 20, "loss": 4.125},
        {"step": 20, "eval_loss": 3.5, "eval_bleu": bleu},
    ]
    signatures = {"test_bleu_signature": "nrefs:1|x", "test_moses_bleu_signature": "nrefs:1|moses"}
    scores = {"test_loss": 3.25, "test_bleu": bleu, "test_moses_bleu": bleu - 1} | signatures
    files = {
        "arguments.json": arguments,
        "all_results.json": {"test_bleu": 99},  # of an earlier session
        "results.json": {"weights": ["/a/path/checkpoint-10", "/a/path/checkpoint-20"], "scores": scores},
        "decodes.jsonl": {},
        "residual_profile.json": {"encoder": profile, "decoder": profile} if residual == "admin" else {},
        "trainer_state.json": {"log_history": history},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content) + "\n")
    return folder


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results_intro.md").write_text("# Results\n")
    return tmp_path / "docs"


def test_the_page_is_made_from_what_the_runs_recorded(tmp_path, docs):
    runs = [fake_run(tmp_path / "runs" / name, name, bleu) for name, bleu in (("admin", 41.07), ("post_ln", 3.21))]
    results.main([str(run) for run in runs])
    page = (docs / "results.md").read_text()
    assert "| admin | test | 40.07 | 41.07 |" in page and "| post_ln | test | 2.21 | 3.21 |" in page
    assert "`nrefs:1\\|moses` `nrefs:1\\|x` |" in page
    assert "the mean of checkpoint-10, checkpoint-20. Decodings of the test set: 1." in page
    assert "| post_ln | 5.25 | 4.12 | 3.50 |" in page and "seed 1234" in page
    figures = {"admin.png", "post_ln.png", "depth.png", "omega.png"}
    assert {path.name for path in (docs / "figures").iterdir()} == figures
    assert all(f"figures/{name}" in page for name in figures)
    assert "machine" not in (docs / "results" / "admin.json").read_text()

    for run in runs:  # the page can be made again without the runs
        for path in run.iterdir():
            path.unlink()
    (docs / "results.md").unlink()
    results.main([])
    assert (docs / "results.md").read_text() == page


def test_the_page_in_the_repository_is_made_of_the_records_there():
    paths = sorted((results.DOCS / "results").glob("*.json"))
    text = results.page([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    assert text == (results.DOCS / "results.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (results.DOCS / name).exists(), name


def test_a_folder_without_a_run_is_refused(tmp_path, docs):
    with pytest.raises(InputError, match="contains no run"):
        results.main([str(tmp_path)])

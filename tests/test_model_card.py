"""What a model card says of the data and the arguments, and that nothing that is published names a local folder."""

import ast
import json
import re

import pytest
from huggingface_hub import ModelCard
from tiny_runs import run

from admin_hf.paths import is_hub_id, published


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/jane doe/corpus", "corpus"),
        ("/home/jane/corpus/", "corpus"),
        ("~/corpus", "corpus"),
        ("~jane/data/corpus", "corpus"),
        ("./corpus", "corpus"),
        ("../jane/corpus", "corpus"),
        ("data/jane/corpus", "corpus"),
        ("C:\\Users\\jane\\corpus", "corpus"),
        ("C:/Users/jane/corpus", "corpus"),
        ("\\\\server\\jane\\corpus", "corpus"),
        ("user/corpus", "user/corpus"),
        ("wmt14", "wmt14"),
        ("user/corpus-1.2_x", "user/corpus-1.2_x"),
        (["/home/jane/a", "b"], ["a", "b"]),
        ({"offload": {"nvme_path": "/home/jane/x"}, "stage": 2}, {"offload": {"nvme_path": "x"}, "stage": 2}),
        ("d_model=16,dropout=0.1", "d_model=16,dropout=0.1"),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_of_a_path_the_last_part_is_published(value, shown):
    assert published(value) == shown


def test_what_lies_here_is_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "user" / "corpus").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "user")
    assert is_hub_id("user/corpus")
    assert published(".") == published("../user") == "user" and published("..") == tmp_path.name
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("user/corpus") and published("user/corpus") == "corpus"
    assert published("data/train", "train_file") == "train", "a file is no name on the Hub"
    assert published("translate en/de: ", "source_prefix") == "translate en/de: "


@pytest.mark.parametrize("prefix", ['translate "en" to de/at: ', None])
def test_a_run_on_a_local_data_set_publishes_no_folder(prefix, data, tmp_path):
    folder, output = tmp_path / "jane" / "corpus", tmp_path / "out"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        sides = ((data / f"{split}.{language}").read_text("utf-8").splitlines() for language in ("en", "de"))
        rows = [json.dumps({"translation": {"en": en, "de": de}}) for en, de in zip(*sides, strict=True)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows), "utf-8")
    changes = {"train_file": None, "validation_file": None, "test_file": None, "do_eval": True, "do_predict": True}
    changes |= {
        "dataset_name": folder,
        "max_steps": 1,
        "cache_dir": tmp_path / "jane" / "cache",
        "source_prefix": prefix,
    }
    assert run(data, output, **changes) == 0
    for path in [*(output / "vanilla").iterdir(), output / "decodes.jsonl"]:
        assert b"jane" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes(), path
    card = ModelCard.load(output / "vanilla" / "README.md")
    assert card.data.datasets is None and "- train: corpus" in card.text
    assert {result.dataset_type for result in card.data.eval_results} == {"text"}
    assert {result.dataset_name for result in card.data.eval_results} == {"corpus"}
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    sources = [node.elts for node in ast.walk(ast.parse(code)) if isinstance(node, ast.List)]
    assert [source.value for (source,) in sources] == [f"{prefix or ''}A dog runs."], "as the model was trained"
    assert (prefix is None) == ("source_prefix" not in card.text)


def test_a_data_set_of_the_hub_is_named(tmp_path):
    from training.model_card import _data, _metadata

    given = dict.fromkeys(("train_file", "validation_file", "test_file", "dataset_config_name"))
    given |= {"dataset_name": "user/corpus", "source_lang": "en", "target_lang": "de", "lowercase": False}
    card = _metadata(given, {"vanilla_test_bleu": 1.0}, "user/model")
    assert card.datasets == ["user/corpus"] and card.eval_results[0].dataset_type == "user/corpus"
    assert "- test: user/corpus" in _data(given)

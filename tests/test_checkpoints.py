"""A stranger's checkpoint is bad input: one clear sentence each, in Python and on the command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import padded_batch, tiny_model
from safetensors.torch import load_file, save_file
from test_export import files
from test_reparameterization import assert_same_function, trained_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, MarianMTModel

from admin_hf import AdminForConditionalGeneration, AdminModel
from admin_hf.__main__ import main
from training.tokenization import train_tokenizer


WEIGHTS = "model.safetensors"


def change_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def change_weights(change_tensors):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        change_tensors(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def cut(length):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


def shard(folder):
    (folder / WEIGHTS).unlink()
    tiny_model().save_pretrained(folder, max_shard_size="4KB")
    return sorted(folder.glob("model-*.safetensors"))


def pickle(folder):
    (folder / WEIGHTS).unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")


FC1 = "model.encoder.layers.0.fc1.weight"

BAD = {
    "cut in the header": (cut(500), "weights of .* are truncated or damaged"),
    "cut in the weights": (cut(-100), "weights of .* are truncated or damaged"),
    "empty": (cut(0), "weights of .* are truncated or damaged"),
    "garbage": (lambda folder: (folder / WEIGHTS).write_bytes(os.urandom(4000)), "truncated or damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no file named model.safetensors"),
    "a pickle": (pickle, r"pickle \(pytorch_model.bin\), which can run code, and is refused"),
    "a shard is missing": (lambda folder: shard(folder)[0].unlink(), "model-00001-of-.*safetensors"),
    "an index of nothing": (
        lambda folder: (shard(folder), (folder / f"{WEIGHTS}.index.json").write_text("{}")),
        "index of the weights of .* is damaged",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "half a config": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "a config that is a list": (  # in Transformers 5.17 its own words for it
        lambda folder: (folder / "config.json").write_text("[1]"),
        "no config.json with the|cannot be read: TypeError: list",
    ),
    "another model's config": (change_config(model_type="bart"), "contains a 'bart' model; expected an Admin"),
    "a size that is text": (change_config(d_model="wide"), "config.json of .* cannot be used: .*d_model"),
    "a size of zero": (change_config(encoder_layers=0), "encoder_layers=0 must be at least 1"),
    "another width": (change_config(d_model=32), r"do not fit its config.json: .* has the shape \(16.*expected \(32"),
    "another vocabulary": (
        change_config(vocab_size=60, decoder_vocab_size=60),
        r"final_logits_bias has the shape \(1, 50\), expected \(1, 60\)",
    ),
    "NaN": (
        change_weights(lambda tensors: tensors[FC1].view(-1)[3:4].fill_(float("nan"))),
        f"has NaN or infinite entries in {FC1}",
    ),
    "integers": (
        change_weights(lambda tensors: tensors.update({FC1: tensors[FC1].long()})),
        f"contains {FC1} as I64; expected a floating-point tensor",
    ),
    "infinity": (
        change_weights(lambda tensors: tensors[FC1].view(-1)[3:4].fill_(float("inf"))),
        f"has NaN or infinite entries in {FC1}",
    ),
}


@pytest.fixture
def good(tmp_path):
    tiny_model().save_pretrained(tmp_path / "good")
    return tmp_path / "good"


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_gets_one_sentence(case, good, tmp_path, capsys):
    spoil, message = BAD[case]
    spoil(good)
    with pytest.raises((OSError, ValueError, RuntimeError), match=message) as caught:
        AdminForConditionalGeneration.from_pretrained(good)
    assert len(str(caught.value).splitlines()) == 1
    assert main(["export", str(good), str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == [f"error: {caught.value}"]
    assert not (tmp_path / "out").exists()


def test_a_pickle_runs_no_code(good, tmp_path):
    marker = tmp_path / "code was run"

    class Bomb:
        def __reduce__(self):
            return open, (str(marker), "w")

    (good / WEIGHTS).unlink()
    torch.save({"model.shared.weight": Bomb()}, good / "pytorch_model.bin")
    with pytest.raises(OSError, match="refused"):
        AdminForConditionalGeneration.from_pretrained(good)
    with pytest.raises(Exception, match="weights_only|Weights only|pickle|Unsupported"):
        AdminForConditionalGeneration.from_pretrained(good, use_safetensors=False)
    assert not marker.exists()


def test_a_pickle_beside_safetensors_is_not_looked_at(good):
    (good / "pytorch_model.bin").write_bytes(b"not even a pickle")
    AdminForConditionalGeneration.from_pretrained(good)


def test_other_shapes_can_be_asked_for(good):
    change_config(vocab_size=60, decoder_vocab_size=60, pad_token_id=59, decoder_start_token_id=59)(good)
    model = AdminForConditionalGeneration.from_pretrained(good, ignore_mismatched_sizes=True)
    assert model.model.shared.weight.shape == (60, 16)


# --- the command line -------------------------------------------------------------------------------


def test_export_writes_a_stock_checkpoint_with_its_tokenizer(tmp_path, capsys):
    texts = ["ein kleiner Hund", "a small dog runs", "zwei Hunde laufen", "two dogs, and a cat"] * 3
    train_tokenizer([texts], 50).save_pretrained(tmp_path / "run")
    model = trained_model()
    model.save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "a" / "out")]) == 0
    assert "MarianMTModel" in capsys.readouterr().out
    exported = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "a" / "out")
    assert type(exported) is MarianMTModel
    assert_same_function(model, exported)
    assert AutoTokenizer.from_pretrained(tmp_path / "a" / "out")(texts) == (
        AutoTokenizer.from_pretrained(tmp_path / "run")(texts)
    )
    # An earlier export is replaced, in another dtype
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "a" / "out"), "--dtype", "bfloat16"]) == 0
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "a" / "out", dtype="auto").dtype == torch.bfloat16


def test_a_base_model_is_exported_as_one(tmp_path):
    AdminModel(trained_model().config).save_pretrained(tmp_path / "base")
    assert main(["export", str(tmp_path / "base"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MarianModel"]


def test_a_checkpoint_to_train_on_is_never_replaced(good, tmp_path, capsys):
    trained_model().save_pretrained(tmp_path / "other")
    (tmp_path / "stranger").mkdir()
    BartConfig().save_pretrained(tmp_path / "stranger")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[]")
    (tmp_path / "link").symlink_to(good)
    reasons = {good: "is the checkpoint itself", tmp_path / "link": "is the checkpoint itself"}
    reasons |= {tmp_path / "other": "contains a 'admin' model", tmp_path / "stranger": "contains a 'bart' model"}
    for out, reason in (reasons | {tmp_path / "odd": "contains a None model"}).items():
        before = files(out)
        assert main(["export", str(good), str(out)]) == 2
        assert reason in capsys.readouterr().err
        assert files(out) == before


def test_half_a_checkpoint_is_not_exported(good, tmp_path, capsys):
    change_weights(lambda tensors: tensors.pop(FC1))(good)
    assert main(["export", str(good), str(tmp_path / "out")]) == 2
    assert f"lacks {FC1}: config.json and weights do not belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{"encoder_layers": 1}, {"encoder_residual": "post_ln", "decoder_residual": "post_ln"}],
    ids=["fewer layers", "no place for ω"],
)
def test_weights_that_config_json_has_no_place_for_are_not_dropped(changes, good, tmp_path, capsys):
    change_config(**changes)(good)
    assert main(["export", str(good), str(tmp_path / "out")]) == 2
    assert "has no place for model." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evil.bin", "../evil.safetensors", "/etc/passwd", "https://evil/x.safetensors", 3])
def test_an_index_that_leads_elsewhere_is_refused(name, good, tmp_path):
    """Transformers would read a pickle, or a file outside the folder, that an index of shards names."""
    tensors = load_file(good / WEIGHTS)
    (good / WEIGHTS).unlink()
    torch.save(tensors, good / "evil.bin")
    save_file(tensors, tmp_path / "evil.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (good / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="which is not a safetensors file"):
        AdminForConditionalGeneration.from_pretrained(good)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "null"),
        ("config.json", '{"model_type": ["admin"]}'),
        ("config.json", '{"model_type": "admin", "dtype": "evil"}'),
        ("config.json", '{"model_type": "admin", "id2label": "x"}'),
        ("config.json", '{"model_type": "admin", "quantization_config": 3}'),
        (f"{WEIGHTS}.index.json", "[]"),
        (f"{WEIGHTS}.index.json", '{"weight_map": "x"}'),
        ("generation_config.json", "[]"),
        ("generation_config.json", "3"),
    ],
)
def test_json_of_a_stranger_ends_in_one_sentence(file, content, good, tmp_path, capsys):
    if "index" in file:
        (good / WEIGHTS).unlink()
    (good / file).write_text(content)
    assert main(["export", str(good), str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) == 1


@pytest.mark.parametrize("content", ["[]", "3", '{"tokenizer_class": 3}'])
def test_a_tokenizer_that_cannot_be_loaded_is_said_to_be_missing(content, good, tmp_path, capsys):
    (good / "tokenizer_config.json").write_text(content)
    assert main(["export", str(good), str(tmp_path / "out")]) == 0
    assert "has no tokenizer that can be loaded" in capsys.readouterr().out


def test_a_mix_without_stock_architecture_is_explained(tmp_path, capsys):
    tiny_model(encoder_residual="post_ln", decoder_residual="pre_ln").save_pretrained(tmp_path / "mix")
    assert main(["export", str(tmp_path / "mix"), str(tmp_path / "out")]) == 2
    assert "register_for_auto_class" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "no/such/folder"])
def test_a_folder_that_is_not_there(name, tmp_path, capsys):
    assert main(["export", name, str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: There is no {name}: expected a checkpoint")


@pytest.mark.slow
def test_help_and_a_wrong_command():
    def run(*arguments):
        command = [sys.executable, "-m", "admin_hf", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    shown = run("export", "--help")
    assert shown.returncode == 0 and "CHECKPOINT OUT" in shown.stdout and "example:" in shown.stdout
    wrong = run("exprot")
    assert wrong.returncode == 2 and "choose from" in wrong.stderr and "export" in wrong.stderr


def test_the_export_can_be_checked_by_hand(good, tmp_path):
    """What the command promises, from outside: equal logits of the two folders."""
    assert main(["export", str(good), str(tmp_path / "out")]) == 0
    batch = padded_batch()
    with torch.no_grad():
        kept = AdminForConditionalGeneration.from_pretrained(good)(**batch).logits
        folded = MarianMTModel.from_pretrained(tmp_path / "out")(**batch).logits
    torch.testing.assert_close(kept, folded, rtol=0, atol=1e-5)

"""Bad input to the script ends in one sentence, exit code 2, and before any training."""

import json
import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_runs import SHAPE, arguments, flags, run
from transformers import AutoTokenizer

from training.arguments import DataTrainingArguments, ModelArguments, parse_arguments
from training.data import load_pairs
from training.errors import InputError
from training.runs import check_data, check_output_dir, record_arguments, record_data


def error(capsys, data, output, **changes) -> str:
    """The one sentence in which a run with bad input ends."""
    assert run(data, output, **changes) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert not list(Path(output).glob("**/model.safetensors")), "before any training"
    return lines[0]


def test_nothing_to_do(data, tmp_path, capsys):
    assert "Nothing to do" in error(capsys, data, tmp_path, do_train=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_lang": None}, "--source_lang is missing"),
        ({"target_lang": "en"}, "both 'en'"),
        ({"target_lang": "zh", "metric_for_best_model": "moses_bleu"}, "no Moses tokenizer for --target_lang zh"),
        (
            {"target_lang": "tha", "metric_for_best_model": "eval_moses_bleu"},
            "no Moses tokenizer for --target_lang tha",
        ),
        ({"train_file": None}, "--do_train needs --train_file"),
        ({"train_file": "no/such/file"}, "there is no no/such/file.en"),
        ({"target_lang": "fr"}, "train.fr does not exist"),
        (
            {"config_overrides": "d_model=15,encoder_layers=1"},
            "d_model=15 must be divisible by encoder_attention_heads=8",
        ),
        ({"config_overrides": "encoder_residual=resnet"}, "encoder_residual='resnet' is not a residual system"),
        ({"config_overrides": "depth=12"}, "'depth=12' is not a field"),
        ({"config_overrides": "d_model=wide"}, "d_model='wide'"),
        ({"config_overrides": "d_model=1e3"}, "d_model"),
        ({"config_overrides": "vocab_size=100"}, "vocab_size is set by the tokenizer"),
        ({"config_overrides": "activation_function=foo"}, "activation_function='foo'"),
        ({"label_smoothing_factor": 1.5}, "--label_smoothing_factor 1.5"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0"),
        ({"resume_from_checkpoint": "no/such"}, "--resume_from_checkpoint no/such"),
        ({"output_dir": "/dev/null/out"}, "not a folder that can be written to"),
        ({"config_overrides": SHAPE + ",encoder_layers=0"}, "encoder_layers=0 must be at least 1"),
        ({"config_name": "no/such/config"}, "--config_name no/such/config"),
        ({"vocab_size": 100000}, "--vocab_size 100000 does not fit the data"),
        ({"max_source_length": 2}, "No training pair is left"),
        ({"max_target_length": 0}, "--max_target_length 0"),
        ({"max_source_length": 5000}, "max_position_embeddings is 1024"),
        ({"tokenizer_name": "no/such/tokenizer"}, "The tokenizer no/such/tokenizer cannot be loaded"),
        ({"residual_profile": "no/such/profile.json"}, "no/such/profile.json"),
        ({"push_to_hub": True, "do_train": None, "do_eval": True, "model_name_or_path": "x"}, "needs --do_train"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "--hub_strategy every_save: only 'end' is possible"),
        ({"max_tokens": 0}, "--max_tokens 0"),
        ({"dataset_name": "some/set"}, "--train_file and --dataset_name name the same data"),
        ({"num_beams": 2, "generation_num_beams": 3}, "--num_beams 2 and --generation_num_beams 3 mean the same"),
        ({"metric_for_best_model": "bleu", "predict_with_generate": False}, "bleu needs translations"),
        ({"max_tokens": 2}, "2 target tokens. Raise --max_tokens?"),
        ({"max_tokens": 4, "max_source_length": 3}, "Raise --max_source_length or --max_tokens?"),
        ({"max_tokens": 200, "max_source_length": 3}, "Raise --max_source_length or --max_target_length?"),
        ({"learning_rat": 1}, "There is no --learning_rat; is --learning_rate meant?"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0 must be at least 1."),
        ({"adam_beta2": 1.5}, "--adam_beta2 1.5 must be at least 0 and below 1."),
        ({"num_train_epochs": 0, "max_steps": None}, "--num_train_epochs 0.0 must be above 0."),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr cannot be used: One of"),
        ({"lr_scheduler_kwargs": "{"}, "--lr_scheduler_kwargs { is not a JSON object"),
        ({"optim_args": "momentum=0.9"}, "--optim_args momentum=0.9 changes nothing"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 121}, "120 training pairs do not fill one"),
        ({"batch_eval_metrics": True}, "--batch_eval_metrics True: scores are those of all sentences"),
        ({"length_penalty": 0.5}, "--length_penalty 0.5 compares beams: give --num_beams 2 or more."),
        ({"fsdp": "full_shard"}, "Using fsdp only works in distributed training"),
        ({"max_tokens": 6, "pad_to_multiple_of": 8}, "--max_tokens 6 is below --pad_to_multiple_of 8"),
        ({"report_to": "wandb"}, "--report_to wandb"),
        ({"learning_rate": "inf"}, "--learning_rate inf"),
        ({"warmup_init_lr": 1}, "--warmup_init_lr 1.0 must be at least 0 and at most the learning rate, 0.01"),
        ({"average_last": 3, "save_total_limit": 2}, "--average_last 3 needs more checkpoints than"),
        ({"average_last": 3, "save_strategy": "no"}, "--average_last 3 needs checkpoints"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience 2 needs --eval_strategy"),
        ({"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"}, "--save_strategy best"),
        ({"metric_for_best_model": "beauty"}, "--metric_for_best_model beauty is not a score"),
        ({"optim": "lion_8bit"}, "--optim"),
        ({"optim": "radan"}, "radan"),
        ({"average_tokens_across_devices": False}, "--average_tokens_across_devices"),
        ({"learning_rate": "fast"}, "fast"),
        ({"cache_dir": "/dev/null/cache"}, "The cache folder /dev/null/cache cannot be written to"),
    ],
)
def test_a_wrong_argument(data, tmp_path, capsys, changes, message):
    try:
        assert message in error(capsys, data, tmp_path / "out", **changes)
    except SystemExit as exit:  # argparse ends the process itself
        assert exit.code == 2 and message in capsys.readouterr().err


def test_an_output_dir_without_a_name_leaves_nothing_here(data, capsys):
    before = sorted(Path().iterdir())
    assert run(data, "") == 2
    assert "--output_dir is empty" in capsys.readouterr().err and sorted(Path().iterdir()) == before


def test_a_checkpoint_that_cannot_be_loaded(data, tmp_path, capsys):
    assert run(data, tmp_path / "model") == 0
    weights_file = tmp_path / "model" / "model.safetensors"
    whole = weights_file.read_bytes()
    from_model = {"model_name_or_path": tmp_path / "model", "config_overrides": None}
    weights_file.write_bytes(whole[:1000])
    assert "cannot be loaded" in error(capsys, data, tmp_path / "out", **from_model)
    weights_file.unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"a pickle, say")
    assert "cannot be loaded" in error(capsys, data, tmp_path / "out", **from_model)


def test_a_profile_of_another_model_is_refused(data, tmp_path, capsys):
    assert run(data, tmp_path / "model") == 0
    profile = tmp_path / "model" / "residual_profile.json"
    deeper = SHAPE.replace("encoder_layers=1", "encoder_layers=2")
    message = error(capsys, data, tmp_path / "out", config_overrides=deeper, residual_profile=profile)
    assert "The profile has 2 sub-layers in its encoder, the model has 4" in message


def test_what_a_failed_run_left_is_not_taken_over(data, tmp_path, capsys):
    assert "No training pair is left" in error(capsys, data, tmp_path / "out", max_source_length=2)
    assert run(data, tmp_path / "out", vocab_size=220) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 220


def test_a_folder_with_another_run_is_refused_and_left_alone(data, tmp_path, capsys):
    assert run(data, tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(data, tmp_path, learning_rate=0.02, config_overrides=SHAPE + ",dropout=0.2") == 2
    message = capsys.readouterr().err
    assert "learning_rate: 0.01 then, 0.02 now" in message and "config_overrides" in message
    assert "seed" not in message and f"remove {tmp_path}" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_with_its_own_data_alone(data, tmp_path, capsys):
    """Whatever their names and time stamps are."""
    here = tmp_path / "here"
    shutil.copytree(data, here)
    given = {"do_eval": True, "predict_with_generate": False, "report_to": "none", "save_steps": 2}
    assert run(here, tmp_path / "run", max_steps=2, **given) == 0
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    assert {split: [file["name"] for file in files] for split, files in recorded.items()} == {
        "train": ["train.en", "train.de"],
        "validation": ["validation.en", "validation.de"],
    }
    assert all(len(file["checksum"]) == 64 for files in recorded.values() for file in files)
    assert str(tmp_path) not in json.dumps(recorded)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def refused(name: str, old: str, new: str) -> str:
        text, stamp = (here / name).read_bytes(), os.stat(here / name).st_mtime_ns
        (here / name).write_bytes(text.replace(old.encode(), new.encode(), 1))
        os.utime(here / name, ns=(stamp, stamp))
        capsys.readouterr()
        assert run(here, tmp_path / "run", max_steps=4, **given) == 2
        (here / name).write_bytes(text)
        return capsys.readouterr().err

    size = os.stat(here / "train.de").st_size
    same_size = refused("train.de", " ", "-")
    assert f"other train data: train.de had {size:,} bytes then, the same number with other content now" in same_size
    assert f"--model_name_or_path {tmp_path / 'run'} and another --output_dir" in same_size
    assert f"train.de had {size:,} bytes then, {size + 1:,} bytes now" in refused("train.de", " ", "  ")
    assert "other validation data: validation.en" in refused("validation.en", " ", "  ")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before

    (tmp_path / "there").mkdir()
    for path in here.iterdir():  # another folder, other names, and a test set that is free to change
        path.rename(tmp_path / "there" / path.name.replace("train", "pairs"))
    for side in ("en", "de"):
        (tmp_path / "there" / f"test.{side}").write_text("A dog.\n")
    moved = given | {"train_file": tmp_path / "there" / "pairs", "do_predict": True}
    assert run(tmp_path / "there", tmp_path / "run", max_steps=4, **moved) == 0
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    assert recorded.keys() == {"train", "validation"} and recorded["train"][0]["name"] == "pairs.en"


def test_a_run_from_before_data_were_recorded_goes_on(data, tmp_path):
    """By the names of its files, as then; and what they hold is recorded from now on."""
    given = parse_arguments(flags(arguments(data, tmp_path / "run")))
    record_arguments(given)
    check_output_dir(given)
    content = {"train": {"a/train.en": {"num_bytes": 1, "checksum": "x"}}}
    check_data(given, content)
    elsewhere = parse_arguments(flags(arguments(data, tmp_path / "run", train_file="elsewhere")))
    with pytest.raises(InputError, match="train_file: .* then, 'elsewhere' now"):
        check_output_dir(elsewhere)
    record_data(given, content | {"test": {"test.en": {"num_bytes": 1, "checksum": "x"}}})
    check_output_dir(elsewhere)
    check_data(elsewhere, {"train": {"b/other.en": {"num_bytes": 1, "checksum": "x"}}})
    check_data(elsewhere, {"test": {"test.en": {"num_bytes": 2, "checksum": "y"}}})
    for other in ({"num_bytes": 1, "checksum": "y"}, {"num_bytes": 2, "checksum": "x"}):
        with pytest.raises(InputError, match="other train data: train.en had 1 bytes then"):
            check_data(elsewhere, {"train": {"a/train.en": other}})
    with pytest.raises(InputError, match="other train data: train.de had nothing then, 2 bytes now"):
        check_data(given, {"train": content["train"] | {"a/train.de": {"num_bytes": 2, "checksum": "x"}}})
    record_data(given, {"validation": {"v": {"num_bytes": 1, "checksum": "x"}}})
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    assert recorded.keys() == {"train", "validation"}, "of a session without one of them the other stays"


def test_a_data_set_by_name_is_known_by_its_text(tmp_path):
    def content(path: Path, *texts: str) -> dict:
        path.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"en": list(texts), "de": list(texts)}).to_parquet(path / "train.parquet")
        data = DataTrainingArguments(source_lang="en", target_lang="de", dataset_name=str(path))
        dataset = load_pairs("train", data, ModelArguments(cache_dir=str(tmp_path / "cache")))
        assert list(dataset.info.download_checksums) == [str(path)]
        return dataset.info.download_checksums[str(path)]

    first = content(tmp_path / "a", "one", "two")
    assert content(tmp_path / "b", "one", "two") == first
    assert content(tmp_path / "a", "one", "tow") != first and content(tmp_path / "a", "onetwo", "") != first

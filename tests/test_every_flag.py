"""Every flag of `run_translation.py --help`, with other values than its default: it works, or is refused at once.

Values come from the flag's type or its choices, so that a new flag of Transformers is tried as well; flags that name a
file, or need others beside them, are listed. Numbers are also tried outside of their range, JSON malformed.
"""

import argparse
import dataclasses
import gc
import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import pytest
import torch
from tiny_runs import SHAPE, arguments, run
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import logging
from transformers.training_args import OptimizerNames

import run_translation
from training import model_card
from training.arguments import DataTrainingArguments, ModelArguments, TranslationTrainingArguments, build_parser
from training.embedded_data import write_embedded_data


GROUPS = (ModelArguments, DataTrainingArguments, TranslationTrainingArguments)
DICTS = TranslationTrainingArguments._VALID_DICT_FIELDS

EVALUATED = {"eval_strategy": "epoch", "save_strategy": "epoch"}
ONE_WORKER = {"dataloader_num_workers": 1}
CHECKPOINTED = {"gradient_checkpointing": True}

# What a flag is tried with in place of a value of its type; {0} is a folder with a model, data and a data set. A list
# of pairs: the value, or None for leaving the flag out, and the flags beside it
SPECIAL: dict[str, list] = {
    "model_name_or_path": [("{0}/model", {"config_overrides": None}), ("no/such", {"config_overrides": None})],
    "encoder_layers": [(2, {"model_name_or_path": "{0}/model", "config_overrides": None})],
    "decoder_layers": [(2, {"model_name_or_path": "{0}/model", "config_overrides": None})],
    "config_name": ["{0}/model", "no/such"],
    "config_overrides": [f"{SHAPE},max_position_embeddings=64,dropout=0.2", "x"],
    "tokenizer_name": [None, "no/such"],
    "vocab_size": [(130, {"tokenizer_name": None})],
    "lowercase": [(True, {"tokenizer_name": None})],
    "residual_profile": ["{0}/model/residual_profile.json", "no/such"],
    "cache_dir": ["{0}/other_cache"],
    "source_lang": ["de"],
    "dataset_name": ["{0}/hub", "no/such"],
    "train_file": ["{0}/data/validation", "no/such"],
    "validation_file": ["{0}/data/test", "no/such"],
    "test_file": ["{0}/data/validation", "{0}/data/test.en", "no/such"],
    "max_source_length": [59, 65],
    "max_target_length": [59, 65],
    "val_max_target_length": [4, 1, 65],
    "seed": [1, 2**32],
    "data_seed": [1, 2**32],
    "length_penalty": [0.5, (0.5, {"num_beams": 2}), (-1, {"num_beams": 2})],
    "output_dir": ["{0}/elsewhere"],
    "max_steps": [1],
    "learning_rate": [0.001, 0],
    "num_train_epochs": [0.5, 0],
    "warmup_steps": [1, 0.5, 100],
    "lr_scheduler_kwargs": [
        ('{"min_lr": 0.001}', {"lr_scheduler_type": "cosine_with_min_lr"}),
        ('{"num_decay_steps": 1}', {"lr_scheduler_type": "warmup_stable_decay"}),
        ('{"lr_end": 1}', {"lr_scheduler_type": "polynomial"}),
    ],
    "optim": [*OptimizerNames, "radam"],
    "optim_args": ["momentum", "momentum=0.5", ("momentum=0.5", {"optim": "sgd"})],
    "gradient_accumulation_steps": [2, 99],
    "weight_decay": [0.1],
    "adam_beta1": [0.5],
    "adam_beta2": [0.5],
    "adam_epsilon": [1e-4],
    "label_smoothing_factor": [0.1],
    "torch_compile": [],  # tests/test_compiled_training.py
    "torch_compile_backend": ["eager", "x"],
    "activation_checkpointing_kwargs": [('{"use_reentrant": true}', CHECKPOINTED), ('{"x": 1}', CHECKPOINTED)],
    "gradient_checkpointing_kwargs": [('{"use_reentrant": true}', {"gradient_checkpointing": True})],
    "logging_steps": [2, 0.5, 1.5],
    "report_to": ["tensorboard", "all", "wandb"],
    "eval_steps": [(steps, {"eval_strategy": "steps"}) for steps in (1, 0.5, 0, 1.5)],
    "eval_strategy": ["steps", "epoch"],
    "lr_scheduler_type": [("reduce_lr_on_plateau", EVALUATED), ("greedy", EVALUATED)],
    "save_steps": [1, 0.5, 1.5],
    "load_best_model_at_end": [True, (True, EVALUATED)],
    "metric_for_best_model": ["ter", "x", ("ter", EVALUATED | {"load_best_model_at_end": True})],
    "greater_is_better": [(False, EVALUATED | {"load_best_model_at_end": True})],
    "early_stopping_patience": [1, (1, EVALUATED)],
    "accelerator_config": [
        *('{"split_batches": true}', '{"dispatch_batches": true}', '{"even_batches": false}', '{"x": 1}'),
        *('{"use_seedable_sampler": false}', '{"non_blocking": true}'),
        '{"gradient_accumulation_kwargs": {"num_steps": 2}}',
    ],
    "deepspeed": ['{"x": 1}'],
    "dataloader_drop_last": [True, (True, {"per_device_train_batch_size": 3})],
    "dataloader_persistent_workers": [True, (True, ONE_WORKER)],
    "dataloader_prefetch_factor": [1, (1, ONE_WORKER)],
    "dataloader_multiprocessing_context": ["spawn", ("fork", ONE_WORKER)],
    "debug": ["underflow_overflow", "tpu_metrics_debug", "x"],
    "include_for_metrics": ["inputs", "loss"],
    "fsdp": ["x", "full_shard", "full_shard auto_wrap"],
    "fsdp_config": ['{"min_num_params": 1}'],
    "generation_config": ["{0}/model", "{0}/model/generation_config.json", "{0}/beams.json", "no/such"],
    "max_tokens": [64, 4, 100_000],
    "pad_to_multiple_of": [8],
    "warmup_init_lr": [1e-4, (1e-4, {"learning_rate": 0})],
    "neftune_noise_alpha": [0.5],
    "hub_strategy": [("every_save", {"push_to_hub": True})],
}
# What is known only when the data is read
OF_THE_DATA = {"dataset_name", "train_file", "validation_file", "test_file", "max_tokens", "dataloader_drop_last"}


def values(action: argparse.Action, field: dataclasses.Field) -> Iterator[object]:
    """Values of a flag: those that are listed, its choices, or one of its type that is not the default."""
    kind = getattr(action.type, "__name__", "")
    yield from SPECIAL.get(action.dest, [])
    if action.choices is not None:
        yield from (choice for choice in action.choices if choice != action.default)
    elif action.dest not in SPECIAL:
        if kind == "string_to_bool":
            yield from (value for value in (True, False) if value != action.default)
        elif action.type in (int, float):
            default = action.default or 0
            yield default + 1 if action.type is int else default + 0.5
        else:
            yield "x"
    if action.type in (int, float):
        yield from (-1, 0) if action.default != -1 else (-5, 0)
        yield from ("nan", "inf") if action.type is float else ()
    if action.dest in DICTS:
        yield from ("{}", "{", "no/such")


def cases() -> Iterator[tuple[str, list[str], dict]]:
    """Name, flags without a value, and changes to the flags of a tiny run."""
    fields = {field.name: field for group in GROUPS for field in dataclasses.fields(group)}
    for action in build_parser()._actions:
        if isinstance(action, argparse._StoreFalseAction):
            yield action.option_strings[0], [action.option_strings[0]], {}
        elif action.dest in fields:
            for value in values(action, fields[action.dest]):
                value, others = value if isinstance(value, tuple) else (value, {})
                value = value.value if isinstance(value, Enum) else value
                beside = "".join(f"-{name}" for name in others)
                yield f"{action.dest}-{value}{beside}", [], {action.dest: value} | others


ALL = {}
for _name, _flags, _changes in cases():
    ALL.setdefault(_name, (_flags, _changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    write_embedded_data(folder / "data", train=8, validation=2, test=2)
    for split in ("train", "validation", "test"):
        sides = (
            (folder / "data" / f"{split}.{language}").read_text("utf-8").splitlines() for language in ("en", "de")
        )
        rows = [json.dumps({"translation": {"en": en, "de": de}}) for en, de in zip(*sides, strict=True)]
        (folder / "hub").mkdir(exist_ok=True)
        (folder / "hub" / f"{split}.jsonl").write_text("\n".join(rows), "utf-8")
    (folder / "beams.json").write_text('{"num_beams": 2}')
    assert run(folder / "data", folder / "model", **tiny(folder, tokenizer_name=None)) == 0
    return folder


def tiny(folder: Path, **changes) -> dict:
    """A run of two updates that costs a third of a second, most of it Trainer's."""
    limits = {"max_source_length": 60, "max_target_length": 60, "val_max_target_length": 3}
    return {
        "config_overrides": f"{SHAPE},max_position_embeddings=64",
        "tokenizer_name": folder / "model",
        "vocab_size": 120,
        "cache_dir": folder / "cache",
        "num_train_epochs": 1,
        "max_steps": None,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "do_eval": True,
        "do_predict": True,
        **limits,
        **changes,
    }


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[None]:
    """Without the figure of the card, and the collector need not walk all that the tests have imported."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_card, "_draw", lambda *_: None)
        patch.setenv("HF_TOKEN", "")
        yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What flags change in the process as a whole."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ALL)
def test_a_flag_works_or_is_refused_at_once(name, folder, tmp_path, capsys, monkeypatch):
    switches, changes = ALL[name]
    output = tmp_path / "out"
    changes = {
        key: text.format(folder) if isinstance(text, str) and "{0}" in text else text for key, text in changes.items()
    }
    given = arguments(folder / "data", output, **tiny(folder, **changes))
    argv = [text for key, value in given.items() for text in (f"--{key}", str(value))] + switches
    code = run_translation.main(argv)
    for found in gc.get_objects() if "dataloader_persistent_workers" in changes else ():
        if isinstance(found, _MultiProcessingDataLoaderIter):
            found._shutdown_workers()  # which the end of a process does
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if code == 0:
        assert (Path(given["output_dir"]) / "all_results.json").exists()
        return
    assert code == 2, captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and captured.err.rstrip().endswith(errors[0]), captured.err
    if not OF_THE_DATA & changes.keys():
        assert captured.err.strip() == errors[0] and not output.exists(), "before the data is touched"


def test_all_flags_are_tried():
    tried = {name.removeprefix("--no_") for _, (switches, _) in ALL.items() for name in switches}
    tried |= {key for _, changes in ALL.values() for key in changes}
    assert {field.name for group in GROUPS for field in dataclasses.fields(group) if field.init} <= tried | {
        "torch_compile"
    }

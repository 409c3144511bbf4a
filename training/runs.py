"""One output_dir, one run: its arguments, its progress, and its model."""

import json
import tempfile
from dataclasses import asdict, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from admin_hf.checkpoints import write_whole
from admin_hf.run.folder import ARGUMENTS_NAME, DATA_NAME, STATE_NAME, complete_checkpoints

from .arguments import Arguments, TranslationTrainingArguments
from .errors import InputError


# Of the files of a split, or of a data set by name: `num_bytes` and `checksum` by path or name
Contents = dict[str, dict[str, Any]]


def last_checkpoint(training: TranslationTrainingArguments) -> str | None:
    """The newest complete checkpoint of the run in output_dir."""
    complete = complete_checkpoints(training.output_dir)
    return str(complete[-1]) if complete else None


def finished_checkpoint(training: TranslationTrainingArguments) -> str | None:
    """The checkpoint with the run's result, if nothing is left to train or training is not requested.

    Trainer would train one more update when it is started on a finished run.
    """
    checkpoint = last_checkpoint(training)
    if checkpoint is None:
        return None
    state = json.loads(Path(checkpoint, STATE_NAME).read_text(encoding="utf-8"))
    done = state["global_step"] >= training.max_steps > 0 or (
        training.max_steps <= 0 and state["epoch"] >= training.num_train_epochs
    )
    stopping = state["stateful_callbacks"].get("EarlyStopping")
    if training.early_stopping_patience and stopping:
        done |= stopping["attributes"]["early_stopping_patience_counter"] >= training.early_stopping_patience
    if training.do_train and not done:
        return None
    best = state.get("best_model_checkpoint")
    if training.load_best_model_at_end and best:
        best = Path(training.output_dir, Path(best).name)  # wherever the run has been moved to
        checkpoint = str(best) if best.is_dir() else checkpoint
    return checkpoint


def averaged_checkpoints(training: TranslationTrainingArguments) -> list[Path]:
    """The checkpoints whose mean is the run's model: those of `--average_last`, now or when the run was trained."""
    last = training.average_last
    if not training.do_train and (record := Path(training.output_dir, ARGUMENTS_NAME)).exists():
        last = last or json.loads(record.read_text(encoding="utf-8")).get("average_last")
    return complete_checkpoints(training.output_dir)[-last:] if last else []


# --- what was asked of it -------------------------------------------------------------------------

# Arguments that may change between the sessions of one run: they do not change what is trained, or say for how long.
_FREE = {
    *("do_train", "do_eval", "do_predict", "test_file", "max_eval_samples", "max_predict_samples", "num_beams"),
    *("length_penalty", "average_last", "prediction_loss_only"),
    *("val_max_target_length", "overwrite_cache", "preprocessing_num_workers", "cache_dir", "output_dir"),
    *("max_steps", "num_train_epochs", "run_name", "disable_tqdm", "report_to", "project", "trackio_space_id"),
    *("resume_from_checkpoint", "per_device_eval_batch_size", "eval_accumulation_steps", "torch_empty_cache_steps"),
    *("predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config", "use_cpu"),
    *("local_rank", "ddp_timeout", "ddp_backend", "include_num_input_tokens_seen", "full_determinism"),
}
_FREE_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "dataloader_", "debug", "skip_memory")
# These do, in spite of such a name
_NOT_FREE = {"dataloader_drop_last"}


def check_output_dir(arguments: Arguments) -> None:
    """Refuse to train in a folder that contains a run with other arguments, or files of another program.

    Raises:
        InputError: the message names the arguments that differ, or the problem of the folder.
    """
    folder = Path(arguments.training.output_dir)
    record = folder / ARGUMENTS_NAME
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(f"--output_dir {folder} is not a folder that can be written to: {error}") from error
    if not arguments.training.do_train:
        return
    afresh = f"To continue that run, repeat its arguments. {_afresh(folder)}"
    if not record.exists():
        if folder.exists() and get_last_checkpoint(str(folder)) is not None:
            raise InputError(f"{folder} contains checkpoints of another program (no {ARGUMENTS_NAME}). {afresh}")
        return
    before = _read(record, afresh)
    now = recorded(arguments)
    # Where the content of files is recorded it decides, not where they are
    moved = {f"{split}_file" for split in _read(folder / DATA_NAME, afresh)} - {"test_file"}
    defaults = {item.name: item.default for group in arguments for item in fields(group)} | {"world_size": 1}
    before = {name: defaults.get(name) for name in now} | before  # of arguments that are newer than the run
    differing = [
        f"{name}: {before.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and name not in moved
        and (name in _NOT_FREE or name not in _FREE and not name.startswith(_FREE_PREFIXES))
    ]
    if differing:
        raise InputError(f"{folder} contains a run with other arguments ({'; '.join(differing)}). {afresh}")


def check_data(arguments: Arguments, contents: dict[str, Contents]) -> None:
    """Refuse training or validation text that differs from that of the run in output_dir.

    Raises:
        InputError: the message names the file that differs.
    """
    folder = Path(arguments.training.output_dir)
    if not arguments.training.do_train or not (folder / ARGUMENTS_NAME).exists():
        return
    before = _read(folder / DATA_NAME, _afresh(folder))
    for split in contents.keys() & before.keys() - {"test"}:
        files = _named(contents[split])
        for then, now in zip_longest(before[split], files, fillvalue={}):
            if any(then.get(key) != now.get(key) for key in ("num_bytes", "checksum")):
                sizes = [f"{file['num_bytes']:,} bytes" if file else "nothing" for file in (then, now)]
                if sizes[0] == sizes[1]:
                    sizes[1] = "the same number with other content"
                raise InputError(
                    f"{folder} contains a run with other {split} data: {(now or then)['name']} had {sizes[0]} then, "
                    f"{sizes[1]} now. To continue that run, give its data; to train its model on other data, give "
                    f"--model_name_or_path {folder} and another --output_dir, and leave out --config_name and "
                    "--config_overrides."
                )


def record_data(arguments: Arguments, contents: dict[str, Contents]) -> None:
    """Write size and checksum of the training and validation text, without its place."""
    path = Path(arguments.training.output_dir) / DATA_NAME
    before = _read(path, _afresh(path.parent)) if (path.parent / ARGUMENTS_NAME).exists() else {}
    now = {split: _named(content) for split, content in contents.items() if split != "test"}
    write_whole(path, json.dumps(before | now, indent=1) + "\n")


def _named(contents: Contents) -> list[dict[str, Any]]:
    return [{"name": Path(name).name, **content} for name, content in contents.items()]


def _afresh(folder: Path) -> str:
    return f"To start afresh remove {folder} or choose another --output_dir."


def _read(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object; empty where there is none.

    Raises:
        InputError: it is damaged.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}). {advice}") from error


def recorded(arguments: Arguments) -> dict[str, Any]:
    """All arguments as JSON data, tokens blanked out (as `TrainingArguments.to_dict` does)."""
    training = arguments.training
    values = asdict(arguments.model) | asdict(arguments.data) | training.to_dict()
    values |= {"world_size": training.world_size}
    return json.loads(json.dumps(values, default=str))  # --generation_config is a path


def record_arguments(arguments: Arguments) -> None:
    """Write all arguments into the run's folder, to recognise it when it is resumed."""
    path = Path(arguments.training.output_dir) / ARGUMENTS_NAME
    write_whole(path, json.dumps(recorded(arguments), indent=1) + "\n")

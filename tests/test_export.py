"""Exports into folders: whole or not at all, and nothing else is touched."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors.torch
from conftest import randomize, tiny_model
from safetensors import SafetensorError
from test_reparameterization import assert_same_function, trained_model
from transformers import AutoModelForSeq2SeqLM

from admin_hf.checkpoints import replaced_model


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_replaces_the_model_and_nothing_else(tmp_path):
    model = trained_model()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path, reparameterize=True)
    assert files(tmp_path).keys() == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert_same_function(model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path, reparameterize=True, max_shard_size="4KB")
    assert "model.safetensors" not in files(tmp_path)
    assert_same_function(model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path))


def test_a_full_disk_leaves_the_old_export(tmp_path, monkeypatch):
    """The disk is full in the middle of the weights: safetensors writes half a file, then the error comes."""
    trained_model().save_pretrained(tmp_path / "out", reparameterize=True)
    before = files(tmp_path / "out")
    write = safetensors.torch.save_file

    def write_half(tensors, filename, *args, **kwargs):
        write(tensors, filename, *args, **kwargs)
        os.truncate(filename, Path(filename).stat().st_size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", write_half)
    for folder in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            randomize(trained_model(), seed=9).save_pretrained(folder, reparameterize=True)
    assert files(tmp_path / "out") == before and not (tmp_path / "new").exists()


def test_while_files_are_moved_nothing_can_be_loaded(tmp_path, monkeypatch):
    """A process that is killed between two files leaves no half of two models that would load."""
    model = trained_model()
    model.save_pretrained(tmp_path, reparameterize=True, max_shard_size="4KB")
    loadable = []
    move = Path.replace

    def watched(self, target):
        try:
            AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
            loadable.append(self.name)
        except OSError:
            pass
        return move(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    randomize(trained_model(), seed=9).save_pretrained(tmp_path, reparameterize=True, max_shard_size="4KB")
    assert loadable == []
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_killed_export_leaves_the_old_one(tmp_path):
    trained_model().save_pretrained(tmp_path, reparameterize=True)
    before = files(tmp_path)
    script = """
        import sys, time
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        from admin_hf.checkpoints import replaced_model
        with replaced_model(sys.argv[1]) as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert {name: content for name, content in files(tmp_path).items() if not name.startswith(".export")} == before
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    (leftover,) = tmp_path.glob(".export-*")
    for age, stays in ((0, True), (7200, False)):  # a young one may be another process at work
        os.utime(leftover, (time.time() - age,) * 2)
        trained_model().save_pretrained(tmp_path, reparameterize=True)
        assert leftover.exists() == stays
    assert files(tmp_path).keys() == before.keys()


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NotADirectoryError, match="out is a file"):
        trained_model().save_pretrained(tmp_path / "out", reparameterize=True)
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("error", [OSError("disk full"), SafetensorError("disk full")])
def test_what_cannot_be_written_is_an_oserror(error, tmp_path):
    with pytest.raises(OSError, match="disk full"), replaced_model(tmp_path):
        raise error


def test_what_is_in_the_way_is_refused_before_anything_is_moved(tmp_path):
    trained_model().save_pretrained(tmp_path, reparameterize=True)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").mkdir()
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match="generation_config.json is in the way"):
        randomize(trained_model(), seed=9).save_pretrained(tmp_path, reparameterize=True)
    assert files(tmp_path) == before


def test_folders_are_replaced_too(tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "old").write_text("old")
    with replaced_model(tmp_path) as folder:
        (folder / "templates").mkdir()
        (folder / "templates" / "new").write_text("new")
    assert files(tmp_path) == {"templates/new": b"new"}


def test_an_error_inside_leaves_no_trace(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), replaced_model(tmp_path / "a" / "b") as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("stop")
    assert files(tmp_path) == {}


def test_only_the_main_process_writes(tmp_path):
    trained_model().save_pretrained(tmp_path / "out", is_main_process=False, reparameterize=True)
    assert not (tmp_path / "out").exists()


def test_weights_can_be_given_as_a_state_dict(tmp_path):
    """As Trainer does where the weights are spread over processes."""
    model = trained_model()
    tiny_model().save_pretrained(tmp_path, state_dict=model.state_dict(), reparameterize=True)
    assert_same_function(model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path))

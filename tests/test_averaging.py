"""The mean of checkpoints, against NumPy's of the same files, and what is refused."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import padded_batch, randomize, tiny_model
from datasets import Dataset
from safetensors import safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from test_checkpoints import BAD, FC1, WEIGHTS, change_config, change_weights
from test_export import files
from test_reparameterization import assert_same_function
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerState,
)

from admin_hf import AdminForConditionalGeneration, average_checkpoints, last_checkpoints
from admin_hf.__main__ import main
from training.tokenization import train_tokenizer


def write_run(run, steps=(500, 1000, 1500), **changes):
    """A run whose checkpoints have weights of their own."""
    for step in steps:
        model = randomize(tiny_model(**changes), seed=step)
        model.save_pretrained(run / f"checkpoint-{step}")
        TrainerState(global_step=step).save_to_json(str(run / f"checkpoint-{step}" / "trainer_state.json"))
    return run


def write_tensors(folder, **tensors):
    """A checkpoint of no architecture in particular."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "anything"}))
    return folder


@pytest.fixture(scope="module")
def written_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("averaging") / "run")


@pytest.fixture
def run(written_run, tmp_path):
    return shutil.copytree(written_run, tmp_path / "run")


def checkpoints_of(run):
    return sorted(run.glob("checkpoint-*"))


# --- the mean -------------------------------------------------------------------------------------


def test_the_mean_is_numpys_in_float64(run):
    before = files(run)
    average = average_checkpoints(checkpoints_of(run))
    stored = [load_numpy(folder / WEIGHTS) for folder in checkpoints_of(run)]
    assert average.keys() == stored[0].keys()
    for name, value in average.items():
        mean = np.mean([weights[name] for weights in stored], axis=0, dtype=np.float64)
        assert np.array_equal(value.numpy(), mean.astype(np.float32)), name
        assert value.shape == stored[0][name].shape and value.dtype == torch.float32
    assert files(run) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nothing_overflows_or_is_lost_in_any_dtype(dtype, tmp_path):
    """Sums in the dtype itself overflow in the first entry and lose the small numbers of the second and third."""
    rows = [[60000.0, 4096.0, 1e4], [60000.0, 1.0, 1.0], [60000.0, 1.0, 3.0], [60000.0, 1.0, -1e4]]
    if dtype == torch.float32:
        rows = [[3e38, 2.0**25, 1e9], [3e38, 1.0, 1.0], [3e38, 1.0, 3.0], [3e38, 1.0, -1e9]]
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    folders = [write_tensors(tmp_path / str(i), weight=tensor) for i, tensor in enumerate(tensors)]
    before = files(tmp_path)
    average = average_checkpoints(folders)["weight"]
    mean = np.mean([tensor.double().numpy() for tensor in tensors], axis=0)
    assert average.dtype == dtype and torch.equal(average, torch.from_numpy(mean).to(dtype))
    assert files(tmp_path) == before


def test_tensors_of_every_shape(tmp_path):
    """A number, none, and more than are summed at once."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"number": (), "none": (0, 4), "many": (3, 2**18 + 7)}
    stored = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)]
    average = average_checkpoints([write_tensors(tmp_path / str(i), **weights) for i, weights in enumerate(stored)])
    for name, shape in shapes.items():
        mean = np.mean([weights[name].numpy() for weights in stored], axis=0, dtype=np.float64)
        assert average[name].shape == shape and np.array_equal(average[name].numpy(), mean.astype(np.float32)), name


def test_the_mean_of_one_is_itself_bit_for_bit(tmp_path):
    odd = torch.tensor([0.0, -0.0, 1e-45, -3.4e38, 0.1])
    folder = write_tensors(tmp_path / "one", weight=odd, half=odd.half()[:3], steps=torch.tensor([2**62 + 1]))
    average = average_checkpoints([folder])
    assert torch.equal(average["weight"].view(torch.int32), odd.view(torch.int32))
    assert torch.equal(average["half"].view(torch.int16), odd.half()[:3].view(torch.int16))
    assert torch.equal(average["steps"], torch.tensor([2**62 + 1]))


def test_the_order_makes_no_difference(run):
    folders = checkpoints_of(run)
    first, second = average_checkpoints(folders), average_checkpoints(folders[::-1])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_make_no_difference(run):
    expected = average_checkpoints(checkpoints_of(run))
    for folder, size in zip(checkpoints_of(run)[:2], ("4KB", "9KB"), strict=True):
        model = AdminForConditionalGeneration.from_pretrained(folder)
        (folder / WEIGHTS).unlink()
        model.save_pretrained(folder, max_shard_size=size)
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    average = average_checkpoints(checkpoints_of(run))
    assert average.keys() == expected.keys()
    assert all(torch.equal(average[name], expected[name]) for name in expected)


def test_integers_are_kept_where_they_agree(tmp_path):
    folders = [write_tensors(tmp_path / str(i), steps=torch.arange(5), on=torch.tensor(True)) for i in range(2)]
    average = average_checkpoints(folders)
    assert torch.equal(average["steps"], torch.arange(5)) and average["on"].dtype == torch.bool
    write_tensors(folders[1], steps=torch.tensor([0, 1, 2, 3, 5]), on=torch.tensor(True))
    with pytest.raises(ValueError, match="steps is not a floating-point tensor, and differs between .*0 and .*1"):
        average_checkpoints(folders)


def test_a_model_takes_the_mean_in_place(run):
    """As an evaluation at the end of a training does."""
    model = tiny_model()
    missing, unexpected = model.load_state_dict(average_checkpoints(checkpoints_of(run)), strict=False)
    assert unexpected == [] and {*missing} <= {*model.all_tied_weights_keys, *model._keys_to_ignore_on_save}
    assert model.lm_head.weight is model.model.shared.weight
    assert_same_function(mean_model(run), model)


def mean_model(run):
    """The mean by hand: of the parameters of loaded models."""
    models = [AdminForConditionalGeneration.from_pretrained(folder) for folder in checkpoints_of(run)]
    mean = tiny_model()
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(torch.stack([model.get_parameter(name).double() for model in models]).mean(0))
    return mean


# What is read counts as well, for files are mapped. The model is one large tensor and a few small ones: the large one
# as a whole in float64, or mapped from every checkpoint, is more than is allowed.
MEMORY = """
    import sys
    from pathlib import Path
    from admin_hf import average_checkpoints
    def memory(name):
        return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024
    average_checkpoints(sys.argv[1:2])
    before = memory("VmRSS")
    average = average_checkpoints(sys.argv[2:])
    print(memory("VmHWM") - before, sum(tensor.nbytes for tensor in average.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own record of the highest use")
@pytest.mark.slow
def test_memory_is_that_of_two_models_at_most(tmp_path):
    small = write_tensors(tmp_path / "small", weight=torch.ones(4))
    weights = {f"layer_{i}": torch.rand(512, 512) for i in range(8)} | {"embedding": torch.rand(20_000, 512)}
    folders = [write_tensors(tmp_path / str(i), **weights) for i in range(3)]
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), *map(str, (small, *folders))]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    used, model = map(int, run.stdout.split())
    assert model < used < 2 * model


# --- what is refused ------------------------------------------------------------------------------


def remove(name):
    return lambda folder: (folder / name).unlink()


def widen(tensors):
    tensors[FC1] = torch.zeros(32, 17)


REFUSED = {
    case: BAD[case]
    for case in (
        *("cut in the header", "cut in the weights", "empty", "garbage", "a pickle", "a shard is missing"),
        *("an index of nothing", "NaN", "infinity"),
    )
}
REFUSED |= {
    "no folder": (shutil.rmtree, "There is no folder .*checkpoint-1000"),
    "no config": (remove("config.json"), "checkpoint-1000 has no config.json with the fields of a model"),
    "half a config": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "a config that is a list": (  # in Transformers 5.17 its own words for it
        lambda folder: (folder / "config.json").write_text("[1]"),
        "no config.json with the|cannot be read: TypeError: list",
    ),
    "no weights": (remove(WEIGHTS), "checkpoint-1000 has no file named model.safetensors"),
    "other heads": (
        change_config(decoder_attention_heads=4),
        "checkpoint-1000 contains another model than .*checkpoint-500: decoder_attention_heads is 4 .*, expected 2",
    ),
    "another architecture": (change_config(model_type="marian"), "model_type is 'marian' .*, expected 'admin'"),
    "a name less": (
        change_weights(lambda tensors: tensors.pop(FC1)),
        f"checkpoint-1000 has no tensor {FC1}, which .*-500",
    ),
    "a name more": (
        change_weights(lambda tensors: tensors.update(new=torch.zeros(2))),
        "checkpoint-500 has no tensor new, which .*checkpoint-1000 has",
    ),
    "another shape": (
        change_weights(widen),
        rf"{FC1} has the shape \(32, 17\) in .*checkpoint-1000, expected \(32, 16\) as in .*checkpoint-500",
    ),
    "another dtype": (
        change_weights(lambda tensors: tensors.update({FC1: tensors[FC1].half()})),
        f"{FC1} has the dtype F16 in .*checkpoint-1000, expected F32 as in .*checkpoint-500",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_mean_gets_one_sentence(case, run):
    spoil, message = REFUSED[case]
    spoil(run / "checkpoint-1000")
    with pytest.raises((OSError, ValueError), match=message) as caught:
        average_checkpoints([run / f"checkpoint-{step}" for step in (500, 1000, 1500)])
    assert len(str(caught.value).splitlines()) == 1


def test_no_checkpoints_have_no_mean():
    with pytest.raises(ValueError, match="no checkpoints to average"):
        average_checkpoints([])


def test_what_only_training_uses_may_differ(run):
    folders = checkpoints_of(run)
    expected = average_checkpoints(folders)
    change_config(dropout=0.3, label_smoothing=0.1, transformers_version="5.0.0", use_cache=False)(folders[1])
    average = average_checkpoints(folders)
    assert all(torch.equal(average[name], expected[name]) for name in expected)


# --- which checkpoints ----------------------------------------------------------------------------


def test_the_last_ones_are_the_newest_complete_ones(tmp_path):
    for step in (500, 1000, 5, 20, 90):
        TrainerState(global_step=step).save_to_json(str(make(tmp_path / f"checkpoint-{step}") / "trainer_state.json"))
    make(tmp_path / "checkpoint-2000")  # killed before the end
    (make(tmp_path / "checkpoint-3000") / "trainer_state.json").write_text('{"global_st')  # or in the middle of it
    (make(tmp_path / "checkpoint-best") / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4000").write_text("no folder")
    names = [path.name for path in last_checkpoints(tmp_path, 3)]
    assert names == ["checkpoint-90", "checkpoint-500", "checkpoint-1000"]
    assert last_checkpoints(str(tmp_path), 1) == [tmp_path / "checkpoint-1000"]
    assert len(last_checkpoints(tmp_path, 5)) == 5
    with pytest.raises(ValueError, match="has 5 complete checkpoints, fewer than 6: take the last 5, or keep more"):
        last_checkpoints(tmp_path, 6)


def make(folder):
    folder.mkdir()
    return folder


def test_a_run_without_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        last_checkpoints(tmp_path, 1)
    with pytest.raises(NotADirectoryError, match="There is no folder"):
        last_checkpoints(tmp_path / "none", 1)
    with pytest.raises(ValueError, match="average is 0; it must be at least 1"):
        last_checkpoints(tmp_path, 0)


# --- the command line -----------------------------------------------------------------------------


TEXTS = ["ein kleiner Hund", "a small dog runs", "zwei Hunde laufen", "two dogs, and a cat"] * 3


def test_the_average_of_a_training_translates_and_is_exported(tmp_path, capsys):
    """Real Trainer checkpoints, of which optimizer and state stay behind."""
    tokenizer, batch = train_tokenizer([TEXTS], 50), padded_batch()
    arguments = Seq2SeqTrainingArguments(
        tmp_path / "run", max_steps=4, save_steps=1, learning_rate=0.01, use_cpu=True, report_to=[], disable_tqdm=True
    )
    model = tiny_model()
    model.generation_config.num_beams = 3
    data = Dataset.from_dict({name: value.tolist() for name, value in batch.items()})
    Seq2SeqTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    out = tmp_path / "a" / "out"
    assert main(["average", str(tmp_path / "run"), str(out), "--last", "3"]) == 0
    size = sum(value.numel() for value in load_file(out / WEIGHTS).values())
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"{out}: the mean of checkpoint-2, checkpoint-3, checkpoint-4, {size / 1e6:.2f} M weights"
    assert files(out).keys() == {
        *("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
    }
    loaded = AdminForConditionalGeneration.from_pretrained(out)
    assert loaded.omega_initialized and loaded.generation_config.num_beams == 3
    expected = mean_model(tmp_path / "run")
    assert_same_function(expected, loaded)
    assert main(["export", str(out), str(tmp_path / "vanilla")]) == 0
    vanilla = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "vanilla")
    assert_same_function(expected, vanilla)
    tokens = AutoTokenizer.from_pretrained(out)(TEXTS[:4], padding=True, return_tensors="pt")
    texts = [
        tokenizer.batch_decode(m.generate(**tokens, num_beams=3, max_length=9)) for m in (expected, loaded, vanilla)
    ]
    assert texts[0] == texts[1] == texts[2]


def test_stock_marian_is_averaged_as_well(tmp_path):
    config = MarianConfig(**{k: v for k, v in tiny_model().config.to_dict().items() if k != "model_type"})
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path / "run" / f"checkpoint-{seed}"
        MarianMTModel(config).save_pretrained(folder)
        train_tokenizer([TEXTS], 50).save_pretrained(folder)
        TrainerState().save_to_json(str(folder / "trainer_state.json"))
    assert main(["average", str(tmp_path / "run"), str(tmp_path / "out"), "--last", "2"]) == 0
    one, two, mean = (
        MarianMTModel.from_pretrained(tmp_path / name) for name in ("run/checkpoint-1", "run/checkpoint-2", "out")
    )
    for name, parameter in mean.named_parameters():
        torch.testing.assert_close(parameter, (one.get_parameter(name) + two.get_parameter(name)) / 2)


def test_the_tokenizer_may_lie_in_the_run(run, tmp_path, capsys):
    assert main(["average", str(run), str(tmp_path / "out"), "--last", "2"]) == 0
    assert "no tokenizer that can be loaded" in capsys.readouterr().out
    tokenizer = train_tokenizer([TEXTS], 50)
    tokenizer.save_pretrained(run)
    assert main(["average", str(run), str(tmp_path / "out"), "--last", "2"]) == 0
    assert "no tokenizer" not in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS) == tokenizer(TEXTS)


def test_an_earlier_average_is_replaced_and_nothing_else(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["average", str(run), str(out), "--last", "3"]) == 0
    (out / "notes.txt").write_text("mine")
    first = files(out)
    assert main(["average", str(run), str(out), "--last", "1"]) == 0
    assert files(out).keys() == first.keys() and files(out)["notes.txt"] == b"mine"
    newest = load_file(run / "checkpoint-1500" / WEIGHTS)
    assert all(torch.equal(value, newest[name]) for name, value in load_file(out / WEIGHTS).items())
    with safe_open(out / WEIGHTS, framework="pt") as weights:
        assert weights.metadata()["averaged_checkpoints"] == "checkpoint-1500"
    # Once trained on, or exported, it is no average any more
    AdminForConditionalGeneration.from_pretrained(out).save_pretrained(out)
    before = files(out)
    assert main(["average", str(run), str(out), "--last", "1"]) == 2
    assert "contains a model that is not an average of checkpoints" in capsys.readouterr().err
    assert files(out) == before


def test_the_run_and_its_checkpoints_are_never_replaced(run, tmp_path, capsys):
    (tmp_path / "link").symlink_to(run)
    write_run(tmp_path / "other", steps=(1,))
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    places = {run: "is the folder of a run", tmp_path / "link": "is the folder of a run"}
    places |= {tmp_path / "other": "is the folder of a run"}
    places |= {run / "checkpoint-1500": "is the place of a checkpoint", run / "checkpoint-9": "is the place of a"}
    places |= {tmp_path / "link" / "checkpoint-500" / "deeper": "is the place of a checkpoint"}
    places |= {tmp_path / "other" / "checkpoint-1": "contains a model that is not an average"}
    places |= {tmp_path / "sharded": "contains a model that is not an average"}
    before = files(tmp_path)
    for out, reason in places.items():
        assert main(["average", str(run), str(out), "--last", "2"]) == 2
        assert reason in capsys.readouterr().err
    assert files(tmp_path) == before and not (run / "checkpoint-9").exists()
    assert main(["average", str(run), str(run / "average"), "--last", "2"]) == 0


@pytest.mark.parametrize("case", ["NaN", "cut in the weights", "no config", "another shape"])
def test_out_is_as_it_was_after_an_error(case, run, tmp_path, capsys):
    assert main(["average", str(run), str(tmp_path / "out"), "--last", "3"]) == 0
    before = files(tmp_path / "out")
    spoil, message = REFUSED[case]
    spoil(run / "checkpoint-1000")
    for out in ("out", "new"):
        assert main(["average", str(run), str(tmp_path / out), "--last", "3"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
    assert files(tmp_path / "out") == before and not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "out").glob(".*")] == []


def test_a_wrong_number_and_a_wrong_place(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    wrong = {
        (run, tmp_path / "out", "4"): "has 3 complete checkpoints, fewer than 4",
        (run, tmp_path / "out", "0"): "must be at least 1",
        (tmp_path / "none", tmp_path / "out", "1"): "There is no folder",
        (run / "checkpoint-500", tmp_path / "out", "1"): "has no complete checkpoint",
        (run, tmp_path / "file", "1"): "is a file; name a folder",
    }
    for (source, out, last), reason in wrong.items():
        assert main(["average", str(source), str(out), "--last", last]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and reason in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_code_that_comes_with_a_model_goes_along(run, tmp_path):
    for folder in checkpoints_of(run):
        change_config(auto_map={"AutoModel": "modeling_own.OwnModel"})(folder)
        (folder / "modeling_own.py").write_text(f"# of {folder.name}")
    assert main(["average", str(run), str(tmp_path / "out"), "--last", "2"]) == 0
    assert (tmp_path / "out" / "modeling_own.py").read_text() in {f"# of {f.name}" for f in checkpoints_of(run)}


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["average", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "RUN OUT" in shown
    assert "example: python -m admin_hf average runs/en-de en-de-average --last 10" in shown

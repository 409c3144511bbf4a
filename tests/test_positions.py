"""Position tables of a model's own survive saving, loading, folding and averaging; standard ones are in no file."""

import json

import pytest
import torch
from conftest import padded_batch, tiny_model
from safetensors.torch import load_file
from test_reparameterization import assert_same_function, logits, trained_model
from transformers import MarianMTModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from admin_hf import AdminForConditionalGeneration, inject, load_injected, reparameterize
from admin_hf.__main__ import main
from admin_hf.positions import is_standard, standard_table


TABLES = {f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")}


def with_own_tables(model):
    generator = torch.Generator().manual_seed(7)
    for name in TABLES:
        table = model.get_parameter(name)
        table.data = torch.randn(table.shape, generator=generator).to(table.dtype)
    return model


def tables_in(folder) -> set[str]:
    return TABLES & load_file(folder / "model.safetensors").keys()


def assert_same_logits(one, other) -> None:
    batch = padded_batch()
    torch.testing.assert_close(logits(one.float(), batch), logits(other.float(), batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_standard_tables_are_saved_by_no_model(tmp_path, dtype):
    model = trained_model().to(dtype)
    model.save_pretrained(tmp_path / "admin")
    assert tables_in(tmp_path / "admin") == set()
    loaded = AdminForConditionalGeneration.from_pretrained(tmp_path / "admin", dtype=dtype).float()
    loaded.save_pretrained(tmp_path / "again", reparameterize=True)  # tables that were rounded and no longer are
    assert tables_in(tmp_path / "again") == set()


def test_looking_at_tables_draws_no_random_numbers():
    standard_table.cache_clear()
    before = torch.get_rng_state()
    assert is_standard(tiny_model().model.encoder.embed_positions.weight)
    torch.set_rng_state(before)
    standard_table.cache_clear()
    standard_table(6, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_tables_survive_saving_and_folding(tmp_path, dtype):
    model = with_own_tables(trained_model()).to(dtype)
    model.save_pretrained(tmp_path / "admin")
    loaded = AdminForConditionalGeneration.from_pretrained(tmp_path / "admin", dtype=dtype)
    assert_same_logits(model, loaded)
    assert not loaded.model.encoder.embed_positions.weight.requires_grad
    loaded.save_pretrained(tmp_path / "again")
    assert tables_in(tmp_path / "again") == TABLES
    vanilla = reparameterize(loaded, torch.float32)
    vanilla.save_pretrained(tmp_path / "vanilla")
    stock = MarianMTModel.from_pretrained(tmp_path / "vanilla")
    assert type(vanilla) is type(stock) is MarianMTModel
    assert_same_function(loaded.float(), stock)


def test_one_table_alone_is_saved(tmp_path):
    model = trained_model()
    model.model.decoder.embed_positions.weight.data[0] += 0.01
    model.save_pretrained(tmp_path, reparameterize=True)
    assert tables_in(tmp_path) == {"model.decoder.embed_positions.weight"}
    assert_same_function(model, MarianMTModel.from_pretrained(tmp_path))


def test_pre_ln_keeps_its_tables(tmp_path):
    model = with_own_tables(trained_model("pre_ln", "pre_ln"))
    model.save_pretrained(tmp_path / "vanilla", reparameterize=True)
    back = AdminForConditionalGeneration.from_pretrained(tmp_path / "vanilla")
    assert back.config.encoder_residual == "pre_ln"
    assert_same_function(model, back)
    back.save_pretrained(tmp_path / "back")
    assert_same_function(model, AdminForConditionalGeneration.from_pretrained(tmp_path / "back"))


def test_commands_keep_the_tables_of_a_stock_folder(tmp_path):
    model = with_own_tables(trained_model())
    model.save_pretrained(tmp_path / "stock", reparameterize=True)
    assert main(["export", str(tmp_path / "stock"), str(tmp_path / "exported")]) == 0
    assert_same_function(model, MarianMTModel.from_pretrained(tmp_path / "exported"))
    for step in (1, 2):
        model.save_pretrained(folder := tmp_path / f"run/checkpoint-{step}")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert main(["average", str(tmp_path / "run"), str(tmp_path / "average"), "--last", "2"]) == 0
    assert_same_function(model, AdminForConditionalGeneration.from_pretrained(tmp_path / "average"))


def test_an_injected_model_keeps_the_tables_it_was_loaded_with(tmp_path):
    with_own_tables(trained_model()).save_pretrained(tmp_path / "stock", reparameterize=True)
    model = inject(MarianMTModel.from_pretrained(tmp_path / "stock"))
    model.save_pretrained(tmp_path / "injected")
    loaded = load_injected(MarianMTModel, tmp_path / "injected")
    assert_same_logits(model, loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert tables_in(tmp_path / "again") == TABLES
    reparameterize(loaded).save_pretrained(tmp_path / "folded")
    assert_same_logits(loaded, MarianMTModel.from_pretrained(tmp_path / "folded"))


def test_a_trainers_checkpoints_hold_the_tables(tmp_path):
    model = with_own_tables(trained_model())
    before = {name: model.get_parameter(name).clone() for name in TABLES}
    batch = padded_batch()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(4)]
    options = {"max_steps": 1, "save_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = Seq2SeqTrainingArguments(str(tmp_path), per_device_train_batch_size=4, **options)
    Seq2SeqTrainer(model, arguments, train_dataset=rows).train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(saved[name], table) for name, table in before.items())

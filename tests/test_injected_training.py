"""Stock models with an ω in training: Trainer, checkpoints, precision, compilation, processes, adapters, analyses."""

import copy
import json

import pytest
import torch
import transformers
from datasets import Dataset
from families import (
    connections,
    difference,
    family_batch,
    family_model,
    outputs,
    set_random_omega,
    without_dropout,
)
from peft import LoraConfig, get_peft_model
from test_distributed import SCRIPT, run_processes
from test_injection import marian_and_admin
from torch import nn
from transformers import Trainer, TrainingArguments

from admin_hf import (
    AdminProfilingCallback,
    AdminPublishingCallback,
    ResidualProfile,
    initialize_omega,
    inject,
    load_injected,
    profile_residuals,
    reparameterize,
)
from admin_hf.__main__ import main as admin_hf_main
from admin_hf.analysis import gradient_norms, layer_dependency, omega_history, run_checkpoints
from admin_hf.monitoring import ResidualMonitor
from admin_hf.parametrization import Product


def scaled(family="bert", **changes):
    """A model with random weights and a random ω, and a batch."""
    model = inject(family_model(family, random=True, **changes))
    set_random_omega(model)
    return model, family_batch(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- Trainer --------------------------------------------------------------------------------------


def trainer(model, folder, callbacks=(), **changes):
    ids = torch.randint(5, 48, (32, 9), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "seed": 3, "save_steps": 3}
    defaults |= {"learning_rate": 1e-2, "weight_decay": 0.5, "report_to": [], "disable_tqdm": True, "logging_steps": 2}
    arguments = TrainingArguments(output_dir=str(folder), **defaults | changes)
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder and the model that trained in it, from a profile of its first batch."""
    folder = tmp_path_factory.mktemp("run")
    model = inject(family_model("bert", num_hidden_layers=3))
    trainer(model, folder, [AdminProfilingCallback(verbose=False)]).train()
    return folder, model


def test_trainer_profiles_before_the_first_update(tmp_path):
    model, twin, seen = *(inject(family_model("bert")) for _ in range(2)), []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            seen.append([each.omega.detach().clone() for each in connections(model)])

    run = trainer(model, tmp_path, [AdminProfilingCallback(verbose=False), Watch()], max_steps=1)
    batch = next(iter(run.get_train_dataloader()))
    run.train()
    profile = ResidualProfile.load(tmp_path / "residual_profile.json")
    assert model.injection.is_profiled
    assert [float(omega[0]) for omega in seen[0]] == pytest.approx(profile.encoder.omega)
    assert profile.encoder.omega[1] > 1
    initialize_omega(twin, profile)
    assert len(batch["input_ids"]) == 4 and not equal(twin.state_dict(), model.state_dict())


def test_no_weight_decay_pulls_at_omega(tmp_path):
    model = inject(family_model("bert"))
    run = trainer(model, tmp_path)
    run.create_optimizer()
    decayed = {id(p) for group in run.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert len(names) > 10 and not any("omega" in name or "LayerNorm" in name or "bias" in name for name in names)
    assert sum("parametrizations.weight.original" in name for name in names) == 8, "matrices are decayed as in stock"


def test_a_run_is_resumed_bit_for_bit_and_loaded(run):
    folder, whole = run
    resumed = inject(family_model("bert", num_hidden_layers=3))
    trainer(resumed, folder, [AdminProfilingCallback(verbose=False)]).train(str(folder / "checkpoint-3"))
    assert equal(resumed.state_dict(), whole.state_dict())
    loaded = load_injected(transformers.BertForMaskedLM, folder / "checkpoint-6")
    assert equal(loaded.state_dict(), whole.state_dict()) and not loaded.training
    assert loaded.injection.is_profiled and loaded.injection.omega_initialized
    batch = family_batch(whole)
    assert difference(outputs(loaded, batch), outputs(whole, batch)) == 0


@pytest.mark.parametrize("family", ["marian", "bart", "opt", "wav2vec2", "distilbert"])
@pytest.mark.parametrize("system", ["admin", "admin_uniform", "deepnorm"])
def test_checkpoints_are_loaded(tmp_path, family, system):
    model = inject(family_model(family).to(torch.bfloat16), system)
    model.save_pretrained(tmp_path)
    loaded = load_injected(type(model), tmp_path, system=system)
    assert equal(loaded.state_dict(), model.state_dict()) and loaded.dtype == torch.bfloat16
    assert vars(loaded.config)["pad_token_id"] == model.config.pad_token_id
    with pytest.raises(ValueError, match="with these ω"):
        load_injected(type(model), tmp_path, system="deepnorm" if system == "admin" else "admin")


def test_the_stock_class_says_what_it_does_not_find_in_a_checkpoint_with_omega(run, caplog):
    with caplog.at_level("WARNING", logger="transformers"):  # which a command of the library has silenced
        transformers.utils.logging.enable_propagation()
        transformers.BertForMaskedLM.from_pretrained(run[0] / "checkpoint-6")
    assert "MISSING" in caplog.text and "UNEXPECTED" in caplog.text and "omega" in caplog.text


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = inject(family_model("bert"))
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 0.5}
    run = trainer(model, tmp_path, [AdminProfilingCallback(verbose=False)], **options)
    run.train()
    best = load_injected(transformers.BertForMaskedLM, run.state.best_model_checkpoint)
    assert equal(best.state_dict(), model.state_dict())


@pytest.mark.parametrize("bf16", [False, True])
def test_publishing_writes_a_stock_checkpoint_and_keeps_omega_in_the_others(tmp_path, bf16):
    model = inject(family_model("bert"))
    callbacks = [AdminProfilingCallback(verbose=False), AdminPublishingCallback()]
    run = trainer(model, tmp_path, callbacks, bf16=bf16)
    run.train()
    run.save_model()
    model.config.dtype = None
    stock = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    folded = reparameterize(model)
    batch = family_batch(model)
    with torch.no_grad():
        expected = type(model).forward(model.eval(), **batch).to_tuple()
    for other in (stock, folded):
        assert other.state_dict().keys() == family_model("bert").state_dict().keys()
        assert difference(outputs(other, batch), expected) < 2e-5
    load_injected(transformers.BertForMaskedLM, tmp_path / "checkpoint-6")


# --- other ways to run it -------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "bart", "opt"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model, batch = scaled(family)
    without_dropout(model).train()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    monitor = ResidualMonitor(model)
    monitor.watch_next_pass()
    model(**batch).loss.backward()
    assert gradients(model).keys() == expected.keys()
    assert all(torch.allclose(value, expected[name], atol=1e-7) for name, value in gradients(model).items())
    assert monitor.metrics()[f"{next(iter(model.injection.stacks))}_variance_ratio_min"] > 0


def test_half_precision_computes_and_folds():
    model, batch = scaled()
    expected = outputs(model, batch)
    for dtype, tolerance in ((torch.bfloat16, 0.2), (torch.float16, 0.03)):
        half = copy.deepcopy(model).to(dtype)
        found = outputs(half, batch)
        assert found[1].dtype == dtype and difference(found, expected) < tolerance
        folded = reparameterize(half)
        assert folded.dtype == dtype and difference(outputs(folded, batch), expected) < tolerance
    with torch.autocast("cpu", torch.bfloat16):
        assert difference([x.float() for x in outputs(model, batch)], expected) < 0.2
        model.train()(**batch).loss.backward()
    assert all(bool(each.omega.grad.isfinite().all()) for each in connections(model))


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_copy_has_an_omega_of_its_own(family):
    model, batch = scaled(family)
    expected = outputs(model, batch)
    other = copy.deepcopy(model)
    set_random_omega(other, seed=7)
    assert difference(outputs(model, batch), expected) == 0 < difference(outputs(other, batch), expected)
    assert not {id(each.omega) for each in connections(model)} & {id(each.omega) for each in connections(other)}
    connections(other)[0].omega.data.fill_(5.0)
    assert reparameterize(other).state_dict().keys() == reparameterize(model).state_dict().keys()
    assert difference(outputs(reparameterize(other), batch), outputs(other, batch)) < 2e-5
    assert difference(outputs(model, batch), expected) == 0


def test_a_deep_model_can_be_copied_and_folded():
    model, batch = scaled(num_hidden_layers=120)
    assert difference(outputs(reparameterize(copy.deepcopy(model)), batch), outputs(model, batch)) < 1e-4


@pytest.mark.parametrize("system", ["admin", "admin_uniform", "deepnorm"])
def test_omega_moves_with_the_model(system):
    model = inject(family_model("opt"), system, trained=False)
    model.to("meta")
    assert all(parameter.device.type == "meta" for parameter in model.state_dict().values())
    layer = model.model.decoder.layers[1]
    assert layer.fc1.weight.device.type == layer.self_attn_layer_norm.weight.device.type == "meta"


@pytest.mark.slow
@pytest.mark.parametrize("system", ["admin", "admin_uniform"])
def test_compiled_models_compute_the_same(system):
    model = inject(family_model("bert", random=True), system, trained=False)
    without_dropout(model)
    batch = family_batch(model)
    expected = outputs(model, batch)
    model.train()(**batch).loss.backward()
    before = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model)
    assert difference(outputs(compiled, batch), expected) < 1e-5
    compiled.train()(**batch).loss.backward()
    assert all(torch.allclose(value, before[name], atol=1e-5) for name, value in gradients(model).items())
    set_random_omega(model)
    assert difference(outputs(compiled, batch), outputs(model, batch)) < 1e-5, "ω is no constant of what was compiled"
    assert type(reparameterize(compiled)) is transformers.BertForMaskedLM


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    run_processes([str(SCRIPT.with_name("train_injected.py")), str(tmp_path)], 2)
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one["weights"] == other["weights"] and one["omega"] == other["omega"] and one["is_profiled"]
    assert len(set(one["omega"])) == 4


# --- writing to a weight that is computed ---------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: nn.init.xavier_uniform_(layer.weight),
        lambda layer: layer.weight.data.fill_(1.0),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(16, 16))),
    ],
)
def test_a_computed_weight_is_not_written_to(write):
    model, batch = scaled()
    expected = outputs(model, batch)
    with torch.no_grad(), pytest.raises((RuntimeError, KeyError)):
        write(model.bert.encoder.layer[0].attention.self.query)
    assert difference(outputs(model, batch), expected) == 0
    assert isinstance(model.bert.encoder.layer[0].attention.self.query.weight, Product)


# --- adapters -------------------------------------------------------------------------------------


def test_an_adapter_is_trained_on_omega_and_merged_behind_the_fold():
    model = inject(family_model("bert", random=True))
    batch = family_batch(model)
    initialize_omega(model, profile_residuals(model, batch))
    adapted = get_peft_model(model, LoraConfig(target_modules=["query", "value", "dense"], r=2))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    before = outputs(adapted, batch)
    for _ in range(5):
        adapted.train()(**batch).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    expected = outputs(adapted, batch)
    assert difference(expected, before) > 0.1
    for merge in ("merge_and_unload", "merge_adapter"):
        for options in ({}, {"safe_merge": True}):
            with pytest.raises(RuntimeError, match="call `reparameterize` first"):
                getattr(copy.deepcopy(adapted), merge)(**options)
    merged = reparameterize(adapted)
    assert difference(outputs(adapted, batch), expected) == 0
    assert type(merged) is transformers.BertForMaskedLM and not hasattr(merged, "injection")
    assert merged.state_dict().keys() == family_model("bert").state_dict().keys()
    assert difference(outputs(merged, batch), expected) < 5e-5


def test_modules_that_an_adapter_trains_in_full_are_folded_too():
    model, batch = scaled()
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["LayerNorm"]))
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name and "omega" not in name:
            parameter.data += 0.1
    folded = reparameterize(adapted)
    assert difference(outputs(folded, batch), outputs(adapted, batch)) < 2e-5
    assert not any("omega" in name or "original." in name for name in folded.state_dict())


# --- analyses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "bert-decoder", "opt", "bart", "wav2vec2", "time-series", "fsmt"])
def test_analyses_run_on_every_kind(family):
    model, batch = scaled(family)
    dependency, norms = layer_dependency(model, batch), gradient_norms(model, batch)
    assert dependency.stacks.keys() == norms.stacks.keys() == model.injection.stacks.keys()
    for name, found in model.injection.stacks.items():
        assert len(dependency.stacks[name].beta) == len(norms.stacks[name].relative_norms) == len(found)
        assert norms.stacks[name].largest_norm > 0 and min(norms.stacks[name].relative_norms) > 0
    assert "admin" in dependency.verdict() and "admin" in norms.verdict()


def test_analyses_of_marian_are_those_of_the_admin_model(batch):
    model, admin = marian_and_admin()
    for one, other in (
        (layer_dependency(model, batch), layer_dependency(admin, batch)),
        (gradient_norms(model, batch), gradient_norms(admin, batch)),
    ):
        for stack, found in one.stacks.items():
            expected = other.stacks[stack]
            assert found.names == expected.names
            for values in ("beta", "bias", "relative_norms", "kinds"):
                for a, b in zip(getattr(found, values, ()), getattr(expected, values, ()), strict=True):
                    assert a == b or a == pytest.approx(b, rel=2e-3)


def test_omega_over_training_is_read_from_checkpoints(run, tmp_path):
    folder, model = run
    profile = ResidualProfile.load(folder / "residual_profile.json")
    history = omega_history(run_checkpoints(folder), profile)
    assert history.updates == [0, 3, 6]
    assert history.encoder.names == profile.encoder.names and not history.decoder.names
    assert history.encoder.mean[0] == profile.encoder.omega
    assert history.encoder.mean[-1] == pytest.approx([float(each.omega.mean()) for each in connections(model)])
    assert admin_hf_main(["analyze", "omega", str(folder), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "omega.png").exists()


def test_omega_of_other_families_is_read_by_its_stacks(tmp_path):
    for family in ("bart", "distilbert", "openai-gpt"):
        model, _ = scaled(family)
        folder = tmp_path / f"{family}-checkpoint-5"
        model.save_pretrained(folder)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 5}))
        history = omega_history([folder])
        for name, found in model.injection.stacks.items():
            assert getattr(history, name).names == [each.name for each in found if hasattr(each, "omega")]


def test_a_report_of_a_run_shows_omega_and_says_what_it_lacks(run):
    assert admin_hf_main(["report", str(run[0])]) == 0
    page = (run[0] / "report.html").read_text()
    assert "Mean of each ω, encoder" in page and "ω fell in" in page
    assert "with `load_injected`" in page


def test_commands_refuse_checkpoints_of_stock_models_with_an_omega(run, tmp_path, capsys):
    model, _ = marian_and_admin()
    model.save_pretrained(tmp_path / "marian")
    for folder, message in (
        (run[0] / "checkpoint-6", "with `load_injected`"),
        (tmp_path / "marian", "do not belong together"),
    ):
        for command in (["export", str(folder), str(tmp_path / "out")], ["analyze", "dependency", str(folder)]):
            assert admin_hf_main(command) != 0
            assert message in capsys.readouterr().err

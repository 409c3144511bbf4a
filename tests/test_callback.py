import copy
import json
import os
import pickle
import re

import pytest
import torch
from conftest import PAD, tiny_model
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from admin_hf import (
    AdminForConditionalGeneration,
    AdminModel,
    AdminProfilingCallback,
    AdminPublishingCallback,
    ResidualProfile,
    average_checkpoints,
    initialize_omega,
    last_checkpoints,
    profile_residuals,
    reparameterize,
)
from admin_hf.residual import SYSTEMS, AdminConnection


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (40, 2), generator=generator).tolist()
    ids = [[torch.randint(2, PAD, (n,), generator=generator).tolist() + [0] for n in pair] for pair in lengths]
    return Dataset.from_dict({"input_ids": [s for s, _ in ids], "labels": [t for _, t in ids]})


class Collator:
    """Pads as Transformers' collator does, and remembers the first batch."""

    def __init__(self, model):
        self.model, self.first = model, None

    def __call__(self, features):
        def pad(name, value):
            longest = max(len(f[name]) for f in features)
            return torch.tensor([f[name] + [value] * (longest - len(f[name])) for f in features])

        batch = {"input_ids": pad("input_ids", PAD), "labels": pad("labels", -100)}
        batch["attention_mask"] = batch["input_ids"].ne(PAD).long()
        self.first = self.first or batch
        return batch


def arguments(folder, **changes):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True, "seed": 3, "save_strategy": "no"}
    return Seq2SeqTrainingArguments(
        output_dir=str(folder), report_to=[], disable_tqdm=True, **defaults | {"learning_rate": 1e-2} | changes
    )


def trainer(model, dataset, folder, callbacks, **changes):
    return Seq2SeqTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=dataset,
        data_collator=Collator(model),
        callbacks=callbacks,
    )


def omegas(model):
    return [m.omega.detach().clone() for m in model.modules() if isinstance(m, AdminConnection)]


class Recorder(TrainerCallback):
    """Records the inputs of every forward pass and the random state before each update."""

    def __init__(self, model):
        self.inputs, self.states, self.omega = [], [], []
        model.register_forward_pre_hook(lambda m, a, kw: self.inputs.append(kw["input_ids"].clone()), with_kwargs=True)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.states.append(torch.get_rng_state())

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.omega.append(omegas(model))


@pytest.mark.parametrize("callback", [AdminProfilingCallback, AdminPublishingCallback])
def test_half_precision_stays_on(tmp_path, dataset, callback):
    """Unwrapping a model for good would end its autocast, and train in float32 without a word."""
    model, seen = tiny_model(), []
    run = trainer(model, dataset, tmp_path, [callback()], bf16=True)
    model.model.encoder.layers[0].fc1.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    run.train()
    assert seen[-3:] == [torch.bfloat16] * 3
    assert seen[:-3] == ([torch.float32] if callback is AdminProfilingCallback else []), "profiled in full precision"


def test_a_plain_trainer_profiles_the_first_batch_before_step_one(tmp_path, dataset, capsys):
    model, twin = tiny_model(), tiny_model()
    recorder = Recorder(model)
    run = trainer(model, dataset, tmp_path, [AdminProfilingCallback(), recorder])
    run.train()
    torch.manual_seed(3)  # profiling sees the random state that step 1 starts from
    torch.set_rng_state(recorder.states[0])
    initialize_omega(twin, profile_residuals(twin, run.data_collator.first))
    assert all(torch.equal(a, b) for a, b in zip(recorder.omega[0], omegas(twin), strict=True))
    profile = ResidualProfile.load(tmp_path / "residual_profile.json")
    assert profile.encoder.omega[1:] == pytest.approx([float(omega[0]) for omega in omegas(twin)[:3]])
    printed = capsys.readouterr().out
    assert len(re.findall("layer_norm", printed)) == 4 + 6 and "Var[f]" in printed
    assert not model._forward_pre_hooks.keys() - recorder_hooks(model), "the hook is gone"


def recorder_hooks(model):
    return {key for key, hook in model._forward_pre_hooks.items() if "Recorder" in hook.__qualname__}


def test_data_order_and_random_stream_are_the_same_without_the_callback(tmp_path, dataset):
    records = []
    for name in ("with", "without"):
        model = tiny_model()
        if name == "without":
            initialize_omega(model, ResidualProfile.load(tmp_path / "with" / "residual_profile.json"))
        recorder = Recorder(model)
        callbacks = [AdminProfilingCallback(), recorder] if name == "with" else [recorder]
        run = trainer(model, dataset, tmp_path / name, callbacks, gradient_accumulation_steps=2)
        run.train()
        records.append((recorder.inputs, recorder.states, list(model.state_dict().values())))
    assert len(records[0][0]) == 6
    for with_callback, without in zip(*records, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(with_callback, without, strict=True))


def test_nothing_happens_on_resume(tmp_path, dataset):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = tiny_model()
    trainer(whole, dataset, tmp_path / "whole", [AdminProfilingCallback()], **options).train()
    (tmp_path / "whole" / "residual_profile.json").unlink()
    resumed = tiny_model()
    run = trainer(resumed, dataset, tmp_path / "whole", [AdminProfilingCallback()], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert not (tmp_path / "whole" / "residual_profile.json").exists()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_an_initialised_or_loaded_model_is_not_profiled_again(tmp_path, dataset, caplog):
    model = tiny_model()
    trainer(model, dataset, tmp_path / "a", [AdminProfilingCallback()], max_steps=1).train()
    profile = (tmp_path / "a" / "residual_profile.json").read_text()
    trainer(model, dataset, tmp_path / "a", [AdminProfilingCallback()], max_steps=1).train()
    assert (tmp_path / "a" / "residual_profile.json").read_text() == profile
    assert "Not profiled" not in caplog.text, "an initialised model is nothing to warn of"

    tiny_model().save_pretrained(tmp_path / "plain")
    loaded = AdminForConditionalGeneration.from_pretrained(tmp_path / "plain")
    with caplog.at_level("WARNING", logger="admin_hf.callback"):
        trainer(loaded, dataset, tmp_path / "b", [AdminProfilingCallback()], learning_rate=0.0, max_steps=1).train()
    assert not (tmp_path / "b" / "residual_profile.json").exists()
    assert "every ω at 1" in caplog.text
    assert all(bool((omega == 1).all()) for omega in omegas(loaded))


@pytest.mark.parametrize("system", [system for system in SYSTEMS if system != "admin"])
def test_systems_without_a_profile_train_and_the_callback_says_so(tmp_path, dataset, caplog, system):
    model = tiny_model(encoder_residual=system, decoder_residual=system)
    trainer(model, dataset, tmp_path, [AdminProfilingCallback()], max_steps=1).train()
    assert not (tmp_path / "residual_profile.json").exists() and not model.is_profiled
    assert caplog.text.count("WARNING") == 1
    assert f"nothing to profile: this model ({system} encoder, {system} decoder)" in caplog.text
    assert "AdminConfig(encoder_residual='admin', decoder_residual='admin')" in caplog.text


# --- models that were not profiled ------------------------------------------------------------------


def unprofiled(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "profiled" in record.getMessage()]


def test_a_model_that_trains_without_the_callback_says_so_once(tmp_path, dataset, caplog, batch):
    model = tiny_model()
    model(**batch)
    model.train()(**batch | {"labels": None, "decoder_input_ids": batch["input_ids"]})
    model = tiny_model()
    with torch.no_grad():
        model.train()(**batch)
    caplog.clear()
    trainer(model, dataset, tmp_path, []).train()
    trainer(model, dataset, tmp_path, []).train()
    (message,) = unprofiled(caplog)
    assert "not profiled: it trains with every ω at 1" in message and "Add AdminProfilingCallback()" in message
    model.save_pretrained(tmp_path / "saved")
    loaded = AdminForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert not model.is_profiled and not loaded.is_profiled and any(bool((w != 1).any()) for w in omegas(loaded))
    for callbacks in ([], [AdminProfilingCallback()]):
        caplog.clear()
        trainer(copy.deepcopy(loaded), dataset, tmp_path / "more", callbacks, max_steps=1).train()
        said = "The model was never profiled: training continues with its present ω, not as Admin."
        assert unprofiled(caplog) == [said]
    assert not (tmp_path / "more" / "residual_profile.json").exists(), "its weights are trained"


def test_a_profiled_model_says_nothing(tmp_path, dataset, caplog):
    model = tiny_model()
    trainer(model, dataset, tmp_path, [AdminProfilingCallback()], max_steps=1).train()
    trainer(model, dataset, tmp_path, [], max_steps=1).train()
    assert model.is_profiled and not unprofiled(caplog)


def test_whether_a_model_was_profiled_goes_with_its_weights(tmp_path, dataset, batch):
    """Whatever became of ω: 1 after a profile, or trained away from 1 without one."""
    for name, is_profiled in (("profiled", True), ("not", False)):
        callbacks = [AdminProfilingCallback(verbose=False)] if is_profiled else []
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        model = tiny_model()
        trainer(model, dataset, tmp_path / name, callbacks, **options).train()
        for connection in (m for m in model.modules() if isinstance(m, AdminConnection)):
            connection.omega.data.fill_(1.0 if is_profiled else 1.5)
        model.save_pretrained(tmp_path / name)
        assert AdminForConditionalGeneration.from_pretrained(tmp_path / name).is_profiled is is_profiled
        assert AdminModel.from_pretrained(tmp_path / name).is_profiled is is_profiled
        half = AdminForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        twins = [model, half, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), tiny_model(), tiny_model()]
        twins[4].load_state_dict(model.state_dict())
        checkpoints = last_checkpoints(tmp_path / name, 2)
        twins[5].load_state_dict(average_checkpoints(checkpoints), strict=False)
        assert [twin.is_profiled for twin in twins] == [is_profiled] * 6
        resumed = tiny_model()
        run = trainer(resumed, dataset, tmp_path / name, callbacks, **options)
        run.train(resume_from_checkpoint=str(checkpoints[0]))
        assert resumed.is_profiled is is_profiled
        assert not any("profiled" in key for key in reparameterize(model).state_dict())
        assert "profiled" not in json.dumps(reparameterize(model).config.to_dict())


@pytest.mark.parametrize("omega", [1.0, 1.5])
def test_a_checkpoint_of_an_earlier_version_was_profiled_if_an_omega_is_not_1(tmp_path, omega, dataset):
    model = tiny_model()
    for connection in (m for m in model.modules() if isinstance(m, AdminConnection)):
        connection.omega.data.fill_(omega)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("omega_profiled")}
    fresh = tiny_model()
    fresh.load_state_dict(state)
    assert fresh.is_profiled is (omega != 1)
    model.save_pretrained(tmp_path / "checkpoint-2")
    model.save_pretrained(tmp_path / "checkpoint-1")
    weights = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    del weights["model.omega_profiled"]
    save_file(weights, tmp_path / "checkpoint-1" / "model.safetensors", {"format": "pt"})
    loaded, info = AdminForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-1", output_loading_info=True)
    assert not info["missing_keys"] and loaded.omega_initialized and loaded.is_profiled is (omega != 1)
    average = average_checkpoints([tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"])
    assert average.keys() == weights.keys(), "where one of them does not say it"


def test_a_stock_marian_that_is_gone_on_from_is_not_profiled(tmp_path, dataset, caplog, batch):
    model = tiny_model()
    initialize_omega(model, profile_residuals(model, batch))
    reparameterize(model).save_pretrained(tmp_path / "stock")
    model = AdminForConditionalGeneration.from_pretrained(tmp_path / "stock")
    trainer(model, dataset, tmp_path / "run", [AdminProfilingCallback()]).train()
    assert not model.is_profiled and any(bool((w != 1).any()) for w in omegas(model))
    assert len([r for r in caplog.records if "plain Post-LN" in r.getMessage()]) == 1, "said when it was loaded"
    model.save_pretrained(tmp_path / "run")
    assert not AdminForConditionalGeneration.from_pretrained(tmp_path / "run").is_profiled


def test_the_table_of_omega_can_be_left_out(tmp_path, dataset, capsys):
    trainer(tiny_model(), dataset, tmp_path, [AdminProfilingCallback(verbose=False)], max_steps=1).train()
    assert (tmp_path / "residual_profile.json").exists() and "Var[f]" not in capsys.readouterr().out


def test_a_hybrid_initialises_the_stack_that_has_omega(tmp_path, dataset):
    model = tiny_model(decoder_residual="pre_ln")
    trainer(model, dataset, tmp_path, [AdminProfilingCallback()], learning_rate=0.0, max_steps=1).train()
    assert len(omegas(model)) == 3 and all(float(omega.min()) > 1 for omega in omegas(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
)
def test_profiles_under_the_trainers_own_modes(tmp_path, dataset, changes):
    model = tiny_model(encoder_layers=1, decoder_layers=1)
    trainer(model, dataset, tmp_path, [AdminProfilingCallback()], learning_rate=0.0, max_steps=1, **changes).train()
    profile = ResidualProfile.load(tmp_path / "residual_profile.json")
    assert len(profile.decoder.omega) == 3
    assert float(omegas(model)[0][0]) == pytest.approx(profile.encoder.omega[1])


@pytest.mark.parametrize("by", ["launcher", "argument"])
@pytest.mark.parametrize("kind", ["DeepSpeed", "FSDP"])
def test_where_weights_cannot_be_written_the_error_says_how_to_profile(tmp_path, monkeypatch, kind, by):
    args = arguments(tmp_path)
    args.use_cpu = False
    if by == "launcher":
        monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")  # as `accelerate launch` does
    else:
        setattr(args, kind.lower(), True)
    model = tiny_model()
    message = rf"(?s)Under {kind}.*profile before the Trainer is built.*initialize_omega"
    with pytest.raises(RuntimeError, match=message):
        AdminProfilingCallback().on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    assert not model._forward_pre_hooks


def test_profiling_by_hand_as_the_error_says(tmp_path, dataset):
    model = tiny_model()
    batch = Collator(model)([dataset[i] for i in range(32)])
    initialize_omega(model, profile_residuals(model, batch))
    before = omegas(model)
    trainer(model, dataset, tmp_path, [AdminProfilingCallback()], learning_rate=0.0).train()
    assert all(torch.equal(a, b) for a, b in zip(before, omegas(model), strict=True))
    assert not (tmp_path / "residual_profile.json").exists()


def test_the_batch_of_transformers_own_collator_works(tmp_path, dataset):
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(PAD)} | {"<pad>": PAD}, unk_token="1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    model = tiny_model()
    run = Seq2SeqTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, label_smoothing_factor=0.1),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        callbacks=[AdminProfilingCallback()],
    )
    run.train()
    assert (tmp_path / "residual_profile.json").exists()
    assert not model.model.shared.weight[PAD].any(), "under Trainer's own label smoother too"


# --- publishing -------------------------------------------------------------------------------------


def model_type(folder) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


def test_one_callback_serves_several_trainers(tmp_path, dataset, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    model, callback = tiny_model(), AdminPublishingCallback()
    for name in ("one", "two"):
        run = trainer(model, dataset, tmp_path / name, [callback], hub_token="hf_secret")
        assert run.args.hub_token is None and os.environ["HF_TOKEN"] == "hf_secret"
        run.train()
        run.save_model()
        run.save_model(tmp_path / f"{name}-kept")
        assert model_type(tmp_path / name) == "marian" and model_type(tmp_path / f"{name}-kept") == "admin"
        assert b"hf_secret" not in (tmp_path / name / "training_args.bin").read_bytes()


def test_a_copy_of_a_published_model_saves_its_own_weights(tmp_path, dataset):
    model = tiny_model()
    run = trainer(model, dataset, tmp_path, [AdminPublishingCallback()])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        twin.model.shared.weight[5] = 7.0
    twin.save_pretrained(run.args.output_dir)
    assert model_type(tmp_path) == "marian"
    assert (AdminForConditionalGeneration.from_pretrained(tmp_path).model.shared.weight[5] == 7.0).all()


def test_what_cannot_be_folded_is_saved_as_it_is(tmp_path, dataset, caplog):
    model = tiny_model()
    run = trainer(model, dataset, tmp_path, [AdminPublishingCallback()])
    model.model.decoder.layers[1].final_layer_norm.omega.data[0] = 0.0
    run.save_model()
    assert model_type(tmp_path) == "admin" and "gets the model with ω" in caplog.text
    assert "decoder.layers.1.final_layer_norm.omega" in caplog.text


def test_a_stock_model_is_refused_in_a_sentence(tmp_path, dataset):
    model = reparameterize(tiny_model())
    with pytest.raises(ValueError, match="MarianMTModel is not an Admin model, so it has no ω"):
        trainer(model, dataset, tmp_path, [AdminProfilingCallback()])


def test_a_mix_without_stock_architecture_is_refused_when_the_trainer_is_made(tmp_path, dataset):
    model = tiny_model(encoder_residual="post_ln", decoder_residual="pre_ln")
    with pytest.raises(ValueError, match="register_for_auto_class"):
        trainer(model, dataset, tmp_path, [AdminPublishingCallback()])


@pytest.mark.parametrize("kind", ["DeepSpeed", "FSDP"])
def test_publishing_from_sharded_weights_is_refused_when_the_trainer_is_made(tmp_path, monkeypatch, kind):
    args = arguments(tmp_path)
    args.use_cpu = False
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
    with pytest.raises(ValueError, match=f"Under {kind} .* export a checkpoint when training is done"):
        AdminPublishingCallback().on_init_end(args, TrainerState(), TrainerControl(), model=tiny_model())


def test_the_trainers_own_smoothing_is_warned_of(tmp_path, caplog):
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    for smoothing in (0.1, 0.0):
        assert not caplog.text
        model = tiny_model(label_smoothing=smoothing)
        AdminProfilingCallback().on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    assert "AdminConfig(label_smoothing=0.1)" in caplog.text

"""Adapters of PEFT on Admin models: profiled in a plain Trainer, merged into a vanilla model, or refused by name."""

import copy
import warnings

import pytest
import torch
from conftest import PAD, padded_batch, tiny_model
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from test_reparameterization import trained_model
from transformers import AutoModelForSeq2SeqLM, MarianMTModel, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.import_utils import is_peft_greater_or_equal

from admin_hf import (
    AdminProfilingCallback,
    AdminPublishingCallback,
    ResidualProfile,
    initialize_omega,
    profile_residuals,
    reparameterize,
)
from admin_hf.monitoring import ResidualMonitor
from admin_hf.special_tokens import check_tokenizer
from benchmarks.systems import word_tokenizer


TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SEQ2SEQ = {"task_type": "SEQ_2_SEQ_LM"}
MERGED = {
    "LoRA": LoraConfig(target_modules=TARGETS, r=2, **SEQ2SEQ),
    "DoRA": LoraConfig(target_modules=["q_proj", "fc2"], r=2, use_dora=True, **SEQ2SEQ),
    "LoRA and norms": LoraConfig(target_modules=["fc1"], r=2, modules_to_save=["final_layer_norm"], **SEQ2SEQ),
    "tokens": LoraConfig(target_modules=["fc1"], r=2, trainable_token_indices=[3, 4], **SEQ2SEQ),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"], **SEQ2SEQ),
    "OFT": OFTConfig(target_modules=["q_proj", "fc1"], oft_block_size=4, r=0, **SEQ2SEQ),
}
PROMPTS = {
    "prompts": PromptTuningConfig(num_virtual_tokens=3, **SEQ2SEQ),
    "prefixes": PrefixTuningConfig(num_virtual_tokens=3, **SEQ2SEQ),
    "P-tuning": PromptEncoderConfig(num_virtual_tokens=3, **SEQ2SEQ),
}
# Each Transformers asks for a PEFT of its time in its own integration, and lets an older one do the rest.
needs_its_peft = pytest.mark.skipif(
    not is_peft_greater_or_equal(MIN_PEFT_VERSION), reason=f"this Transformers asks for PEFT {MIN_PEFT_VERSION}"
)


def adapted(config, model=None):
    """A trained model with an adapter that changes what it computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(trained_model() if model is None else model, copy.deepcopy(config))
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits[batch["labels"] != -100]


def trainer(model, folder, *callbacks, **changes):
    batch = padded_batch()
    data = [{name: batch[name][i].tolist() for name in ("input_ids", "labels")} for i in (0, 0, 0, 0)]
    steps = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    arguments = Seq2SeqTrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **steps | changes
    )
    return Seq2SeqTrainer(model, arguments, train_dataset=data, callbacks=list(callbacks))


def omegas(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("omega")}


# --- the fold -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MERGED)
def test_the_vanilla_model_is_that_of_merge_and_unload(name, batch):
    model = adapted(MERGED[name])
    base, before = logits(trained_model(), batch), logits(model, batch)
    state = copy.deepcopy(model.state_dict())
    vanilla = reparameterize(model)
    assert type(vanilla) is MarianMTModel and not hasattr(vanilla, "peft_config")
    torch.testing.assert_close(logits(vanilla, batch), before, rtol=0, atol=2e-5)
    assert (before - base).abs().max() > 1e-2, "the adapter does something"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items()), "the model is untouched"
    by_hand = reparameterize(model.merge_and_unload())
    torch.testing.assert_close(logits(vanilla, batch), logits(by_hand, batch), rtol=0, atol=1e-5)


def test_new_words_are_trained(batch):
    model = trained_model()
    words = model.config.vocab_size
    model.resize_token_embeddings(words + 2)
    config = LoraConfig(target_modules=["fc1"], r=2, trainable_token_indices=[words, words + 1], **SEQ2SEQ)
    model = adapted(config, model)
    batch = batch | {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 3, words)}
    found = logits(model, batch)
    with model.disable_adapter():
        assert (found - logits(model, batch))[:, words:].abs().max() > 1e-2
    torch.testing.assert_close(logits(reparameterize(model), batch), found, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["LoRA", "LoRA and norms", "IA3"])
def test_what_is_switched_off_is_left_out(name, batch):
    model = adapted(MERGED[name])
    expected = logits(model, batch)
    with model.disable_adapter():
        vanilla = reparameterize(model)
    torch.testing.assert_close(logits(vanilla, batch), logits(trained_model(), batch), rtol=0, atol=2e-5)
    assert torch.equal(logits(model, batch), expected)


@needs_its_peft
def test_an_adapter_of_transformers_own_is_merged_too(tmp_path, batch):
    model = trained_model()
    model.add_adapter(copy.deepcopy(MERGED["LoRA and norms"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += 0.1
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "vanilla", reparameterize=True)
    vanilla = MarianMTModel.from_pretrained(tmp_path / "vanilla")
    torch.testing.assert_close(logits(vanilla, batch), expected, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists(), "without it, as Transformers saves adapters"
    model.save_pretrained(tmp_path / "adapter", reparameterize=True)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert type(again) is MarianMTModel, "no loader finds an adapter beside the vanilla model"
    assert torch.equal(logits(again, batch), logits(vanilla, batch))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_shared_weight_is_refused(name):
    model = adapted(LoraConfig(target_modules=["q_proj", name], r=2, **SEQ2SEQ))
    with pytest.raises(ValueError, match=f"{name} out of the adapter"):
        reparameterize(model)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_trained_and_cannot_be_merged(name, tmp_path):
    model = get_peft_model(tiny_model(), PROMPTS[name])
    with pytest.raises(ValueError, match="does not train weights"):
        reparameterize(model)
    with pytest.raises(ValueError, match="does not train weights"):
        trainer(model, tmp_path, AdminPublishingCallback())
    trainer(model, tmp_path, AdminProfilingCallback(verbose=False)).train()
    assert model.get_base_model().is_profiled
    assert profile_residuals(model, padded_batch()).encoder.omega[1] > 1


@needs_its_peft  # 5.24 has another name for the cache, and ignores the prefixes that PEFT up to 0.21 hands to generate
def test_prefixes_fit_the_vanilla_model_as_well(tmp_path, batch):
    model = adapted(PROMPTS["prefixes"])
    model.save_pretrained(tmp_path)
    beside = PeftModel.from_pretrained(reparameterize(model.get_base_model()), tmp_path)
    source = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    expected, found, base = (m.generate(**source, **options) for m in (model, beside, trained_model()))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=2e-5)
    assert not torch.equal(base.logits[0], expected.logits[0])


# --- in a Trainer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["get_peft_model", pytest.param("add_adapter", marks=needs_its_peft)])
def test_a_fresh_model_is_profiled_within_its_adapters(wrap, tmp_path, caplog):
    model, twin = tiny_model(), tiny_model()
    config = LoraConfig(target_modules=TARGETS, r=2, **SEQ2SEQ)
    if wrap == "add_adapter":
        model.add_adapter(config)
        wrapped = model
    else:
        wrapped = get_peft_model(model, config)
    run = trainer(wrapped, tmp_path, AdminProfilingCallback(verbose=False))
    before = {name: p.clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    with caplog.at_level("WARNING", logger="transformers"):
        run.train()
    assert "ω is frozen, because PEFT freezes everything except its adapters" in caplog.text
    profile = ResidualProfile.load(tmp_path / "residual_profile.json")
    initialize_omega(twin, profile)
    assert model.is_profiled and profile.encoder.omega[1] > 1
    assert all(torch.equal(value, omegas(twin)[name]) for name, value in omegas(model).items()), "ω is frozen"
    assert sum(not torch.equal(value, wrapped.get_parameter(name)) for name, value in before.items()) > 10


def test_the_profile_is_that_of_the_model_itself(batch):
    model = tiny_model()
    torch.manual_seed(0)
    expected = profile_residuals(model, batch)
    wrapped = get_peft_model(model, MERGED["LoRA"])
    torch.manual_seed(0)
    assert profile_residuals(wrapped, batch) == expected
    initialize_omega(wrapped, expected)
    assert float(model.model.encoder.layers[1].final_layer_norm.omega[0]) == pytest.approx(expected.encoder.omega[-1])
    monitors = [ResidualMonitor(each) for each in (wrapped, model)]
    found = []
    for monitor in monitors:
        monitor.watch_next_pass()
        torch.manual_seed(0)
        wrapped.train()(**batch)
        found.append(monitor.metrics())
    assert found[0] == found[1] and "decoder_variance_ratio_max" in found[0]


def test_a_tokenizer_is_checked_through_the_adapter():
    model = get_peft_model(tiny_model(), MERGED["LoRA"])
    check_tokenizer(model, word_tokenizer(PAD + 1))
    with pytest.raises(ValueError, match="vocabulary 50"):
        check_tokenizer(model, word_tokenizer(PAD + 2))


def test_resumed_training_gets_omega_from_the_profile(tmp_path):
    whole = get_peft_model(tiny_model(), MERGED["LoRA"])
    trainer(whole, tmp_path, AdminProfilingCallback(verbose=False)).train()
    torch.manual_seed(9)
    resumed = get_peft_model(tiny_model(), MERGED["LoRA"])
    trainer(resumed, tmp_path, AdminProfilingCallback(verbose=False)).train(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    (tmp_path / "residual_profile.json").unlink()
    lost = get_peft_model(tiny_model(), MERGED["LoRA"])
    with pytest.raises(ValueError, match="ω is lost"):
        trainer(lost, tmp_path, AdminProfilingCallback(verbose=False)).train(str(tmp_path / "checkpoint-2"))


def test_adapters_that_take_the_place_of_omega_are_named(tmp_path, batch):
    norms = get_peft_model(tiny_model(), LNTuningConfig(target_modules=["final_layer_norm"], **SEQ2SEQ))
    with pytest.raises(ValueError, match=r"layers\.0\.final_layer_norm contains ω.*modules_to_save"):
        trainer(norms, tmp_path, AdminProfilingCallback())
    with pytest.raises(ValueError, match="before `get_peft_model`"):
        profile_residuals(get_peft_model(tiny_model(), MERGED["LoRA and norms"]), batch)


def test_omega_is_trained_where_it_is_named(tmp_path, batch):
    model = tiny_model()
    initialize_omega(model, profile_residuals(model, batch))
    wrapped = get_peft_model(model, MERGED["LoRA and norms"])
    run = trainer(wrapped, tmp_path, AdminProfilingCallback())
    run.train()
    moved = wrapped.merge_and_unload().model.encoder.layers[1]
    assert moved.final_layer_norm.omega.std() > 0 and moved.self_attn_layer_norm.omega.std() < 1e-6


def test_publishing_writes_the_merged_vanilla_model_beside_the_adapters(tmp_path, batch):
    model = get_peft_model(tiny_model(), MERGED["LoRA"])
    (tmp_path / "adapter_config.json").write_text("{}")  # as Trainer leaves it where it pushes during training
    run = trainer(model, tmp_path, AdminProfilingCallback(verbose=False), AdminPublishingCallback())
    run.train()
    run.save_model()
    vanilla, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(vanilla) is MarianMTModel and not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(vanilla, batch), logits(model, batch), rtol=0, atol=2e-5)
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    base = tiny_model()
    initialize_omega(base, ResidualProfile.load(tmp_path / "residual_profile.json"))
    again = PeftModel.from_pretrained(base, tmp_path / "checkpoint-4")
    assert torch.equal(logits(again, batch), logits(model, batch))

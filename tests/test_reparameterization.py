"""The vanilla model against the one it was made from: stock classes, independent folds, refusals, atomic writes."""

import copy
import json
import math
import threading

import pytest
import torch
from conftest import learn, padded_batch, randomize, tiny_config, tiny_model
from transformers import AutoModelForSeq2SeqLM, BartConfig, MarianModel, MarianMTModel, PegasusForConditionalGeneration

from admin_hf import (
    AdminConfig,
    AdminForConditionalGeneration,
    AdminModel,
    initialize_omega,
    profile_residuals,
    reparameterize,
)
from admin_hf.pretrained import load_complete
from admin_hf.residual import SYSTEMS, AdminConnection, PostLNConnection, ResidualSystem, residual_connections


POST_LN_FAMILY = [("admin", "admin"), ("post_ln", "post_ln"), ("admin", "post_ln"), ("post_ln", "admin")]
POST_LN_FAMILY += [(name, name) for name in ("admin_uniform", "rezero_post_ln", "looklinear", "deepnorm")]
POST_LN_FAMILY += [(name, name) for name in ("admin_uniform_o1", "admin_constant", "ds_init")]
POST_LN_FAMILY += [("deepnorm", "rezero_post_ln"), ("looklinear", "admin_uniform")]


def trained_model(encoder: str = "admin", decoder: str = "admin", **changes) -> AdminForConditionalGeneration:
    """A model of random weights whose ω differs from entry to entry."""
    model = randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder, **changes), scale=0.3)
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, AdminConnection):
            signs = torch.randint(2, module.omega.shape, generator=generator) * 2 - 1
            module.omega.data = signs * (0.5 + 3 * torch.rand(module.omega.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model(**batch).logits[batch["labels"] != -100]


def assert_same_function(model, folded, tolerance: float = 1e-5) -> None:
    batch = padded_batch()
    torch.testing.assert_close(logits(model, batch), logits(folded, batch), rtol=0, atol=tolerance)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for beams in (1, 4):
        expected, found = (m.generate(**source, num_beams=beams, max_length=20) for m in (model, folded))
        assert torch.equal(expected, found)


@pytest.mark.parametrize(("encoder", "decoder"), POST_LN_FAMILY)
def test_the_post_ln_family_becomes_marian(encoder, decoder):
    model = trained_model(encoder, decoder)
    folded = reparameterize(model)
    assert type(folded) is MarianMTModel and folded.config.model_type == "marian"
    # A number on the first shortcut is folded into the first branch, exact but for LayerNorm's ε
    assert_same_function(model, folded, tolerance=1e-4 if "deepnorm" in (encoder, decoder) else 1e-5)


@pytest.mark.parametrize("system", ["admin_uniform", "rezero_post_ln", "looklinear", "deepnorm"])
def test_a_model_that_was_trained_from_its_own_start_folds(system):
    model = learn(tiny_model(encoder_residual=system, decoder_residual=system), padded_batch(), updates=10).eval()
    assert_same_function(model, reparameterize(model), tolerance=1e-4 if system == "deepnorm" else 1e-5)


PRE_LN_FAMILY = [(name, name) for name in ("pre_ln", "layer_norm_scaling", "layer_scale", "gpas")]


@pytest.mark.parametrize(("encoder", "decoder"), [*PRE_LN_FAMILY, ("gpas", "pre_ln"), ("layer_scale", "gpas")])
def test_the_pre_ln_family_becomes_pegasus(encoder, decoder):
    model = trained_model(encoder, decoder)
    folded = reparameterize(model)
    assert type(folded) is PegasusForConditionalGeneration
    # The LayerNorms of GPAS read what its scales have made smaller, beside which their ε is larger
    assert_same_function(model, folded, tolerance=1e-4 if "gpas" in (encoder, decoder) else 1e-5)


@pytest.mark.parametrize("places", [(0,), (1,), (0, 2), (3,)])
def test_a_negative_scale_of_gpas_folds(places):
    model = trained_model("gpas", "gpas")
    connections = [c for _, c in residual_connections(model.model.encoder)]
    for place in places:
        connections[place].alpha.data.fill_(2.0)  # 1 − SiLU(2) = −0.76
    assert_same_function(model, reparameterize(model), tolerance=1e-4)


def test_the_fold_of_scaled_pre_ln_by_hand():
    """γ and ν / √2 in the second layer, λ on the rows of what ends a branch, and 1 / Π (1 − SiLU(α)) on them."""
    model = trained_model("layer_norm_scaling", "gpas")
    before, after = model.state_dict(), reparameterize(model).state_dict()
    for part in ("weight", "bias"):
        for name, scale in (("self_attn_layer_norm", 2**-0.5), ("final_layer_norm", 2**-0.5)):
            name = f"model.encoder.layers.1.{name}.{part}"
            torch.testing.assert_close(after[name], scale * before[name])
        total = 1.0
        for layer in range(2):
            branches = {"self_attn": "self_attn.out_proj", "encoder_attn": "encoder_attn.out_proj", "final": "fc2"}
            for norm, end in branches.items():
                name = f"model.decoder.layers.{layer}.{end}.{part}"
                torch.testing.assert_close(after[name], before[name] / total, rtol=1e-5, atol=1e-7)
                alpha = float(before[f"model.decoder.layers.{layer}.{norm}_layer_norm.alpha"])
                total *= 1 - alpha / (1 + math.exp(-alpha))
    model = trained_model("layer_scale", "layer_scale")
    before, after = model.state_dict(), reparameterize(model).state_dict()
    gain = before["model.encoder.layers.0.final_layer_norm.gain"]
    expected = gain[:, None] * before["model.encoder.layers.0.fc2.weight"]
    torch.testing.assert_close(after["model.encoder.layers.0.fc2.weight"], expected)


@pytest.mark.parametrize("system", ["b2t", "keel", "mix_ln"])
def test_systems_without_a_stock_architecture_are_refused(system):
    with pytest.raises(ValueError, match=f"No architecture of Transformers computes encoder_residual='{system}'"):
        reparameterize(
            tiny_model(encoder_residual=system, decoder_residual=system, encoder_layers=4, decoder_layers=4)
        )


def test_a_gpas_scale_near_zero_is_refused():
    model = trained_model("gpas", "gpas")
    model.model.encoder.layers[0].final_layer_norm.alpha.data.fill_(1.2785)  # SiLU(1.2785) = 1.0000
    with pytest.raises(ValueError, match=r"encoder.layers.0.final_layer_norm.shortcut_scale has the entry"):
        reparameterize(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_embedding": False},
        {"tie_word_embeddings": False},
        {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False, "decoder_vocab_size": 50},
        {"encoder_layers": 1, "decoder_layers": 3},
        {"activation_function": "swish"},
        {"encoder_ffn_dim": 24, "decoder_attention_heads": 4},
    ],
)
def test_every_shape_of_model_folds(changes):
    model = trained_model(**changes)
    assert_same_function(model, reparameterize(model))


def test_the_fold_is_that_of_the_papers_appendix():
    """Written down by hand for one layer: γ ω, ν ω, W / ω, and nothing else changes."""
    model = trained_model(encoder_layers=1, decoder_layers=1)
    before, after = model.state_dict(), reparameterize(model).state_dict()
    expected = {name: value for name, value in before.items() if "omega" not in name}
    encoder, decoder = "model.encoder.layers.0", "model.decoder.layers.0"
    folds = [
        (f"{encoder}.self_attn_layer_norm", f"{encoder}.final_layer_norm", f"{encoder}.fc1"),
        (f"{decoder}.self_attn_layer_norm", f"{decoder}.encoder_attn_layer_norm", f"{decoder}.encoder_attn.q_proj"),
        (f"{decoder}.encoder_attn_layer_norm", f"{decoder}.final_layer_norm", f"{decoder}.fc1"),
    ]
    for norm, scaled, projection in folds:
        omega = before[f"{scaled}.omega"].double()
        for part in ("weight", "bias"):
            expected[f"{norm}.{part}"] = (before[f"{norm}.{part}"].double() * omega).float()
        weight = before[f"{projection}.weight"].double() @ torch.diag(1 / omega)
        expected[f"{projection}.weight"] = weight.float()
    assert expected.keys() == after.keys()
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_folding_is_exact_in_float64():
    model = trained_model(encoder_layers=6, decoder_layers=6).double()
    folded, batch = reparameterize(model), padded_batch()
    assert folded.dtype == torch.float64
    torch.testing.assert_close(logits(model, batch), logits(folded, batch), rtol=0, atol=1e-11)


def test_a_base_model_becomes_a_base_model():
    model = randomize(AdminModel(tiny_config())).eval()
    folded = reparameterize(model)
    assert type(folded) is MarianModel
    batch = padded_batch()
    inputs = {"input_ids": batch["input_ids"], "decoder_input_ids": batch["labels"].clamp(0)}
    with torch.no_grad():
        expected, found = model(**inputs).last_hidden_state, folded(**inputs).last_hidden_state
    torch.testing.assert_close(expected, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_or_asked_for(dtype, tmp_path):
    model = trained_model()
    rounded_once = reparameterize(model, dtype)
    assert {p.dtype for p in rounded_once.parameters()} == {dtype}
    folded = reparameterize(model)
    for name, value in rounded_once.state_dict().items():
        if "positions" not in name:
            torch.testing.assert_close(value, folded.state_dict()[name].to(dtype), rtol=1e-7, atol=1e-7)
    half = reparameterize(model.to(dtype))
    assert half.dtype == dtype
    # and a half-precision checkpoint, which rounds positions too, can be folded again
    half.save_pretrained(tmp_path)
    assert reparameterize(AdminForConditionalGeneration.from_pretrained(tmp_path)).dtype == dtype


class ScaledConnection(PostLNConnection):
    """LN(s x + r f), as DeepNorm's α, ReZero's α and both at once."""

    def __init__(self, d_model: int, shortcut_scale, branch_scale) -> None:
        super().__init__(d_model)
        self.shortcut_scale, self.branch_scale = shortcut_scale, branch_scale

    def forward(self, shortcut, branch):
        return super().forward(shortcut * self.shortcut_scale, branch * self.branch_scale)


class LearntBranchScale(PostLNConnection):
    """LN(x + α f) with one α that the sub-layers of a layer share, as ReZero with Post-LN."""

    def __init__(self, d_model: int, alpha: torch.nn.Parameter) -> None:
        super().__init__(d_model)
        self.alpha = alpha

    @property
    def branch_scale(self):
        return self.alpha

    def forward(self, shortcut, branch):
        return super().forward(shortcut, self.alpha * branch)


class Scaled(ResidualSystem):
    def connection(self, sublayer_idx):
        return ScaledConnection(self.config.d_model, shortcut_scale=1.7, branch_scale=0.6)


class Shared(ResidualSystem):
    def connect(self, layer, layer_idx):
        self.alpha = torch.nn.Parameter(torch.tensor(0.5 + layer_idx))
        super().connect(layer, layer_idx)

    def connection(self, sublayer_idx):
        return LearntBranchScale(self.config.d_model, self.alpha)


class Secret(ResidualSystem):
    """Computes something else than it says."""

    def connection(self, sublayer_idx):
        class Connection(PostLNConnection):
            def forward(self, shortcut, branch):
                return super().forward(shortcut, 1.01 * branch)

        return Connection(self.config.d_model)


@pytest.fixture
def own_systems(monkeypatch):
    for name, system in (("scaled", Scaled), ("shared", Shared), ("secret", Secret)):
        monkeypatch.setitem(SYSTEMS, name, system)


@pytest.mark.parametrize(("encoder", "decoder"), [("scaled", "scaled"), ("shared", "shared"), ("scaled", "admin")])
def test_constants_and_shared_scales_fold_too(own_systems, encoder, decoder):
    model = trained_model(encoder, decoder)
    # A number on the first shortcut is folded into the first branch, exact but for LayerNorm's ε
    assert_same_function(model, reparameterize(model), tolerance=1e-4 if "scaled" in (encoder, decoder) else 1e-5)


def test_a_connection_that_computes_something_else_is_found_out(own_systems, tmp_path):
    with pytest.raises(ValueError, match=r"differ by .* nothing was exported.* is model\.encoder\.layers\.0\.fc2"):
        trained_model("secret", "secret").save_pretrained(tmp_path / "out", reparameterize=True)
    assert not (tmp_path / "out").exists()


NO_STOCK = [("post_ln", "pre_ln"), ("pre_ln", "admin"), ("rezero", "rezero"), ("fixup", "fixup"), ("admin", "fixup")]


@pytest.mark.parametrize(("encoder", "decoder"), NO_STOCK)
def test_what_is_neither_post_nor_pre_ln_throughout_has_no_stock_architecture(encoder, decoder):
    with pytest.raises(ValueError, match=f"{encoder}.*{decoder}.*register_for_auto_class.*reparameterize=False"):
        reparameterize(trained_model(encoder, decoder))


def test_pre_ln_with_two_vocabularies_has_no_stock_architecture():
    separate = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 60}
    with pytest.raises(ValueError, match="Pegasus.*one vocabulary"):
        reparameterize(trained_model("pre_ln", "pre_ln", **separate))


@pytest.mark.parametrize("value", [0.0, 1e-9, -1e-5])
def test_an_omega_near_zero_is_named(value, tmp_path):
    model = trained_model()
    model.model.decoder.layers[1].encoder_attn_layer_norm.omega.data[3] = value
    with pytest.raises(ValueError, match=r"model\.decoder\.layers\.1\.encoder_attn_layer_norm\.omega has.* at 3"):
        model.save_pretrained(tmp_path / "out", reparameterize=True)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_or_overflows_is_named(tmp_path):
    model = trained_model()
    model.model.encoder.layers[0].fc2.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"float16.*model\.encoder\.layers\.0\.fc2\.weight"):
        reparameterize(model, torch.float16)
    model.model.encoder.layers[0].fc2.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.encoder\.layers\.0\.fc2\.weight"):
        reparameterize(model)


def test_a_wrong_fold_is_refused(monkeypatch, tmp_path):
    """The verification sees one entry of one weight that is off by a hundredth."""
    from admin_hf import reparameterization

    right = reparameterization.folded_weights

    def wrong(model):
        weights = right(model)
        weights["model.decoder.layers.1.fc1.weight"][2, 3] += 0.01
        return weights

    monkeypatch.setattr(reparameterization, "folded_weights", wrong)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=r"nothing was exported.* is model\.decoder\.layers\.1\.fc2"):
            reparameterize(trained_model(), dtype)


CHANGES = {
    "the embedding scale": lambda m: setattr(m.model.encoder, "embed_scale", 1.0),
    "the configuration": lambda m: setattr(m.config, "activation_function", "gelu"),
    "an activation": lambda m: setattr(m.model.decoder.layers[1], "activation_fn", torch.nn.GELU()),
    "an epsilon": lambda m: setattr(m.model.decoder.layers[0].final_layer_norm, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_in_memory_alone_is_not_passed_over(change):
    """The export is compared with the very model, not with one made again from its configuration."""
    model = trained_model()
    CHANGES[change](model)
    with pytest.raises(ValueError, match="nothing was exported"):
        reparameterize(model)


def test_a_large_bias_does_not_widen_the_tolerance(own_systems):
    for token in (7, 8):
        model = trained_model("secret", "secret")
        model.final_logits_bias[0, token] = -1e4 if token == 7 else 900.0
        with pytest.raises(ValueError, match="nothing was exported"):
            reparameterize(model)


def test_a_branch_scale_of_zero_folds(own_systems):
    """ReZero's α starts there; it is never divided by."""
    model = trained_model("shared", "shared")
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.data.zero_()
    assert_same_function(model, reparameterize(model))


def test_wrapped_models_fold_and_hooks_are_not_run():
    class Recorder:
        def __init__(self):
            self.lock = threading.Lock()  # which cannot be copied

        def __call__(self, module, *inputs_and_output):
            called.append(module)

    model, called = trained_model(), []
    model.register_forward_pre_hook(Recorder())
    model.model.encoder.layers[0].register_forward_hook(Recorder())
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model)):
        assert_same_function(model, reparameterize(wrapped))
        called.clear()
    reparameterize(model)
    assert not called


def test_the_model_is_untouched():
    model = trained_model().train()
    batch = padded_batch()
    initialize_omega(model, profile_residuals(model, batch))
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    random_state = torch.random.get_rng_state()
    folded = reparameterize(model)
    assert not folded.training and all(p.requires_grad for n, p in folded.named_parameters() if "positions" not in n)
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert (config, generation) == (model.config.to_dict(), model.generation_config.to_dict())
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with torch.no_grad():  # and shares no memory with what was made of it
        for parameter in folded.parameters():
            parameter.zero_()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_generation_config_and_special_tokens_are_carried_over(tmp_path):
    model = trained_model(vocab_size=60, pad_token_id=59, eos_token_id=3)
    model.generation_config.num_beams, model.generation_config.max_length = 5, 33
    model.save_pretrained(tmp_path, reparameterize=True)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is MarianMTModel
    assert (loaded.generation_config.num_beams, loaded.generation_config.max_length) == (5, 33)
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id", "vocab_size"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    assert loaded.generation_config.pad_token_id == 59 and loaded.generation_config.eos_token_id == 3
    assert not loaded.model.shared.weight[59].any() and loaded.final_logits_bias[0, 59] == -1e4
    assert not {"encoder_residual", "label_smoothing"} & json.loads((tmp_path / "config.json").read_text()).keys()


def test_settings_of_generation_do_not_come_into_the_comparison():
    model = trained_model()
    settings = {"num_beams": 3, "num_return_sequences": 3, "forced_bos_token_id": 5, "no_repeat_ngram_size": 1}
    model.generation_config.update(**settings, max_new_tokens=40, repetition_penalty=3.0)
    folded = reparameterize(model)
    torch.testing.assert_close(logits(model, padded_batch()), logits(folded, padded_batch()), rtol=0, atol=1e-5)
    assert {name: getattr(folded.generation_config, name) for name in settings} == settings
    assert model.generation_config.repetition_penalty == 3.0


# --- the way back, and what keeps ω from being lost ------------------------------------------------


def test_training_goes_on_from_an_export(tmp_path):
    model = trained_model()
    model.save_pretrained(tmp_path, reparameterize=True)
    back = AdminForConditionalGeneration.from_pretrained(tmp_path)
    assert back.omega_initialized
    omegas = [module.omega for module in back.modules() if isinstance(module, AdminConnection)]
    assert omegas and all((omega == 1).all() for omega in omegas)
    assert_same_function(model, back)
    loss = back.train()(**padded_batch()).loss
    loss.backward()
    torch.optim.SGD(back.parameters(), lr=0.1).step()
    assert any((omega != 1).any() for omega in omegas), "and ω is trained"
    assert_same_function(back.eval(), reparameterize(back))


def test_training_goes_on_from_stock_marian(tmp_path):
    torch.manual_seed(3)
    config = tiny_config(encoder_residual="post_ln", decoder_residual="post_ln")
    reparameterize(AdminForConditionalGeneration(config)).save_pretrained(tmp_path / "config")
    stock = randomize(MarianMTModel.from_pretrained(tmp_path / "config")).eval()
    stock.save_pretrained(tmp_path / "stock")
    model = AdminForConditionalGeneration.from_pretrained(tmp_path / "stock").eval()
    batch = padded_batch()
    assert torch.equal(logits(stock, batch), logits(model, batch)), "ω = 1 is Marian bit for bit"


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("is_shared", [True, False])
def test_training_goes_on_from_an_exported_pre_ln_model(tmp_path, is_shared, is_tied):
    sharing = {"share_encoder_decoder_embeddings": is_shared, "tie_word_embeddings": is_tied}
    model = trained_model("pre_ln", "pre_ln", **sharing)
    reparameterize(model).save_pretrained(tmp_path)
    back = load_complete(AdminForConditionalGeneration, tmp_path, AdminConfig.from_pretrained(tmp_path))
    batch = padded_batch()
    assert (back.eval().config.encoder_residual, back.config.decoder_residual) == ("pre_ln", "pre_ln")
    assert_same_function(model, back)
    assert torch.equal(logits(back, batch), logits(PegasusForConditionalGeneration.from_pretrained(tmp_path), batch))


def test_a_config_of_another_model_is_refused(tmp_path):
    BartConfig().save_pretrained(tmp_path)
    for reader in (AdminForConditionalGeneration, AdminConfig):
        with pytest.raises(ValueError, match="contains a 'bart' model; expected an Admin, Marian or Pegasus model"):
            reader.from_pretrained(tmp_path)

"""ω in stock models against the same computed by other means, on tiny models of every family."""

import copy
import re
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import randomize, tiny_model
from families import (
    FAMILIES,
    connections,
    difference,
    family_batch,
    family_model,
    outputs,
    reference,
    set_random_omega,
    stock_model,
    without_dropout,
)
from torch import nn
from torch.nn.utils import parametrize

from admin_hf import (
    Stack,
    Sublayer,
    initialize_omega,
    inject,
    profile_residuals,
    reparameterize,
)
from admin_hf.analysis import gradient_norms, layer_dependency
from admin_hf.monitoring import ResidualMonitor
from admin_hf.parametrization import scale


every_family = pytest.mark.parametrize("family", FAMILIES)


def precise(family, model):
    """In float64, which FSMT does not know."""
    return model if family == "fsmt" else model.double()


def omegas(model):
    return [connection.omega.detach().clone() for connection in connections(model) if hasattr(connection, "omega")]


# --- what an ω computes ---------------------------------------------------------------------------


@every_family
def test_an_omega_of_one_gives_the_stock_outputs_bit_for_bit(family):
    stock = family_model(family, random=True)
    batch = family_batch(stock)
    model = inject(copy.deepcopy(stock))
    assert difference(outputs(model, batch), outputs(stock, batch)) == 0
    assert type(model) is type(stock) and model.config.to_dict() == stock.config.to_dict()
    assert all(torch.equal(omega, torch.ones(16)) for omega in omegas(model))


@every_family
def test_omega_scales_the_shortcuts(family):
    stock = precise(family, family_model(family, random=True))
    batch = family_batch(stock)
    model = inject(copy.deepcopy(stock))
    set_random_omega(model)
    expected = outputs(reference(stock, model)[0], batch)
    assert difference(outputs(model, batch), expected) < (1e-5 if family == "fsmt" else 1e-12)
    assert difference(expected, outputs(stock, batch)) > 1, "ω matters"


@every_family
def test_every_shortcut_behind_a_norm_has_an_omega_with_a_gradient(family):
    stock = family_model(family, random=True)
    model = inject(stock)
    set_random_omega(model)
    model(**family_batch(model)).loss.backward()
    without = [connection.name for connection in connections(model) if not hasattr(connection, "omega")]
    assert all(
        connection.place == 0 and connection.front is None
        for connection in connections(model)
        if not hasattr(connection, "omega")
    )
    expected = {"marian": 2, "fsmt": 2, "opt": 1, "openai-gpt": 1, "electra-projected": 1, "blenderbot-small": 1}
    assert len(without) == expected.get(family, 0)
    parameters = [p for name, p in model.named_parameters() if name.endswith(".omega")]
    assert len(parameters) == len(connections(model)) - len(without)
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in parameters)


@every_family
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_fold_is_the_stock_model_again(family, dtype):
    stock = family_model(family, random=True)
    model = inject(copy.deepcopy(stock))
    set_random_omega(model)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    folded = reparameterize(model, dtype)
    assert torch.equal(torch.get_rng_state(), random)
    assert type(folded) is type(stock) and folded.state_dict().keys() == stock.state_dict().keys()
    assert folded.dtype == (dtype or torch.float32) and not hasattr(folded, "injection")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "as it was"
    if dtype is None:
        batch = family_batch(stock)
        assert difference(outputs(folded, batch), outputs(model, batch)) < 2e-5


def marian_and_admin():
    """A stock Marian with random weights and an ω, and the Admin model that has the same."""
    admin = randomize(tiny_model(), scale=0.3)
    for name, parameter in admin.named_parameters():
        if name.endswith("omega"):
            parameter.data.fill_(1)
    model = inject(reparameterize(admin))
    set_random_omega(model)
    with torch.no_grad():
        for stack, found in model.injection.stacks.items():
            for connection in found[1:]:
                getattr(admin.model, stack).get_submodule(connection.name).omega.copy_(connection.omega)
    return model, admin


def test_marian_computes_what_the_admin_model_does(batch):
    model, admin = marian_and_admin()
    assert type(model).__name__ == "MarianMTModel"
    assert difference(outputs(model, batch)[1:], outputs(admin, batch)[1:]) < 2e-5
    folded = [reparameterize(each).state_dict() for each in (model, admin)]
    assert folded[0].keys() == folded[1].keys()
    assert all(torch.allclose(value, folded[1][name], rtol=1e-5) for name, value in folded[0].items())


HEADS = {
    "BertForSequenceClassification": lambda: {"labels": torch.tensor([0, 1, 1])},
    "BertForTokenClassification": lambda: {"labels": torch.randint(0, 2, (3, 9))},
    "BertForQuestionAnswering": lambda: {
        "start_positions": torch.tensor([1, 2, 3]),
        "end_positions": torch.tensor([2, 3, 4]),
    },
    "BertForPreTraining": lambda: {
        "labels": torch.randint(0, 50, (3, 9)),
        "next_sentence_label": torch.tensor([0, 1, 1]),
    },
    "BertForNextSentencePrediction": lambda: {"labels": torch.tensor([0, 1, 1])},
    "BertForMultipleChoice": lambda: {"labels": torch.tensor([0, 1, 1])},
    "BertModel": dict,
    "BartForSequenceClassification": lambda: {"labels": torch.tensor([0, 1, 1])},
    "BartModel": dict,
    "DistilBertForQuestionAnswering": lambda: {
        "start_positions": torch.tensor([1, 2, 3]),
        "end_positions": torch.tensor([2, 3, 4]),
    },
    "OPTForSequenceClassification": lambda: {"labels": torch.tensor([0, 1, 1])},
    "ElectraForPreTraining": lambda: {"labels": torch.randint(0, 2, (3, 9))},
}


@pytest.mark.parametrize("head", HEADS)
def test_every_head_works(head):
    family = {"Bert": "bert", "Bart": "bart", "Dist": "distilbert", "OPTF": "opt", "Elec": "electra"}[head[:4]]
    stock = stock_model(head, random=True, **FAMILIES[family][1]).double()
    batch = family_batch(stock) | {"labels": None} | HEADS[head]()
    if family == "bart":
        batch["input_ids"][:, 5] = stock.config.eos_token_id
    if head == "BertForMultipleChoice":
        batch |= {name: batch[name][:, None].expand(-1, 2, -1).clone() for name in ("input_ids", "attention_mask")}
    batch = {name: value for name, value in batch.items() if value is not None}
    model = inject(copy.deepcopy(stock))
    assert difference(outputs(model, batch), outputs(stock, batch)) == 0
    check_profile(stock, model, batch)
    set_random_omega(model)
    expected = outputs(reference(stock, model)[0], batch)
    assert difference(outputs(model, batch), expected) < 1e-12
    assert difference(outputs(reparameterize(model), batch), expected) < 1e-12


def test_generation_with_a_cache_is_that_of_the_folded_model():
    for family in ("bart", "opt"):
        model = inject(family_model(family, random=True))
        set_random_omega(model)
        batch = {name: value for name, value in family_batch(model).items() if name != "labels"}
        options = {"max_new_tokens": 6, "do_sample": False}
        ids = model.generate(**batch, **options)
        assert torch.equal(ids, reparameterize(model).generate(**batch, **options))
        assert torch.equal(ids, model.generate(**batch, **options, use_cache=False))


# --- profiling ------------------------------------------------------------------------------------


def real_tokens(model, stack, batch):
    """Where tokens are real, by other means: None where all are."""
    if stack.prefix:
        return batch["labels"] != -100 if "labels" in batch and batch["labels"].dim() > 1 else None
    if "input_values" in batch:  # the last of 300 samples makes frame 58 of 79, with kernels of 10 and strides of 5
        mask = torch.ones(2, 79, dtype=torch.bool)
        mask[1, 59:] = False
        return mask
    return batch["attention_mask"].flatten(0, -2).bool() if "attention_mask" in batch else None


def check_profile(stock, model, batch):
    """The profile of `model`, which is given its ω, against what passes the stock model with this ω."""
    profile = profile_residuals(without_dropout(model), batch)
    initialize_omega(model, profile)
    other, everything = reference(stock, model)
    outputs(other, batch)
    for name, stack in model.injection.descriptions.items():
        measured, seen = profile.stacks[name], everything[name].parts
        mask = real_tokens(model, stack, batch)
        mask = mask.T if mask is not None and stack.time_first else mask
        pools = [[x if mask is None else x[mask] for x in part] for part in seen]
        shortcuts, branches = ([float(x.var(correction=0)) for x in column] for column in zip(*pools, strict=True))
        assert measured.names == [connection.name for connection in model.injection.stacks[name]]
        assert measured.branch_variances == pytest.approx(branches, rel=1e-4)
        assert measured.shortcut_variances == pytest.approx(shortcuts, rel=1e-4)
        first = int(model.injection.stacks[name][0].front is None)  # the sub-layer behind the first norm
        expected = [1.0] * (first + 1)
        expected += [(shortcuts[first] + sum(branches[first:i])) ** 0.5 for i in range(first + 1, len(branches))]
        assert measured.omega == pytest.approx(expected, rel=1e-4)
        assert max(expected) > 1.1
        for connection, omega in zip(model.injection.stacks[name], measured.omega, strict=True):
            if hasattr(connection, "omega"):
                assert connection.omega.tolist() == pytest.approx([omega] * 16)


@every_family
def test_a_profile_sums_the_variances_of_branches_behind_the_first_norm(family):
    stock = without_dropout(precise(family, family_model(family, random=True)))
    model = inject(copy.deepcopy(stock))
    assert not model.injection.omega_initialized and not model.injection.is_profiled
    check_profile(stock, model, family_batch(stock))
    assert model.injection.omega_initialized and model.injection.is_profiled


@every_family
def test_profiling_leaves_everything_as_it_was(family):
    changes = {"mask_time_prob": 0.3, "mask_time_length": 4} if family in ("wav2vec2", "hubert") else {}
    model = inject(family_model(family, **changes)).train()
    batch = family_batch(model)
    base = model.injection.base
    next(iter(base.children())).eval()
    before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    torch.manual_seed(5), np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = profile_residuals(model, batch)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert [m.training for m in model.modules()] == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert profile_residuals(model, batch) == first, "the same dropout"


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMultipleChoice"])
def test_a_large_batch_is_cut_to_its_first_rows(head):
    model = without_dropout(inject(stock_model(head, **FAMILIES["bert"][1])))
    rows = 300
    batch = {"input_ids": torch.randint(5, 50, (rows, 40)), "labels": torch.zeros(rows, dtype=torch.long)}
    kept = 204
    if head.endswith("Choice"):
        batch["input_ids"], kept = batch["input_ids"][:, None].repeat(1, 2, 1), 102
    first = {name: x[:kept] for name, x in batch.items()}
    assert profile_residuals(model, batch) == profile_residuals(model, first)


def test_rows_of_sound_are_counted_in_frames():
    model = without_dropout(inject(family_model("wav2vec2")))
    batch = {"input_values": torch.randn(20, 2505), "labels": torch.randint(1, 49, (20, 3))}  # 500 frames
    first = {name: x[:16] for name, x in batch.items()}
    assert profile_residuals(model, batch) == profile_residuals(model, first)


# --- what is refused ------------------------------------------------------------------------------

_PRE_LN = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50}
_GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
_BERT, _BART, _OPT, _SOUND = (FAMILIES[family][1] for family in ("bert", "bart", "opt", "wav2vec2"))
_BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
REFUSED = {
    "t5": ("T5Model", {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}, "Pre-LN"),
    "gpt2": ("GPT2LMHeadModel", _GPT2, "Pre-LN"),
    "llama": ("LlamaForCausalLM", _BERT, "Pre-LN"),
    "mbart": ("MBartForConditionalGeneration", _BART, "Pre-LN"),
    "pegasus": ("PegasusForConditionalGeneration", _BART, "Pre-LN"),
    "m2m_100": ("M2M100ForConditionalGeneration", _BART, "Pre-LN"),
    "opt-pre-ln": ("OPTForCausalLM", _OPT | {"do_layer_norm_before": True}, "Make it with do_layer_norm_before=False"),
    "opt-bare-norm": ("OPTForCausalLM", _OPT | {"layer_norm_elementwise_affine": False}, "LayerNorm with weight and"),
    "wav2vec2-pre-ln": ("Wav2Vec2ForCTC", _SOUND | {"do_stable_layer_norm": True}, "do_stable_layer_norm=False"),
    "wav2vec2-default": ("Wav2Vec2ForCTC", _SOUND | {"layerdrop": 0.1}, "Make it with layerdrop=0"),
    "bart-layerdrop": ("BartForConditionalGeneration", _BART | {"encoder_layerdrop": 0.1}, "with encoder_layerdrop=0"),
    "bart-decoder": ("BartForCausalLM", _BART, "no encoder with layers"),
    "no-layers": ("BertModel", _BERT | {"num_hidden_layers": 0}, "no encoder with layers"),
    "albert": ("AlbertForMaskedLM", _BERT | {"embedding_size": 8}, "share their weights"),
    "detr": ("DetrForObjectDetection", _BART | _BACKBONE, "adds positions"),
    "unknown": (
        "XLNetLMHeadModel",
        {"d_model": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50},
        "not known.*stacks=",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_have_an_omega_is_refused_and_stays_as_it_was(case):
    name, values, message = REFUSED[case]
    if case == "detr":
        backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
        values = values | {"backbone_config": backbone}
    model = stock_model(name, **values)
    check_refused(model, message)


def check_refused(model, message, *args, **options):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        inject(model, *args, **options)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parametrize.is_parametrized(m) for m in model.modules() if not isinstance(m, nn.Conv1d))


def test_an_omega_is_put_in_once():
    with pytest.raises(ValueError, match="BertForMaskedLM has an ω already"):
        inject(inject(family_model("bert")))
    with pytest.raises(ValueError, match="has its ω already"):
        inject(tiny_model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "norm3"}, "norm3"),
        ({"reads": ("q", "k", "w")}, "w"),
        ({"reads": ("q", "down")}, "matrix with 16 inputs"),
        ({"reads": ("q", "norm1")}, "matrix with 16 inputs"),
        ({"ends": "none"}, "none"),
    ],
)
def test_wrong_names_of_a_described_model_are_refused(changes, message):
    wrong = replace(PLAIN, sublayers=(replace(PLAIN.sublayers[0], **changes), PLAIN.sublayers[1]))
    check_refused(Plain(), message, stacks=[wrong])


@pytest.mark.parametrize("changes", [{"front": "norm"}, {"layers": "layer"}, {"module": "encoder"}])
def test_wrong_paths_of_a_described_model_are_refused(changes):
    check_refused(Plain(), "not as described", stacks=[replace(PLAIN, **changes)])


def test_wrong_choices_are_refused():
    check_refused(family_model("bert"), "system='post_ln'", system="post_ln")
    check_refused(family_model("bert"), "must be one of O", "admin_uniform", output_change="O(n²)")


def test_a_loaded_model_keeps_its_function(tmp_path):
    """A fresh model of a loaded configuration is no loaded model."""
    family_model("bert", random=True).save_pretrained(tmp_path)
    model_class = transformers.BertForMaskedLM
    check_refused(model_class.from_pretrained(tmp_path), "make a fresh one", "deepnorm")
    loaded = inject(model_class.from_pretrained(tmp_path))
    assert loaded.injection.omega_initialized and not loaded.injection.is_profiled
    fresh = inject(model_class(transformers.AutoConfig.from_pretrained(tmp_path)))
    assert not fresh.injection.omega_initialized
    inject(model_class(transformers.AutoConfig.from_pretrained(tmp_path)), "deepnorm")


def test_a_trained_omega_near_zero_is_not_folded():
    model = inject(family_model("bert"))
    connections(model)[2].omega.data[3] = 1e-6
    with pytest.raises(ValueError, match=r"encoder.layer.1.attention.output.LayerNorm.omega has the entry 1e-06 at 3"):
        reparameterize(model)
    connections(model)[2].omega.data[3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        reparameterize(model)


# --- systems --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("growth", "values"), {"O(log n)": (1.1606, 1.4548), "O(1)": (2.0, 3.0), "O(n)": (1, 1)}.items()
)
def test_a_uniform_omega_follows_from_the_depth_of_the_stack(growth, values, trained):
    """4 sub-layers in the encoder and 9 in the decoder; sqrt(5 / ln 5 − 1) and sqrt(10 / ln 10 − 1)."""
    values = {"O(log n)": ((5 / 1.6094379 - 1) ** 0.5, (10 / 2.3025851 - 1) ** 0.5)}.get(growth, values)
    stock = family_model("bart", random=True).double()
    model = inject(copy.deepcopy(stock), "admin_uniform", output_change=growth, trained=trained)
    for found, value in zip(model.injection.stacks.values(), values, strict=True):
        assert all(each.omega.tolist() == pytest.approx([value] * (16 if trained else 1)) for each in found)
    assert sum(p.requires_grad for n, p in model.named_parameters() if n.endswith("omega")) == 13 * trained
    assert model.injection.omega_initialized and not model.injection.is_profiled
    batch = family_batch(stock)
    expected = outputs(reference(stock, model)[0], batch)
    assert difference(outputs(model, batch), expected) < 1e-12
    assert difference(outputs(reparameterize(model), batch), expected) < 1e-12


@pytest.mark.parametrize("family", ["bert", "opt", "openai-gpt", "bart", "marian"])
def test_deepnorm_is_that_of_its_paper(family):
    """Figure 2 of DeepNet, at N = 2 layers alone, and at 2 and 3 in an encoder and a decoder."""
    expected = {"bert": [(1.41421356, 0.5)], "opt": [(1.41421356, 0.5)], "openai-gpt": [(1.41421356, 0.5)]}.get(
        family, [(0.81 * 48 ** (1 / 16), 0.87 * 48 ** (-1 / 16)), (9**0.25, 36**-0.25)]
    )
    size = {"hidden_size": 64, "intermediate_size": 64} if family == "bert" else {}
    model = inject(family_model(family, **size), "deepnorm")
    assert not any(name.endswith("omega") for name, _ in model.named_parameters())
    for found, (alpha, _) in zip(model.injection.stacks.values(), expected, strict=True):
        assert [float(each.omega) for each in found] == pytest.approx([alpha] * len(found))
    if family == "bert":
        layer = model.bert.encoder.layer[0]
        for module, gain in ((layer.attention.self.query, 1), (layer.attention.self.key, 1)):
            assert float(original(module).std()) == pytest.approx(gain / 8, rel=0.1)
        for module in (layer.attention.self.value, layer.attention.output.dense, layer.output.dense):
            assert float(original(module).std()) == pytest.approx(0.5 / 8, rel=0.1)
            assert not bool(module.bias.any())
    if family == "openai-gpt":
        query, key, value = original(model.transformer.h[0].attn.c_attn).chunk(3, 1)
        assert [float(x.std()) for x in (query, key, value)] == pytest.approx([0.25, 0.25, 0.125], rel=0.2)
    batch = family_batch(model)
    folded = reparameterize(model)
    assert difference(outputs(folded, batch), outputs(model, batch)) < 2e-5
    assert not any(parametrize.is_parametrized(module) for module in folded.modules())


def original(module):
    return module.parametrizations.weight.original if parametrize.is_parametrized(module) else module.weight


def test_deepnorm_of_marian_is_that_of_the_admin_model(batch):
    """Up to the ε of LayerNorm in the first sub-layer."""
    admin = tiny_model(encoder_residual="deepnorm", decoder_residual="deepnorm")
    values = {name: value for name, value in admin.config.to_dict().items() if name in _MARIAN_FIELDS}
    model = inject(stock_model("MarianMTModel", **values), "deepnorm")
    weights = admin.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            plain = re.sub(r"parametrizations\.(\w+)\.original", r"\1", name)
            if not name.endswith("omega"):
                value.copy_(weights[plain])
    assert difference(outputs(model, batch)[1:], outputs(admin, batch)[1:]) < 2e-4
    for name, found in model.injection.stacks.items():
        for connection in found:
            own = getattr(admin.model, name).get_submodule(connection.name)
            assert float(connection.omega) == pytest.approx(own.shortcut_scale)


_MARIAN_FIELDS = {field.name for field in fields(transformers.MarianConfig)} - {"architectures", "dtype"}


# --- a model of one's own -------------------------------------------------------------------------


class PlainLayer(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        x = self.norm1(x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))))
        return self.norm2(x + self.down(self.up(x).relu()))


class Plain(nn.Module):
    """A Post-LN Transformer in plain PyTorch."""

    def __init__(self, layers=3, width=16):
        super().__init__()
        self.embedding, self.first = nn.Embedding(50, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(PlainLayer(width) for _ in range(layers))
        self.head = nn.Linear(width, 50)

    def forward(self, input_ids, labels=None):
        x = self.first(self.embedding(input_ids))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss, to_tuple=lambda: (logits,))


PLAIN = Stack(
    "encoder",
    (
        Sublayer("self-attention", "norm1", reads=("q", "k", "v"), ends="o"),
        Sublayer("feed-forward", "norm2", reads=("up",), ends="down"),
    ),
    front="first",
    module="",
)


@pytest.mark.parametrize("system", ["admin", "admin_uniform"])
def test_a_model_of_ones_own_is_described_by_its_sublayers(system):
    torch.manual_seed(0)
    stock = randomize(Plain(), scale=0.3).double()
    ids = torch.randint(0, 50, (3, 9))
    batch = {"input_ids": ids, "labels": ids}
    model = inject(copy.deepcopy(stock), system, stacks=[PLAIN])
    if system == "admin":
        assert difference(outputs(model, batch), outputs(stock, batch)) == 0
        check_profile(stock, model, batch)
        assert model.injection.is_profiled
        set_random_omega(model)
    expected = outputs(reference(stock, model)[0], batch)
    assert difference(outputs(model, batch), expected) < 1e-12
    profile_residuals(model, batch)
    monitor = ResidualMonitor(model)
    monitor.watch_next_pass()
    model.train()(**batch).loss.backward()
    assert monitor.metrics()["encoder_variance_ratio_max"] > 0
    assert all(each.omega.grad is not None for each in connections(model))
    assert len(layer_dependency(model, batch).encoder.beta) == 6
    assert len(gradient_norms(model, batch).encoder.relative_norms) == 6
    folded = reparameterize(model)
    assert difference(outputs(folded, batch), outputs(model, batch)) < 1e-12
    assert type(folded) is Plain and folded.state_dict().keys() == stock.state_dict().keys()
    other = inject(Plain().double(), system, stacks=[PLAIN])
    other.load_state_dict(model.state_dict())
    assert difference(outputs(other, batch), outputs(model, batch)) == 0


def test_pytorchs_own_layers_are_described_by_their_packed_matrix():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.front, self.encoder = nn.LayerNorm(16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x):
            return (self.encoder(self.front(x)),)

    sublayers = (
        Sublayer("self-attention", "norm1", ("self_attn.in_proj_weight",), "self_attn.out_proj"),
        Sublayer("feed-forward", "norm2", ("linear1",), "linear2"),
    )
    torch.manual_seed(0)
    stock = randomize(Encoder(), scale=0.3).double().eval()
    model = inject(copy.deepcopy(stock), stacks=[Stack("encoder", sublayers, front="front")])
    batch = {"x": torch.randn(2, 5, 16, dtype=torch.double)}
    initialize_omega(model, profile_residuals(model, batch))
    set_random_omega(model)
    assert difference(outputs(model, batch), outputs(stock, batch)) > 0.1
    assert difference(outputs(model, batch), outputs(reparameterize(model), batch)) < 1e-12
    scaled, _ = reference(without_dropout(stock), model)
    (expected,) = scaled.train()(**batch)  # in evaluation mode PyTorch computes layers without their modules
    assert difference(outputs(model, batch), [expected]) < 1e-12


# --- what would be wrong without a word -----------------------------------------------------------


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_refused_whole(model: nn.Module, sentence: str, **options: Any) -> None:
    """Refused, and left as it was."""
    before = weights_of(model)
    with pytest.raises(ValueError, match=sentence):
        inject(model, **options)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_model_and_its_head_get_one_omega():
    model = family_model("bert")
    inject(model.bert)
    with pytest.raises(ValueError, match="has an ω already"):
        inject(model)
    with pytest.raises(ValueError, match="fold that part"):
        reparameterize(model)
    model = inject(family_model("bert"))
    with pytest.raises(ValueError, match="has an ω already"):
        inject(model.bert)


def test_weights_that_modules_share_are_refused():
    model = family_model("bert")
    layers = model.bert.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    assert_refused_whole(model, "a weight is shared")
    model = family_model("bert")
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense = layers[0].intermediate.dense
    assert_refused_whole(model, "a weight is shared")
    model = family_model("bart")
    model.model.decoder.layernorm_embedding = model.model.encoder.layernorm_embedding
    assert_refused_whole(model, "a weight is shared")
    model = family_model("bert")
    nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[1].intermediate.dense)
    assert_refused_whole(model, "or it is computed")


def test_what_stops_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = family_model("bert")
    before, batch = weights_of(model), family_batch(model)
    expected, count = outputs(model, batch), iter(range(100))

    def scale_some(*args: Any, **kwargs: Any) -> None:
        if next(count) == 5:
            raise KeyboardInterrupt
        scale(*args, **kwargs)

    monkeypatch.setattr("admin_hf.injection.scale", scale_some)
    with pytest.raises(KeyboardInterrupt):
        inject(model, "admin_uniform")
    after = model.state_dict()
    assert before.keys() == after.keys() and difference(outputs(model, batch), expected) == 0


def test_encoder_attention_is_not_left_out_silently():
    model = inject(family_model("bert-decoder"))
    batch = {name: x for name, x in family_batch(model).items() if name != "encoder_hidden_states"}
    with pytest.raises(ValueError, match="got no encoder_hidden_states"):
        model(**batch)
    assert not reparameterize(model).base_model._forward_pre_hooks


def test_classes_of_sentences_are_no_targets():
    model = inject(without_dropout(stock_model("BartForSequenceClassification", **FAMILIES["bart"][1], num_labels=4)))
    ids = torch.randint(5, 48, (3, 9))
    ids[:, -1] = model.config.eos_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with_labels = batch | {"labels": torch.ones(3, 4)}
    assert profile_residuals(model, with_labels).stacks == profile_residuals(model, batch).stacks


def test_a_fold_that_overflows_half_precision_is_refused():
    model = inject(family_model("bert"))
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.parametrizations.weight.original.fill_(5000.0)
        model.injection.stacks["encoder"][0].omega.fill_(30.0)
    with pytest.raises(ValueError, match="rounded to torch.float16"):
        reparameterize(model, torch.float16)


def test_running_means_are_not_moved_by_a_profile():
    model = inject(family_model("hubert", conv_pos_batch_norm=True)).train()
    before = weights_of(model)
    profile_residuals(model, family_batch(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_deepnorm_is_refused_where_its_initialisation_is_not_known():
    with pytest.raises(ValueError, match="initialises queries, keys and values separately"):
        inject(Plain(), "deepnorm", stacks=[PLAIN])

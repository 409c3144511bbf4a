"""ω in stock models against the same computed by other means, on tiny models of every family."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from conftest import randomize, tiny_model
from families import (
    FAMILIES,
    ScaledShortcut,
    Seen,
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

from admin_hf import (
    AdminForConditionalGeneration,
    Stack,
    Sublayer,
    initialize_omega,
    inject,
    load_injected,
    profile_residuals,
    reparameterize,
)
from admin_hf.injection import OUTPUT_CHANGES


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
    torch.manual_seed(5), np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = profile_residuals(model, batch)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert [m.training for m in model.modules()] == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
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

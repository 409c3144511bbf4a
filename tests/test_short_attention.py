"""The kernel for short rows, which Triton's interpreter computes on a CPU, against plain PyTorch in float64.

In float16: the interpreter rounds bfloat16 wrongly.
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from admin_hf import short_attention as short
from admin_hf.attention import admin_attention


TOLERANCE = 1e-3  # of a norm; float16 rounds to 5e-4
LENGTHS = [(7, 9), (20, 20), (33, 5), (1, 1), (100, 128)]  # of queries and keys
P = 0.25  # of a weight to become 0


@pytest.fixture(scope="module")
def interpreter():
    """Calls a function in a process whose kernels are interpreted, which Triton must know when it is imported."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as process:
        patch.setenv("TRITON_INTERPRET", "1")
        yield lambda function, *arguments: process.submit(function, *arguments).result()


# --- what runs in that process ------------------------------------------------------------------------


def attend(query, key, value, mask, dropout, upstream, compiled=False):
    """The output for `torch.manual_seed(1)`, and the gradients of query, key and value for that of the output."""
    function = torch.compile(short.short_attention, backend="aot_eager", fullgraph=True) if compiled else None
    torch.manual_seed(1)
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    output = (function or short.short_attention)(*inputs, mask, 0.3, dropout)
    return output.detach(), *torch.autograd.grad(output, inputs, upstream)


def draws(seeds, sentences, heads, targets, sources):
    """What dropout multiplies the weights by, `(sentences, heads, targets, sources)`, in a call after each seed."""
    query = torch.zeros(sentences, heads, targets, 128, dtype=torch.float16)  # so that all weights are the same
    key = query.new_zeros(sentences, heads, sources, 128)
    value = torch.eye(sources, 128, dtype=torch.float16).expand_as(key)  # so that the output is the weights
    found = []
    for seed in seeds:
        if seed is not None:
            torch.manual_seed(seed)
        output = short.short_attention(query, key, value, None, 0.3, P).transpose(1, 2)
        found.append(output[..., :sources].double() * sources)
    return found


def check_operators(query, key, value, mask, upstream):
    """PyTorch's own checks of both operators: what they say of shapes, strides and gradients is what they do."""
    seed = torch.tensor([3])
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(short._forward, (*inputs, mask, seed, 0.3, P))
    torch.library.opcheck(short._backward, (upstream, query, key, value, mask, seed, 0.3, P))


# --- output and gradients -----------------------------------------------------------------------------


def random_rows(targets, sources, head_size, sentences=2, heads=2):
    """Query, key, value, strided as projections' outputs, and a gradient of the output."""
    torch.manual_seed(0)
    shapes = [(sentences, n, heads, head_size) for n in (targets, sources, sources)]
    rows = [torch.randn(shape, dtype=torch.float16).transpose(1, 2) for shape in shapes]
    return *rows, torch.randn(shapes[0], dtype=torch.float16)


def made_mask(kind, targets, sources, sentences=2):
    lowest = torch.finfo(torch.float16).min
    if kind == "padding":  # one row for all queries: the second sentence is shorter
        mask = torch.zeros(sentences, 1, 1, sources, dtype=torch.float16)
        mask[1, ..., sources // 2 + 1 :] = lowest
        return mask.expand(-1, -1, targets, -1)
    if kind == "causal":
        return torch.full((1, 1, targets, sources), lowest, dtype=torch.float16).triu(1)
    return None


def expected(query, key, value, mask, factors, upstream):
    """The same by the formula in float64, for what dropout multiplies the weights by."""
    inputs = [x.detach().double().requires_grad_() for x in (query, key, value)]
    scores = torch.einsum("bhqd,bhkd->bhqk", *inputs[:2]) * 0.3
    weights = (scores if mask is None else scores + mask.double()).softmax(-1) * factors
    output = torch.einsum("bhqk,bhkd->bqhd", weights, inputs[2])
    return output.detach(), *torch.autograd.grad(output, inputs, upstream.double())


def assert_near(found, right):
    for ours, formula in zip(found, right, strict=True):
        assert ours.shape == formula.shape
        assert ours.isfinite().all()
        # A query that sees one key has no gradient but what rounding leaves
        assert float((ours.double() - formula).norm()) <= TOLERANCE * max(float(formula.norm()), 1.0)


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("masked", ["nothing", "padding", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_output_and_gradients_are_those_of_the_formula(interpreter, lengths, masked, dropout):
    query, key, value, upstream = random_rows(*lengths, head_size=32)
    mask = made_mask(masked, *lengths)
    factors = interpreter(draws, [1], 2, 2, *lengths)[0] if dropout else 1.0
    found = interpreter(attend, query, key, value, mask, dropout, upstream)
    assert_near(found, expected(query, key, value, mask, factors, upstream))


@pytest.mark.parametrize("head_size", short.HEAD_SIZES)
def test_heads_of_every_size(interpreter, head_size):
    query, key, value, upstream = random_rows(20, 20, head_size)
    found = interpreter(attend, query, key, value, None, 0.0, upstream)
    assert_near(found, expected(query, key, value, None, 1.0, upstream))


@pytest.mark.parametrize("layout", ["one projection", "contiguous", "entries apart"])
def test_strides_do_not_matter(interpreter, layout):
    query, key, value, upstream = random_rows(7, 7, 16)
    mask = made_mask("causal", 7, 7)
    rows = query, key, value
    if layout == "one projection":  # of query, key and value
        rows = torch.cat(rows, dim=-1).transpose(1, 2).contiguous().transpose(1, 2).chunk(3, dim=-1)
    elif layout == "contiguous":
        rows = tuple(x.contiguous() for x in rows)
    else:
        rows = tuple(torch.stack([x, x], dim=-1)[..., 0] for x in rows)
        upstream = torch.stack([upstream, upstream], dim=-1)[..., 0]
        mask = torch.stack([mask, mask], dim=-1)[..., 0]
    found = interpreter(attend, *rows, mask, 0.0, upstream)
    assert_near(found, expected(*rows, mask, 1.0, upstream))


def test_a_gradient_that_is_one_number_for_all(interpreter):
    query, key, value, upstream = random_rows(7, 9, 16)
    upstream = upstream[0, 0, 0, 0].expand_as(upstream)  # as that of a sum
    found = interpreter(attend, query, key, value, None, 0.0, upstream)
    assert_near(found, expected(query, key, value, None, 1.0, upstream))


def test_compiled_it_is_one_graph_and_computes_the_same(interpreter):
    query, key, value, upstream = random_rows(7, 9, 16)
    mask = made_mask("padding", 7, 9)
    plain, compiled = (interpreter(attend, query, key, value, mask, P, upstream, x) for x in (False, True))
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_row_that_is_masked_as_a_whole_has_equal_weights(interpreter):
    query, key, value, upstream = random_rows(7, 9, 16)
    # What lets no product through: -65504, the lowest of float16, is too near for a sum in float32
    mask = torch.full((2, 1, 7, 9), torch.finfo(torch.float32).min)
    output, *gradients = interpreter(attend, query, key, value, mask, 0.0, upstream)
    assert_near([output], [value.double().mean(2)[:, None].expand_as(output)])
    assert_near(gradients[2:], [(upstream.double().sum(1) / 9)[:, :, None].expand_as(value)])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_row_that_is_masked_as_a_whole_has_no_nan_in_float16(interpreter):
    query, key, value, upstream = random_rows(7, 9, 16)
    mask = torch.full((2, 1, 7, 9), torch.finfo(torch.float16).min, dtype=torch.float16)
    assert all(x.isfinite().all() for x in interpreter(attend, query, key, value, mask, 0.0, upstream))


# --- dropout ------------------------------------------------------------------------------------------


def near_share(found, share):
    """Whether it is within five standard deviations of what independent draws would give."""
    return abs(float(found.double().mean()) - share) < 5 * (share * (1 - share) / found.numel()) ** 0.5


def test_weights_are_dropped_with_probability_p(interpreter):
    (factors,) = interpreter(draws, [0], 8, 4, 20, 20)
    kept = factors > 0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - P)), rtol=TOLERANCE, atol=0)
    assert near_share(kept, 1 - P)
    for dim in range(4):  # of each sentence, head, query and key
        assert all(near_share(part, 1 - P) for part in kept.unbind(dim))


def test_draws_are_independent_of_each_other(interpreter):
    kept = interpreter(draws, [0], 3, 3, 20, 20)[0] > 0
    equal = (1 - P) ** 2 + P**2  # the share in which two draws are the same
    for one, other in itertools.combinations(kept.flatten(0, 1), 2):  # sentences and heads
        assert near_share(one == other, equal)
    assert near_share(kept[:, :, 1:] == kept[:, :, :-1], equal)  # queries
    assert near_share(kept[..., 1:] == kept[..., :-1], equal)  # keys


def test_the_seed_says_what_is_dropped(interpreter):
    first, second, again, other = (x > 0 for x in interpreter(draws, [5, None, 5, 6], 2, 2, 20, 20))
    assert torch.equal(first, again)
    equal = (1 - P) ** 2 + P**2
    assert near_share(first == second, equal) and near_share(first == other, equal)


# --- where it is taken --------------------------------------------------------------------------------


def test_what_the_operators_say_of_their_results_is_so(interpreter):
    query, key, value, upstream = random_rows(7, 9, 16)
    interpreter(check_operators, query, key, value, made_mask("padding", 7, 9), upstream)


@pytest.mark.parametrize(
    ("targets", "sources", "head_size", "dtype", "fits"),
    [
        (128, 128, 64, torch.bfloat16, True),
        (1, 1, 16, torch.float16, True),
        (20, 20, 64, torch.float32, False),
        (129, 20, 64, torch.bfloat16, False),
        (20, 129, 64, torch.bfloat16, False),
        (20, 20, 24, torch.bfloat16, False),
        (20, 20, 8, torch.bfloat16, False),
    ],
)
def test_it_takes_short_rows_of_half_the_precision(targets, sources, head_size, dtype, fits, monkeypatch):
    query, key = (torch.empty(2, 2, length, head_size, dtype=dtype, device="meta") for length in (targets, sources))
    monkeypatch.setattr(short, "triton", object())
    assert short.fits(query, key) == fits
    monkeypatch.setattr(short, "triton", None)
    assert not short.fits(query, key)


TAKEN = {"device": "cuda", "compiled": True, "training": True, "mask": torch.bfloat16, "causal": False, "length": 20}


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"causal": True}, True),  # the mask says the order
        ({"mask": None}, True),
        ({"mask": None, "causal": True}, False),
        ({"mask": torch.bool}, False),
        ({"device": "cpu"}, False),
        ({"compiled": False}, False),
        ({"training": False}, False),
        ({"length": 129}, False),
    ],
    ids=str,
)
def test_compiled_training_passes_on_a_gpu_take_it(change, taken, monkeypatch):
    case = TAKEN | change
    calls = []
    monkeypatch.setattr("admin_hf.attention.sdpa_attention_forward", lambda *_, **__: ("of PyTorch", None))
    monkeypatch.setattr("admin_hf.attention.short_attention", lambda *x: calls.append(x) or short.short_attention(*x))
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: case["compiled"])
    monkeypatch.setattr(short, "triton", object())
    module = torch.nn.Module().train(case["training"])
    module.is_causal = case["causal"]
    length = case["length"]
    with FakeTensorMode():  # tensors of a GPU without data, which need none
        query = torch.empty(2, 3, length, 16, dtype=torch.bfloat16, device=case["device"])
        mask = case["mask"] and torch.empty(2, 1, length, length, dtype=case["mask"], device=case["device"])
        output, weights = admin_attention(module, query, query, query, mask, scaling=0.3, dropout=P)
    assert len(calls) == taken and weights is None
    if taken:
        assert calls[0] == (query, query, query, mask, 0.3, P)
        assert (output.shape, output.dtype) == ((2, length, 3, 16), torch.bfloat16)

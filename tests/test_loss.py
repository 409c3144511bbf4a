import pytest
import torch

import admin_hf.loss
from admin_hf.loss import cross_entropy, linear_cross_entropy


PAD = 10


@pytest.fixture
def problem():
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64)
    weight[PAD] = 0
    weight.requires_grad_()
    bias = torch.randn(1, 11, dtype=torch.float64)
    bias[:, PAD] = -1e4
    labels = torch.randint(0, PAD, (3, 5))
    labels[0, 3:] = labels[2, 1:] = -100
    return hidden, weight, bias, labels


def plain_loss(hidden, weight, bias, labels, smoothing):
    """Target distribution against log-softmax: (1−ε) on the label and ε spread over all entries but padding."""
    log_p = (hidden @ weight.T + bias).log_softmax(-1)[labels != -100]
    targets = torch.full_like(log_p, smoothing / (weight.shape[0] - 1))
    targets[:, PAD] = 0
    targets[torch.arange(len(targets)), labels[labels != -100]] += 1 - smoothing
    return -(targets * log_p).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 40, 2**22])
def test_loss_and_gradients_equal_the_plain_computation(problem, smoothing, chunk, monkeypatch):
    monkeypatch.setattr(admin_hf.loss, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, labels = problem
    expected = plain_loss(hidden, weight, bias, labels, smoothing).mean()
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    loss, _ = linear_cross_entropy(hidden, weight, bias, labels, PAD, smoothing)
    grads = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads[0], expected_grads[0])
    torch.testing.assert_close(grads[1][:PAD], expected_grads[1][:PAD])
    assert not grads[1][PAD].any()


def test_the_loss_of_logits_is_the_same(problem):
    hidden, weight, bias, labels = problem
    expected = linear_cross_entropy(hidden, weight, bias, labels, PAD, 0.1)
    found = cross_entropy(hidden @ weight.T + bias, labels, PAD, 0.1)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, (hidden, weight)) for loss in (found[0], expected[0]))
    torch.testing.assert_close(*gradients)
    divided = cross_entropy(hidden @ weight.T + bias, labels, PAD, 0.1, num_items_in_batch=100)
    torch.testing.assert_close(divided[0] * 100, expected[0] * (labels != -100).sum())


def test_num_items_in_batch_divides_the_summed_loss(problem):
    hidden, weight, bias, labels = problem
    total = plain_loss(hidden, weight, bias, labels, 0.1).sum()
    for items in (100, torch.tensor(100)):
        loss, _ = linear_cross_entropy(hidden, weight, bias, labels, PAD, 0.1, num_items_in_batch=items)
        torch.testing.assert_close(loss, total / 100)


@pytest.mark.parametrize("selects", [True, False])
@pytest.mark.parametrize(
    "dtype, product, scale, rtol", [("float64", "float64", 400, 1e-9), ("float32", "float16", 10, 1e-2)]
)
def test_a_probability_too_small_for_its_dtype_costs_what_it_should(problem, dtype, product, scale, rtol, selects):
    hidden, weight, _, labels = problem
    hidden, bias, product = hidden * scale, torch.zeros(11), getattr(torch, product)
    real = labels[labels != -100].unsqueeze(1)
    p = (hidden @ weight.T).to(product).softmax(-1)[labels != -100].gather(1, real)
    assert (p == 0).any() and (p > 0.01).any()
    inputs = [x.to(getattr(torch, dtype)) for x in (hidden.flatten(0, 1), weight, bias)]
    loss, nll, *_ = admin_hf.loss._loss_and_gradients(
        *inputs, labels.flatten(), 0.1, PAD, product, False, False, selects=selects
    )
    for value, smoothing in ((loss, 0.1), (nll, 0.0)):
        expected = plain_loss(hidden, weight, bias, labels, smoothing).sum()
        torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("only_pad", [True, False])
def test_rows_without_a_label_count_nothing_where_they_are_not_cut_out(problem, only_pad):
    """On a GPU rows are weighted, not selected, and the whole bias is added: both give the same."""
    hidden, weight, bias, labels = problem
    if only_pad:
        bias[:, :PAD] = 0
    arguments = hidden.flatten(0, 1), weight, bias.flatten(), labels.flatten(), 0.1, PAD, torch.float64, True, True
    selected, weighted = (admin_hf.loss._loss_and_gradients(*arguments, selects=selects) for selects in (True, False))
    torch.testing.assert_close(weighted, selected)


def test_the_operator_keeps_pytorchs_rules(problem):
    """What autograd and torch.compile rely on: its schema, its shapes without data, its gradient."""
    hidden, weight, bias, labels = problem
    arguments = hidden.flatten(0, 1), weight, bias.flatten(), labels.flatten(), 0.1, PAD, torch.float64, True, True
    torch.library.opcheck(admin_hf.loss._loss_and_gradients, arguments, {"selects": True})


def test_no_gradients_are_computed_where_none_is_wanted(problem):
    hidden, weight, bias, labels = problem
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, bias, labels, PAD)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_loss(hidden, weight, bias, labels, 0.0).mean())


def test_a_batch_without_targets_has_loss_zero(problem):
    hidden, weight, bias, labels = problem
    loss, _ = linear_cross_entropy(hidden, weight, bias, torch.full_like(labels, -100), PAD, 0.1)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_sums_over_the_vocabulary_are_in_float32_under_autocast(problem):
    """The smoothing term sums all logits of a row, here ten of about 8,000: too much for float16."""
    _, weight, _, labels = problem
    hidden, weight = torch.ones(3, 5, 8), 1000 + 8 * weight.detach().float().round()
    weight[PAD] = 0
    with torch.autocast("cpu", dtype=torch.float16):
        loss, nll = linear_cross_entropy(hidden, weight, torch.zeros(1, 11), labels, PAD, 0.1)
    z = hidden[0, 0] @ weight[:PAD].T
    smoothing = 0.1 * (z[labels[labels != -100]].mean() - z.mean())
    assert z.sum() > torch.finfo(torch.float16).max
    torch.testing.assert_close(loss - nll, smoothing, rtol=1e-4, atol=1e-2)


def test_a_second_derivative_is_refused(problem):
    hidden, weight, bias, labels = problem
    loss, _ = linear_cross_entropy(hidden, weight, bias, labels, PAD, 0.1)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_autocast_computes_products_in_bfloat16_and_sums_in_float32(problem):
    hidden, weight, bias, labels = (t.detach().float() if t.is_floating_point() else t for t in problem)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, bias, labels, PAD, 0.1)
    expected = plain_loss(hidden, weight, bias, labels, 0.1).mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    grads, expected_grads = (torch.autograd.grad(value, (hidden, weight)) for value in (loss, expected))
    for grad, exact in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - exact).norm() / exact.norm() < 2e-2

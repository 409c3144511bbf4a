import pytest
import torch
from conftest import padded_batch, tiny_model
from torch.nn.functional import dropout as stock_dropout

from admin_hf.kernels import dropout, relu_dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_entries_are_dropped_independently_with_probability_p(p, dtype):
    torch.manual_seed(0)
    y = dropout(torch.ones(1000, 1000, dtype=dtype), p, training=True)
    kept = y != 0
    assert y.dtype == dtype
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-4 if p < 0.5 else 0, atol=1e-2)
    # A million draws: five standard deviations are 0.0025 at most; neighbours know nothing of each other
    assert abs(float(kept.float().mean()) - (1 - p)) < 0.0025
    together = float((kept[:, 1:] & kept[:, :-1]).float().mean())
    assert abs(together - (1 - p) ** 2) < 0.0035
    assert abs(float((kept[1:] & kept[:-1]).float().mean()) - (1 - p) ** 2) < 0.0035


def test_the_mask_follows_the_global_generator():
    x = torch.randn(7, 5)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append((dropout(x, 0.5, True), dropout(x, 0.5, True)))
    assert torch.equal(masks[0][0], masks[1][0]) and torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][0], masks[0][1]) and not torch.equal(masks[0][0], masks[2][0])


def test_gradients_pass_where_entries_do():
    torch.manual_seed(0)
    x = torch.randn(9, 11, requires_grad=True, dtype=torch.float64)
    y = dropout(x, 0.3, True)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)
    assert 0 < int((x.grad == 0).sum()) < x.numel()


@pytest.mark.parametrize(("p", "training"), [(0.3, False), (0.0, True), (1.0, True)])
def test_without_a_draw_it_is_pytorchs(p, training):
    x = torch.randn(4, 4)
    assert torch.equal(dropout(x, p, training), stock_dropout(x, p, training))


@pytest.mark.parametrize("function", [dropout, relu_dropout])
def test_the_scale_is_not_rounded_to_bfloat16(function):
    torch.manual_seed(0)
    x = torch.rand(100, 100).bfloat16().requires_grad_()
    y = function(x, 0.1, True)
    y.backward(x.detach())
    scaled = (x.detach().double() * 2**16 / (2**16 - round(0.1 * 2**16))).bfloat16()
    for result in (y.detach(), x.grad):
        assert torch.equal(result, torch.where(result == 0, result, scaled))


def test_recomputed_activations_meet_the_same_mask():
    """Gradient checkpointing runs a layer twice, and must drop the same entries."""
    gradients = []
    for recompute in (False, True):
        model = tiny_model(dropout=0.3, activation_dropout=0.2).train()
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model(**padded_batch()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# --- ReLU and dropout in one ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relu_dropout_is_dropout_of_relu(dtype):
    results = []
    for function in (relu_dropout, lambda x, p, training: dropout(torch.relu(x), p, training)):
        torch.manual_seed(0)
        x = torch.randn(31, 17, dtype=dtype).requires_grad_()
        torch.manual_seed(1)
        y = function(x, 0.3, True)
        y.backward(torch.arange(y.numel(), dtype=dtype).view_as(y) - 100)
        results.append((y.detach(), x.grad))
    (y, grad), (plain_y, plain_grad) = results
    assert 0.25 < float((y > 0).float().mean()) < 0.45  # half of the entries, of which 0.7 are kept
    assert torch.equal(y, plain_y) and torch.equal(grad, plain_grad)


@pytest.mark.parametrize(("p", "training"), [(0.3, False), (0.0, True)])
def test_relu_dropout_without_a_draw_is_relu(p, training):
    x = torch.randn(4, 4)
    assert torch.equal(relu_dropout(x, p, training), torch.relu(x))


def test_relu_dropout_keeps_its_output_alone_for_the_backward_pass():
    y, kept = output_and_kept(relu_dropout)
    assert [tensor.data_ptr() for tensor in kept] == [y.data_ptr()]


def test_dropout_keeps_its_random_bits_alone_for_the_backward_pass():
    y, kept = output_and_kept(dropout)
    assert [(tensor.dtype, tensor.shape) for tensor in kept] == [(torch.int16, y.shape)]


def output_and_kept(function):
    """What the function returns, and the tensors that it keeps for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = function(torch.randn(4, 4, requires_grad=True), 0.3, True)
    return y, kept

"""Residual connections against their equations."""

import pytest
import torch
from torch import nn

from admin_hf.connections import (
    AdminConnection,
    DeepNormConnection,
    FixUpActivation,
    FixUpConnection,
    FixUpOutput,
    PostLNConnection,
    PreLNConnection,
    ReZeroConnection,
    ReZeroPostLNConnection,
)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """By the formula, with γ = 1 and ν = 0."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(2, 3, 8), torch.randn(2, 3, 8)


def test_post_ln_equation(tensors):
    x, f = tensors
    connection = PostLNConnection(8)
    assert connection.branch_input(x) is x
    torch.testing.assert_close(connection(x, f), layer_norm(x + f))


def test_pre_ln_equation(tensors):
    x, f = tensors
    connection = PreLNConnection(8)
    torch.testing.assert_close(connection.branch_input(x), layer_norm(x))
    assert torch.equal(connection(x, f), x + f)


def test_admin_equation(tensors):
    x, f = tensors
    connection = AdminConnection(8)
    assert torch.equal(connection(x, f), PostLNConnection(8)(x, f)), "ω = 1 is Post-LN"
    omega = torch.linspace(0.5, 4, 8)
    connection.omega.data.copy_(omega)
    torch.testing.assert_close(connection(x, f), layer_norm(x * omega + f))


@pytest.mark.parametrize("frozen", [(), ("omega",), ("weight", "bias"), ("bias",)], ids=", ".join)
def test_gradients_of_admin_are_those_of_its_equation(tensors, frozen):
    """In training, where ω has a backward pass of its own."""
    connection = AdminConnection(8).double().train()
    x, f, weights = (tensor.double().requires_grad_() for tensor in (*tensors, torch.randn(2, 3, 8)))
    with torch.no_grad():
        for offset, parameter in enumerate(connection.parameters()):
            parameter.copy_(torch.linspace(0.5, 4, 8) + offset)
    for name in frozen:
        connection.get_parameter(name).requires_grad_(False)
    inputs = [x, f, *(parameter for parameter in connection.parameters() if parameter.requires_grad)]
    equation = layer_norm(x * connection.omega + f) * connection.weight + connection.bias
    expected = torch.autograd.grad((equation * weights).sum(), inputs)
    before = x.detach().clone(), f.detach().clone()
    found = torch.autograd.grad((connection(x, f) * weights).sum(), inputs)
    assert torch.equal(x, before[0]) and torch.equal(f, before[1]), "the tensors that it got are not its own"
    assert len(found) == 5 - len(frozen)
    for gradient, counterpart in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, counterpart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stream, branch", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_gradients_of_admin_in_bfloat16_are_those_outside_training(tensors, stream, branch):
    """With a branch as autocast makes it, and in a model of half precision."""
    connection = AdminConnection(8).to(stream)
    x, f = tensors[0].to(stream).requires_grad_(), tensors[1].to(branch).requires_grad_()
    connection.omega.data.copy_(torch.linspace(0.5, 4, 8))
    inputs, gradients, weights = [x, f, *connection.parameters()], [], torch.randn(2, 3, 8)
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=stream != branch):
            output = connection.train(training)(x, f)
        assert output.dtype == stream
        gradients.append(torch.autograd.grad((output * weights).sum(), inputs))
    for value, found, counterpart in zip(inputs, *gradients, strict=True):
        assert found.dtype == value.dtype
        torch.testing.assert_close(found, counterpart, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("training", [True, False])
def test_a_branch_wider_than_the_shortcut_is_refused_not_rounded(tensors, training):
    x, f = tensors
    with pytest.raises(RuntimeError, match="mixed dtype"):
        AdminConnection(8).bfloat16().train(training)(x.bfloat16(), f)


def test_deepnorm_equation(tensors):
    x, f = tensors
    torch.testing.assert_close(DeepNormConnection(8, alpha=2.5)(x, f), layer_norm(2.5 * x + f))


def test_rezero_equations(tensors):
    x, f = tensors
    plain, post_ln = ReZeroConnection(), ReZeroPostLNConnection(8)
    assert torch.equal(plain(x, f), x), "α = 0 at the start"
    for connection in (plain, post_ln):
        connection.alpha.data.fill_(0.3)
    torch.testing.assert_close(plain(x, f), x + 0.3 * f)
    torch.testing.assert_close(post_ln(x, f), layer_norm(x + 0.3 * f))


def test_fixup_equations(tensors):
    x, f = tensors
    connection, activation, output = FixUpConnection(), FixUpActivation(nn.ReLU()), FixUpOutput()
    for module in (connection, activation, output):
        for value, name in enumerate(module.initial_scales, start=2):
            module.get_parameter(name).data.fill_(value / 4)  # multiplier 1/2 and input bias 3/4, or 1/2 and 3/4
    torch.testing.assert_close(connection.branch_input(x), x + 0.75)
    torch.testing.assert_close(connection(x, f), x + 0.5 * f)
    torch.testing.assert_close(activation(x), (x + 0.5).clamp(min=0) + 0.75)
    torch.testing.assert_close(output(x), 0.5 * (x + 0.75))

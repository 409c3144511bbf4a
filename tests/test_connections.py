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

import pytest
import torch
from conftest import SYSTEM_PAIRS, padded_batch, tiny_config, tiny_model
from torch import nn

from admin_hf import AdminForConditionalGeneration
from admin_hf.residual import (
    SYSTEMS,
    AdminConnection,
    PostLNConnection,
    PreLNConnection,
    ResidualConnection,
    ResidualSystem,
    residual_connections,
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


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_omega_stays_float32_to_the_bit(convert):
    model = tiny_model()
    connections = [m for m in model.modules() if isinstance(m, AdminConnection)]
    for connection in connections:
        connection.omega.data.fill_(1.2345678)
    convert(model)
    assert model.lm_head.weight.dtype in (torch.float16, torch.bfloat16)
    for connection in connections:
        assert connection.weight.dtype == model.lm_head.weight.dtype
        assert connection.omega.dtype == torch.float32
        assert torch.equal(connection.omega, torch.full((16,), 1.2345678))


def test_omega_follows_to_float64_and_to_other_devices():
    model = tiny_model().double()
    assert all(m.omega.dtype == torch.float64 for m in model.modules() if isinstance(m, AdminConnection))
    model = tiny_model().to("meta")
    assert all(m.omega.is_meta for m in model.modules() if isinstance(m, AdminConnection))


@pytest.mark.parametrize(("encoder", "decoder"), SYSTEM_PAIRS)
def test_every_sublayer_has_the_connection_of_its_system_in_execution_order(encoder, decoder):
    model = tiny_model(encoder_residual=encoder, decoder_residual=decoder)
    kinds = {"admin": AdminConnection, "post_ln": PostLNConnection, "pre_ln": PreLNConnection}
    order = []
    for stack, system, per_layer in ((model.model.encoder, encoder, 2), (model.model.decoder, decoder, 3)):
        connections = dict(residual_connections(stack))
        assert len(connections) == 2 * per_layer
        for index, (name, connection) in enumerate(connections.items()):
            # The first sub-layer of a stack has no ω
            assert type(connection) is (PostLNConnection if system == "admin" and index == 0 else kinds[system])
            label = f"{per_layer}.{name}"
            connection.register_forward_pre_hook(lambda *_, label=label: order.append(label))
    model(**padded_batch())
    expected = [f"2.{name}" for name, _ in residual_connections(model.model.encoder)]
    expected += [f"3.{name}" for name, _ in residual_connections(model.model.decoder)]
    assert order == expected


class SharedAlphaConnection(ResidualConnection):
    """x + α f(x), as in ReZero."""

    def __init__(self, alpha: nn.Parameter) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, shortcut, branch):
        return shortcut + self.alpha * branch


class SharedAlpha(ResidualSystem):
    """One α for a whole layer, zero at the start; branches with an initialisation of their own."""

    initializers = ResidualSystem.initializers | {"fc2": nn.init.zeros_}

    def connect(self, layer, layer_idx):
        super().connect(layer, layer_idx)
        alpha = nn.Parameter(torch.zeros(()))
        for name in self.SUBLAYERS[self.stack]:
            setattr(layer, name, SharedAlphaConnection(alpha))


def test_a_system_of_ones_own_needs_no_edit_of_the_model(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "shared_alpha", SharedAlpha)
    model = tiny_model(encoder_residual="shared_alpha", decoder_residual="shared_alpha")
    assert isinstance(model, AdminForConditionalGeneration)
    assert sum("alpha" in name for name, _ in model.named_parameters()) == 4
    assert all(not layer.fc2.weight.any() for layer in model.model.encoder.layers)
    encoder = model.model.encoder
    ids = padded_batch()["input_ids"]
    embedded = encoder.embed_tokens(ids) * encoder.embed_scale + encoder.embed_positions(ids.shape)
    assert torch.equal(encoder(ids).last_hidden_state, embedded), "α = 0 is the identity"


def test_an_unknown_system_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="choose one of admin"):
        tiny_config(encoder_residual="shared_alpha")

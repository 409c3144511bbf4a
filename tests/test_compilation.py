"""A compiled pass computes what an eager one does, also where it is captured once and replayed."""

import itertools

import pytest
import torch
from conftest import PAD, padded_batch, randomize, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

from admin_hf import compilation
from admin_hf.compilation import CompiledPass


SHAPES = [(4, 9, 7), (6, 12, 12), (3, 5, 8)]  # rows, source and target length


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


class Replay:
    """Stands in for a CUDA graph: capturing computes nothing, replaying computes from and into tensors that stay."""

    def __init__(self, compute):
        self.compute = compute
        self.outputs = ()

    def replay(self):
        outputs = self.compute()
        self.outputs = self.outputs or tuple(torch.empty_like(x) for x in outputs)
        for kept, new in zip(self.outputs, outputs, strict=True):
            kept.copy_(new)


def training_model(**changes):
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "label_smoothing": 0.1}
    return randomize(tiny_model(**(rates | changes))).train()


def compiled_pass(model, backend="eager", record=Replay, loss=None, **options):
    def loss_and_nll(**batch):
        outputs = model(**batch)
        return outputs.loss, outputs.nll_loss

    return CompiledPass(model, loss or loss_and_nll, backend=backend, record=record, **options)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def eager(model, *batches):
    """The losses of batches, and the sum of their gradients."""
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    for loss in losses:
        loss.backward()
    found = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    return [loss.detach() for loss in losses], found


SYSTEMS = ["admin", "pre_ln", "rezero", "fixup"]


@pytest.mark.parametrize("system, record", [*((name, Replay) for name in SYSTEMS), ("admin", None)])
def test_losses_and_gradients_are_those_of_an_eager_pass(system, record):
    model = training_model(encoder_residual=system, decoder_residual=system)
    compiled = compiled_pass(model, record=record)
    # Each shape comes as it is, is captured, and is replayed twice, among the others
    for seed, shape in itertools.product(range(4), SHAPES[:2]):
        batch = padded_batch(*shape, seed=seed)
        (expected,), expected_gradients = eager(model, batch)
        loss, nll = compiled(batch)
        torch.testing.assert_close(loss, expected)
        assert not loss.requires_grad and nll < loss * 2
        torch.testing.assert_close(gradients(model), expected_gradients)
        model.zero_grad()


@pytest.mark.slow
def test_compiled_kernels_compute_the_same():
    model = training_model()
    compiled = compiled_pass(model, backend="inductor")
    for seed in range(3):
        batch = padded_batch(seed=seed)
        (expected,), expected_gradients = eager(model, batch)
        torch.testing.assert_close(compiled(batch)[0], expected)
        torch.testing.assert_close(gradients(model), expected_gradients, rtol=1e-4, atol=1e-6)
        model.zero_grad()


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_add_up_until_they_are_forgotten(to_none):
    model = training_model()
    compiled = compiled_pass(model)
    for turn in range(3):
        batches = [padded_batch(seed=3 * turn + i) for i in range(3)]
        _, expected = eager(model, *batches)
        for batch in batches:
            compiled(batch)
        torch.testing.assert_close(gradients(model), expected)
        model.zero_grad(set_to_none=to_none)


def test_gradients_that_were_there_before_are_added_to():
    model = training_model()
    batches = [padded_batch(seed=i) for i in range(2)]
    _, expected = eager(model, *batches)
    model(**batches[0]).loss.backward()
    compiled_pass(model)(batches[1])
    torch.testing.assert_close(gradients(model), expected)


def test_gradients_that_are_kept_add_up_where_others_are_forgotten():
    model = training_model()
    compiled, batch = compiled_pass(model), padded_batch()
    _, once = eager(model, batch)
    compiled(batch)
    model.model.encoder.layers.zero_grad()
    compiled(batch)
    for name, gradient in gradients(model).items():
        times = 1 if "encoder.layers" in name else 2
        torch.testing.assert_close(gradient, times * once[name], msg=name)


def test_a_parameter_in_the_place_of_another_is_trained():
    model = training_model()
    compiled, batch = compiled_pass(model), padded_batch()
    compiled(batch)
    model.zero_grad()
    layer = model.model.encoder.layers[0].fc1
    layer.weight = torch.nn.Parameter(layer.weight.data)
    _, expected = eager(model, batch)
    compiled(batch)
    torch.testing.assert_close(layer.weight.grad, expected["model.encoder.layers.0.fc1.weight"])


@pytest.mark.parametrize("later", [False, True])
def test_a_forward_of_a_layer_of_its_own_is_used_and_stays(later):
    model, batch = training_model(), padded_batch()
    layer = model.model.decoder.layers[1]
    stock = layer.forward

    def halved(*args, **kwargs):
        return stock(*args, **kwargs) / 2

    if later:
        compiled = compiled_pass(model)
        compiled(batch)
    layer.forward = halved
    if not later:
        compiled = compiled_pass(model)
    torch.testing.assert_close(compiled(batch)[0], model(**batch).loss.detach())
    assert layer.forward is halved


def test_numbers_and_none_are_taken_as_the_model_takes_them():
    model, batch = training_model(), padded_batch() | {"num_items_in_batch": 100, "decoder_attention_mask": None}
    torch.testing.assert_close(compiled_pass(model)(batch)[0], model(**batch).loss.detach())


def test_the_backward_pass_starts_from_the_scaled_loss():
    model = training_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    compiled = compiled_pass(model, scale=scaler.scale)
    batch = padded_batch()
    (expected,), expected_gradients = eager(model, batch)
    for scale in (8.0, 8.0, 2.0):  # the last is set after the capture
        scaler.scale(torch.ones(()))
        scaler.update(scale)
        torch.testing.assert_close(compiled(batch)[0], expected)
        scaled = {name: scale * grad for name, grad in expected_gradients.items()}
        torch.testing.assert_close(gradients(model), scaled)
        model.zero_grad()


def test_every_replay_draws_new_dropout_masks():
    model = training_model(dropout=0.3)
    compiled = compiled_pass(model)
    losses = {float(compiled(padded_batch())[0]) for _ in range(5)}
    assert len(losses) == 5


def test_an_optimiser_trains_as_with_eager_passes():
    batches = [padded_batch(*shape, seed=seed) for seed, shape in itertools.product(range(3), SHAPES)]
    trained = []
    for compiles in (False, True):
        model = training_model().double()  # Adam makes steps of the noise of gradients that are 0
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
        compiled = compiled_pass(model)
        for batch in batches:
            if compiles:
                compiled(batch)
            else:
                model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(dict(model.named_parameters()))
    torch.testing.assert_close(*trained)


def test_all_shapes_and_layers_share_a_compilation():
    model = training_model(encoder_layers=4, decoder_layers=4)
    counter = CompileCounterWithBackend("eager")
    compiled = compiled_pass(model, backend=counter, record=None)
    compiled(padded_batch(*SHAPES[0]))
    # The first layer of each stack has no ω in front, so it differs from the others
    assert counter.frame_count == 4
    for rows, source, target in [*SHAPES, (2, 30, 4), (5, 16, 16), (7, 20, 20)]:
        compiled(padded_batch(rows, source, target))
    assert counter.frame_count == 4


def test_a_hook_on_the_model_sees_every_pass():
    model = training_model()
    compiled = compiled_pass(model)
    for seed in range(3):
        compiled(padded_batch(seed=seed))
    model.zero_grad()
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args, batch: seen.append(batch), with_kwargs=True)
    batch = padded_batch(seed=5)
    (expected,), expected_gradients = eager(model, batch)
    assert float(compiled(batch)[0]) == pytest.approx(float(expected))
    torch.testing.assert_close(gradients(model), expected_gradients)
    assert len(seen) == 2 and torch.equal(seen[1]["input_ids"], batch["input_ids"])
    handle.remove()


def test_weights_that_are_frozen_or_replaced_are_captured_anew():
    model = training_model()
    compiled = compiled_pass(model)
    for seed in range(3):
        compiled(padded_batch(seed=seed))
    model.zero_grad()
    model.model.encoder.layers[0].fc1.weight.requires_grad_(False)
    model.lm_head.weight.data = model.lm_head.weight.data.clone() * 2
    batch = padded_batch(seed=4)
    (expected,), expected_gradients = eager(model, batch)
    for _ in range(3):
        torch.testing.assert_close(compiled(batch)[0], expected)
        torch.testing.assert_close(gradients(model), expected_gradients)
        model.zero_grad()


def test_more_shapes_than_are_captured_run_compiled(monkeypatch):
    monkeypatch.setattr(compilation, "MAX_SHAPES", 2)
    captured = []
    model = training_model()
    compiled = compiled_pass(model, record=lambda compute: captured.append(compute) or Replay(compute))
    for _, shape in itertools.product(range(3), SHAPES):
        batch = padded_batch(*shape)
        torch.testing.assert_close(compiled(batch)[0], eager(model, batch)[0][0])
    assert len(captured) == 2


def test_evaluation_and_translation_are_as_before():
    model = training_model(max_position_embeddings=32)
    source = {name: x for name, x in padded_batch().items() if name != "labels"}
    before = model.eval().generate(**source, max_new_tokens=5, num_beams=2)
    compiled = compiled_pass(model.train())
    for _ in range(3):
        compiled(padded_batch())
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model.eval().generate(**source, max_new_tokens=5, num_beams=2), before)


@pytest.mark.parametrize(
    "changes, prepare, reason",
    [
        ({"encoder_layerdrop": 0.1}, lambda model: None, "layerdrop"),
        ({}, lambda model: model.gradient_checkpointing_enable(), "gradient checkpointing"),
    ],
)
def test_what_cannot_be_captured_is_refused(changes, prepare, reason):
    model = training_model(**changes)
    prepare(model)
    with pytest.raises(ValueError, match=reason):
        compiled_pass(model)


def test_a_pass_of_train_mode_is_not_replayed_in_evaluation_mode():
    model, captured = training_model(), []
    compiled = compiled_pass(
        model,
        loss=lambda **batch: (model(**batch).loss,),
        record=lambda compute: captured.append(model.training) or Replay(compute),
    )
    for mode in (True, False):
        for _ in range(3):
            compiled.model.train(mode)
            compiled(padded_batch())
    assert captured == [True, False]


def test_the_padding_row_stays_zero():
    model = training_model()
    compiled = compiled_pass(model)
    for _ in range(3):
        compiled(padded_batch())
    assert not model.get_input_embeddings().weight.grad[PAD].any()

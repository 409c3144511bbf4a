"""Gradient norms against autograd, on tiny models."""

import pytest
import torch
from conftest import SYSTEM_PAIRS, randomize, tiny_config, tiny_model

from admin_hf.analysis import gradient_norms, initialized_model, layer_dependency, random_batch, training_loss
from admin_hf.analysis.gradients import StackGradients
from admin_hf.architecture import DECODER
from admin_hf.residual import residual_connections


@pytest.mark.parametrize("pair", SYSTEM_PAIRS, ids="-".join)
def test_gradient_norms_are_those_of_autograd(pair, batch):
    model = randomize(tiny_model(encoder_residual=pair[0], decoder_residual=pair[1], label_smoothing=0.1))
    outputs = {"encoder": [], "decoder": []}
    handles = [
        connection.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        for stack, seen in outputs.items()
        for _, connection in residual_connections(getattr(model.model, stack))
    ]
    logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    # The smoothed loss over the vocabulary without padding, written out
    log_probabilities = logits[batch["labels"] != -100].log_softmax(-1)[:, :-1]
    targets = batch["labels"][batch["labels"] != -100]
    nll = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    loss = (0.9 * nll - 0.1 * log_probabilities.mean(-1)).mean()
    assert loss.item() == pytest.approx(training_loss(model, batch).item(), rel=1e-4)
    measured = gradient_norms(model, batch)
    for stack, seen in outputs.items():
        norms = [g.norm().item() for g in torch.autograd.grad(loss, seen, retain_graph=True)]
        found = getattr(measured, stack)
        assert found.largest_norm == pytest.approx(max(norms), rel=1e-3)
        assert found.relative_norms == pytest.approx([norm / max(norms) for norm in norms], rel=1e-3)


def test_measuring_gradients_leaves_the_model_as_it_was(batch):
    model = tiny_model().train()
    model.model.encoder.eval()
    model.model.encoder.layers[0].fc1.weight.requires_grad_(False)
    before = [(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    gradient_norms(model, batch)
    layer_dependency(model, batch)
    assert ([(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())


def test_steps_and_verdict_tell_where_gradients_vanish():
    """Each step back through encoder-attention halves the gradient, the others leave it."""
    names = [f"layers.{i}.{sublayer.norm}" for i in range(4) for sublayer in DECODER.sublayers]
    kinds = [sublayer.kind for sublayer in DECODER.sublayers] * 4
    norms = [2.0 ** -(4 - (i + 2) // 3) for i in range(12)]
    stack = StackGradients("post_ln", names, kinds, norms, 3.0)
    assert stack.steps() == pytest.approx({"self-attention": 1, "encoder-attention": 0.5, "feed-forward": 1})
    assert stack.lowest_to_highest() == pytest.approx(1 / 16)
    assert "gradients vanish" in stack.verdict() and "0.50 through encoder-attention" in stack.verdict()
    assert "do not vanish" in StackGradients("pre_ln", names, kinds, norms[::-1], 3.0).verdict()
    assert "no gradient" in StackGradients("fixup", names, kinds, [0.0] * 12, 0.0).verdict()
    assert "Theorem 1" not in stack.verdict(), "which is of encoders"


def test_the_verdict_on_an_encoder_counts_the_steps_of_theorem_1():
    names, kinds = ["a", "b", "c", "d"], ["self-attention", "feed-forward"] * 2
    stack = StackGradients("post_ln", names, kinds, [1.0, 0.8, 0.9, 0.9], 3.0)
    assert stack.factors() == pytest.approx([1.25, 8 / 9, 1])
    assert "(Theorem 1) in 2 of 3 steps, and 0.889 ‖Δx_i‖ at least." in stack.verdict()
    assert StackGradients("pre_ln", names, kinds, [1.0, 0.8, 0.7, 0.6], 3.0).verdict().endswith("in 3 of 3 steps.")


def test_gradients_vanish_in_the_decoder_of_a_fresh_18_layer_post_ln_model_and_nowhere_else():
    """As Figure 3 has it; the verdict is of real models."""
    found = {}
    for system in ("post_ln", "pre_ln", "admin"):
        sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
        sizes |= {"encoder_layers": 18, "decoder_layers": 18}
        config = tiny_config(encoder_residual=system, decoder_residual=system, **sizes)
        found[system] = gradient_norms(initialized_model(config), random_batch(config))
    decoder = found["post_ln"].decoder
    assert "(post_ln): gradients vanish, ‖Δx_1‖ is" in decoder.verdict() and decoder.lowest_to_highest() < 0.06
    steps = decoder.steps()
    assert steps["encoder-attention"] < 0.9 < min(steps["self-attention"], steps["feed-forward"])
    for stack in (found["post_ln"].encoder, *found["pre_ln"].stacks.values(), *found["admin"].stacks.values()):
        assert "gradients do not vanish" in stack.verdict() and stack.lowest_to_highest() > 0.3


def test_a_loss_that_is_not_finite_is_refused(batch):
    model = tiny_model()
    model.model.decoder.layers[0].fc1.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="training loss is nan"):
        gradient_norms(model, batch)
    with pytest.raises(ValueError, match="no labels"):
        gradient_norms(model, {"input_ids": batch["input_ids"]})

import pytest
import torch
from conftest import padded_batch, randomize, tiny_model
from transformers.models.marian.modeling_marian import eager_attention_forward

from admin_hf import CPU_ATTENTION
from admin_hf.attention import SHORTEST_ROW, cpu_attention


def heads(length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random vectors for 3 sentences and 2 heads, strided as a projection's output."""
    return torch.randn(3, length, 2, 8, dtype=dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [1, SHORTEST_ROW - 1, SHORTEST_ROW, SHORTEST_ROW + 5])
def test_without_dropout_it_is_the_plain_formula(keys, masked):
    torch.manual_seed(0)
    query, key, value = heads(6), heads(keys), heads(keys)
    mask = torch.zeros(3, 1, 6, keys, dtype=torch.float64)
    mask[1, :, :, keys // 2 + 1 :] = torch.finfo(torch.float64).min
    arguments = (query, key, value, mask if masked else None)
    module = torch.nn.Module().train()
    ours, weights = cpu_attention(module, *arguments, scaling=0.3)
    plain, _ = eager_attention_forward(module, *arguments, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(ours)
    gradients = (torch.autograd.grad(output, arguments[:3], upstream) for output in (ours, plain))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [8, 40])
def test_weights_are_dropped_with_probability_p(keys):
    torch.manual_seed(0)
    query = torch.zeros(200, 2, 50, 4)  # so that all weights are 1 / keys before dropout
    key = torch.zeros(200, 2, keys, 4)
    value = torch.eye(keys).expand(200, 2, keys, keys)  # so that the output is the weights
    output, _ = cpu_attention(torch.nn.Module().train(), query, key, value, None, scaling=1.0, dropout=0.25)
    kept = output > 0
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1 / keys / 0.75))
    share = kept.float().mean(dim=(0, 1, 2))  # of each key, over 20,000 draws
    assert float((share - 0.75).abs().max()) < 5 * (0.75 * 0.25 / 20_000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_a_model_trains_as_with_eager_attention(dtype):
    losses, gradients = [], []
    for attention in ("eager", CPU_ATTENTION):
        model = randomize(tiny_model(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)).train()
        model.set_attn_implementation(attention)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(**padded_batch()).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < tolerance


def test_a_trained_model_translates_as_with_pytorchs_attention():
    batch = padded_batch(source=20)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["input_ids"].ne(49).long()}
    logits, translations = [], []
    for attention in ("sdpa", CPU_ATTENTION):
        model = randomize(tiny_model())
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits.append(model(**batch | inputs).logits)
        translations.append(model.generate(**inputs, num_beams=3, max_new_tokens=20))
    torch.testing.assert_close(*logits)
    assert torch.equal(*translations)


def test_it_is_not_written_to_a_checkpoint(tmp_path):
    model = tiny_model()
    model.set_attn_implementation(CPU_ATTENTION)
    model.save_pretrained(tmp_path)
    assert CPU_ATTENTION not in (tmp_path / "config.json").read_text()

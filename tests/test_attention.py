import copy

import pytest
import torch
from conftest import CACHE, is_one_graph, learn, padded_batch, randomize, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForSeq2SeqLM
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    create_causal_mask,
    eager_mask,
)
from transformers.models.marian.modeling_marian import eager_attention_forward

from admin_hf import CPU_ATTENTION, AdminForConditionalGeneration, AdminModel, reparameterize
from admin_hf.attention import ADMIN_ATTENTION, SHORTEST_ROW, admin_attention, admin_mask


NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


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
    ours, weights = admin_attention(module, *arguments, scaling=0.3)
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
    output, _ = admin_attention(torch.nn.Module().train(), query, key, value, None, scaling=1.0, dropout=0.25)
    kept = output > 0
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1 / keys / 0.75))
    share = kept.float().mean(dim=(0, 1, 2))  # of each key, over 20,000 draws
    assert float((share - 0.75).abs().max()) < 5 * (0.75 * 0.25 / 20_000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_a_model_trains_as_with_eager_attention(dtype):
    losses, gradients = [], []
    for attention in ("eager", None):
        model = randomize(tiny_model(attn_implementation=attention, **NO_DROPOUT)).train()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(**padded_batch()).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < tolerance


@pytest.fixture(scope="module")
def trained():
    """A model that knows the sentences of a batch by heart, and the batch."""
    batch = padded_batch(source=20)
    return learn(tiny_model(**NO_DROPOUT), batch).eval(), batch


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_a_trained_model_translates_as_with_pytorchs_attention(trained, options):
    model, batch = trained
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits, translations = [], []
    for attention in ("sdpa", ADMIN_ATTENTION):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits.append(model(**batch).logits)
        translations.append(model.generate(**inputs, max_new_tokens=20, **options))
    torch.testing.assert_close(*logits)
    assert torch.equal(*translations)
    assert len(translations[0].unique(dim=0)) > 2, "translations of different sources differ"


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_of_bool_says_what_takes_part(training):
    query, key, value = heads(6), heads(20), heads(20)
    mask = torch.rand(3, 1, 6, 20) < 0.5
    module = torch.nn.Module().train(training)
    ours, _ = admin_attention(module, query, key, value, mask, scaling=0.3)
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    plain, _ = eager_attention_forward(module, query, key, value, added, scaling=0.3)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_mask_on_a_cpu_is_left_out_where_there_is_no_padding():
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5, "mask_function": bidirectional_mask_function}
    full, padded = torch.ones(2, 5, dtype=torch.bool), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert admin_mask(attention_mask=full, allow_is_bidirectional_skip=True, **sizes) is None
    assert admin_mask(attention_mask=padded, allow_is_bidirectional_skip=True, **sizes) is not None


# --- on other devices ---------------------------------------------------------------------------------

# A device without data: whoever looks at an entry there gets an error, where on a GPU it would have to be waited for
META = torch.device("meta")


@pytest.mark.parametrize("mask_function", [bidirectional_mask_function, causal_mask_function])
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_elsewhere_is_made_without_a_look_at_the_padding(mask_function, padding, dtype):
    causal = mask_function is causal_mask_function
    mask = admin_mask(
        batch_size=3,
        q_length=7,
        kv_length=7,
        mask_function=mask_function,
        attention_mask=torch.ones(3, 7, dtype=torch.bool, device=META) if padding else None,
        allow_is_causal_skip=True,
        allow_is_bidirectional_skip=not causal,
        dtype=dtype,
        device=META,
    )
    if not (padding or causal):
        assert mask is None
    else:
        assert (mask.shape, mask.dtype, mask.device) == ((3, 1, 7, 7), dtype, META)


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_elsewhere_looks_at_no_padding(batch, training, monkeypatch):
    monkeypatch.setattr("admin_hf.modeling_admin.cast_once", lambda x: x)  # "meta" has no autocast
    model = AdminModel(tiny_config()).to(META).train(training)
    inputs = {name: batch[name].to(META) for name in ("input_ids", "attention_mask")}
    assert model(**inputs, decoder_input_ids=inputs["input_ids"]).last_hidden_state.device == META
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="meta"):  # as this test would if the models' own looked
        model(**inputs, decoder_input_ids=inputs["input_ids"])


@pytest.mark.parametrize("capturing", [True, False])
def test_a_mask_elsewhere_is_the_same_while_a_graph_is_recorded(capturing, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: capturing)
    config, ones = tiny_config(attn_implementation=ADMIN_ATTENTION), torch.ones(2, 5, device=META)
    mask = create_causal_mask(config, torch.empty(2, 5, 16, device=META), ones, **{CACHE: None})
    assert mask.shape == (2, 1, 5, 5)


@is_one_graph
def test_a_compiled_pass_elsewhere_is_one_graph(batch, monkeypatch):
    monkeypatch.setattr("admin_hf.modeling_admin.cast_once", lambda x: x)
    model = AdminModel(tiny_config()).to(META).train()
    inputs = {name: batch[name].to(META) for name in ("input_ids", "attention_mask")}
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(**inputs, decoder_input_ids=inputs["input_ids"], use_cache=False)
    assert (explained.graph_count, explained.break_reasons) == (1, [])


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets masks of any device be made on the CPU, where they can be read."""
    monkeypatch.setattr("admin_hf.attention.eager_mask", lambda device, **options: eager_mask(**options))


def test_what_is_masked_elsewhere_is_what_padding_and_order_say(on_cpu):
    padding = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    sizes = {"batch_size": 3, "q_length": 4, "kv_length": 4, "mask_function": causal_mask_function}
    mask = admin_mask(attention_mask=padding, dtype=torch.bfloat16, device="cuda", **sizes)
    taken = padding[:, None, None, :] & torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(mask == 0, taken)
    assert torch.equal(mask == torch.finfo(torch.bfloat16).min, ~taken)
    weights = torch.nn.functional.scaled_dot_product_attention(
        *torch.zeros(2, 3, 1, 4, 4, dtype=torch.bfloat16), torch.eye(4, dtype=torch.bfloat16).expand(3, 1, 4, 4), mask
    )
    torch.testing.assert_close(weights[2], torch.full((1, 4, 4), 0.25, dtype=torch.bfloat16))  # of nothing but padding


@pytest.mark.parametrize("enabled", [True, False])
def test_a_mask_elsewhere_has_the_dtype_of_the_products(on_cpu, enabled):
    sizes = {"batch_size": 1, "q_length": 2, "kv_length": 2}
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)  # without a warning that there is no GPU, as torch.autocast would give
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        mask = admin_mask(device="cuda", dtype=torch.float32, **sizes)
        assert mask.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert admin_mask(device="cpu", dtype=torch.float32, **sizes).dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize(
    ("device", "training", "compiled", "fused"),
    [("cpu", True, False, False), ("cpu", False, False, True), ("cpu", True, True, True), ("meta", True, False, True)],
)
def test_the_formula_is_taken_for_training_on_a_cpu_alone(device, training, compiled, fused, monkeypatch):
    calls = []
    monkeypatch.setattr("admin_hf.attention.sdpa_attention_forward", lambda *arguments, **_: calls.append(arguments))
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiled)
    query = torch.zeros(1, 1, 2, 4, device=device)
    module = torch.nn.Module().train(training)
    admin_attention(module, query, query, query, None, scaling=0.5, dropout=0.25)
    assert calls == ([(module, query, query, query, None, 0.25, 0.5)] if fused else [])


@pytest.mark.parametrize("masked", [True, False])
def test_without_a_mask_the_module_says_whether_the_order_counts(masked):
    module = torch.nn.Module().eval()
    module.is_causal = True
    query, key, value = heads(5), heads(5), heads(5)
    padding = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    order = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    ours, _ = admin_attention(module, query, key, value, padding if masked else None, scaling=0.3)
    plain, _ = eager_attention_forward(module, query, key, value, padding if masked else order, scaling=0.3)
    torch.testing.assert_close(ours, plain)


# --- the default --------------------------------------------------------------------------------------


def attention_of(model) -> str:
    return model.config._attn_implementation


@pytest.mark.parametrize("model_class", [AdminForConditionalGeneration, AdminModel])
@pytest.mark.parametrize("asked", [None, "sdpa", "eager", CPU_ATTENTION])
def test_a_model_has_it_unless_another_one_is_asked_for(model_class, asked, tmp_path):
    options = {} if asked is None else {"attn_implementation": asked}
    expected = asked or ADMIN_ATTENTION
    new = model_class(tiny_config(**options))
    assert attention_of(new) == attention_of(copy.deepcopy(new)) == expected
    new.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    assert attention_of(model_class.from_pretrained(tmp_path, **options)) == expected
    auto = AutoModelForSeq2SeqLM if model_class is AdminForConditionalGeneration else AutoModel
    assert attention_of(auto.from_pretrained(tmp_path, **options)) == expected
    assert attention_of(auto.from_config(tiny_config(), **options)) == expected
    new.set_attn_implementation("eager")
    assert attention_of(new) == "eager"
    with pytest.raises(ValueError, match='attn_implementation="typo"'):
        model_class(tiny_config(attn_implementation="typo"))


def test_the_folded_model_has_the_attention_of_stock_models():
    assert attention_of(reparameterize(randomize(tiny_model()))) == "sdpa"


def test_weights_are_returned_by_eager_attention_alone(batch):
    assert tiny_model(attn_implementation="eager")(**batch, output_attentions=True).encoder_attentions[0] is not None
    with pytest.raises(ValueError, match="Please set it to 'eager'"):
        tiny_model().config.output_attentions = True

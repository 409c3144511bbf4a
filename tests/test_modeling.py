import copy
import logging

import pytest
import torch
from conftest import (
    CACHE,
    PAD,
    SYSTEM_PAIRS,
    VOCAB_SIZE,
    is_one_graph,
    padded_batch,
    randomize,
    tiny_config,
    tiny_model,
    without_dropout,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DataCollatorForSeq2Seq, MarianConfig, MarianModel, MarianMTModel
from transformers.trainer_pt_utils import LabelSmoother

from admin_hf import CPU_ATTENTION, AdminForConditionalGeneration, AdminModel
from admin_hf.residual import AdminConnection


systems = pytest.mark.parametrize(("encoder", "decoder"), SYSTEM_PAIRS)


def stock_marian(**changes) -> MarianMTModel:
    config = tiny_config().to_dict()
    for name in ("model_type", "encoder_residual", "decoder_residual", "label_smoothing", "dtype", "architectures"):
        config.pop(name, None)
    torch.manual_seed(0)
    return randomize(MarianMTModel(MarianConfig(**{**config, **changes}))).eval()


# --- beside stock Marian ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale_embedding", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_stock_marian_folder_gives_marians_logits_bit_for_bit(tmp_path, caplog, batch, scale_embedding, attention):
    marian = stock_marian(scale_embedding=scale_embedding, attn_implementation=attention)
    marian.save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        model = AdminForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    assert [record.levelname for record in caplog.records] == ["WARNING"], caplog.text
    assert "plain Post-LN" in caplog.text
    assert model.omega_initialized
    assert all(bool((m.omega == 1).all()) for m in model.modules() if isinstance(m, AdminConnection))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, marian(**batch).logits)
    generate = {"max_new_tokens": 12, "num_beams": 3, "input_ids": batch["input_ids"]}
    assert torch.equal(model.generate(**generate), marian.generate(**generate))


def test_the_bare_model_loads_a_stock_marian_too(tmp_path, batch):
    stock_marian().model.save_pretrained(tmp_path)
    ids = {"input_ids": batch["input_ids"], "decoder_input_ids": batch["input_ids"]}
    with torch.no_grad():
        stock = MarianModel.from_pretrained(tmp_path)(**ids).last_hidden_state
        assert torch.equal(AdminModel.from_pretrained(tmp_path)(**ids).last_hidden_state, stock)


@pytest.mark.parametrize("attention", ["sdpa", CPU_ATTENTION])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_training_loss_and_gradients_equal_marians(tmp_path, batch, dtype, tolerance, attention):
    marian = without_dropout(stock_marian().to(dtype))
    marian.save_pretrained(tmp_path)
    model = AdminForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype, attn_implementation=attention)
    # Marian has no bias against padding, which enters its softmax and ours alike
    marian.train(), without_dropout(model).train()
    loss, stock = model(**batch).loss, marian(**batch).loss
    torch.testing.assert_close(loss, stock, rtol=tolerance, atol=0)
    loss.backward(), stock.backward()
    stock_grads = dict(marian.named_parameters())
    stock_grads["model.shared.weight"].grad[PAD] = 0  # the padding row is ours to keep at zero
    pairs = [
        (p.grad, stock_grads[n].grad) for n, p in model.named_parameters() if n in stock_grads and p.grad is not None
    ]
    assert len(pairs) > 50
    difference, norm = (
        sum(g.square().sum() for g in grads).sqrt()
        for grads in ([ours - theirs for ours, theirs in pairs], [theirs for _, theirs in pairs])
    )
    assert difference / norm < tolerance


# --- what the library's common tests do not see -----------------------------------------------------


@systems
def test_decoding_with_cache_equals_decoding_without(batch, encoder, decoder):
    model = randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder))
    source = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    target = padded_batch(seed=8)["labels"].clamp(min=2)
    with torch.no_grad():
        whole = model(**source, decoder_input_ids=target).logits
        past, steps = None, []
        for position in range(target.shape[1]):
            step = model(
                **source, decoder_input_ids=target[:, position : position + 1], **{CACHE: past}, use_cache=True
            )
            past = step[CACHE]
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)


@systems
@pytest.mark.parametrize("beams", [1, 4])
def test_generation_with_cache_equals_generation_without(batch, encoder, decoder, beams):
    model = randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder))
    options = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 10}
    cached = model.generate(**options, num_beams=beams, use_cache=True)
    assert torch.equal(cached, model.generate(**options, num_beams=beams, use_cache=False))
    assert not (cached[:, 1:] == PAD).logical_and(cached[:, :-1] != 0)[:, 1:].any() or beams, (
        "pad follows the end only"
    )


@systems
def test_padding_changes_nothing(encoder, decoder):
    model = randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder))
    batch = padded_batch()
    with torch.no_grad():
        together = model(**batch)
        for row in range(len(batch["input_ids"])):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].unsqueeze(0)
            labels = batch["labels"][row][batch["labels"][row] != -100].unsqueeze(0)
            alone = model(input_ids=ids, labels=labels).logits[0]
            torch.testing.assert_close(together.logits[row, : labels.shape[1]], alone, rtol=1e-5, atol=1e-5)


@systems
def test_labels_are_the_decoder_input_shifted_by_one(batch, encoder, decoder):
    model = randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder))
    labels = batch["labels"]
    shifted = torch.full_like(labels, PAD)  # the decoder starts from padding
    shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, PAD)
    source = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    for mode in (model.eval(), without_dropout(model).train()):
        by_labels, explicit = mode(**batch), mode(**source, labels=labels, decoder_input_ids=shifted)
        assert torch.equal(by_labels.loss, explicit.loss)
    model.eval()
    logits = model(**source, decoder_input_ids=shifted).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(**batch).loss, expected)
    torch.testing.assert_close(model.train()(**batch).loss, expected)


@systems
def test_the_last_hidden_state_is_what_follows_the_stack(batch, encoder, decoder):
    model = randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder, attn_implementation="eager"))
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(outputs.encoder_hidden_states) == len(outputs.decoder_hidden_states) == 3
    assert torch.equal(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state)
    assert len(outputs.cross_attentions) == len(outputs.decoder_attentions) == len(outputs.encoder_attentions) == 2
    logits = model.lm_head(outputs.decoder_hidden_states[-1]) + model.final_logits_bias
    torch.testing.assert_close(outputs.logits, logits)


@pytest.mark.parametrize("scale_embedding", [True, False])
def test_embeddings_given_mean_the_same_as_ids(batch, scale_embedding):
    model = randomize(tiny_model(scale_embedding=scale_embedding))
    ids, target = batch["input_ids"], batch["labels"].clamp(min=2)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        by_ids = model(input_ids=ids, decoder_input_ids=target).logits
        by_embeds = model(inputs_embeds=embed(ids), decoder_inputs_embeds=embed(target)).logits
    assert torch.equal(by_ids, by_embeds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@systems
def test_half_precision_weights_generate_and_keep_scales_in_float32(tmp_path, batch, encoder, decoder, dtype):
    model = randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder))
    model.save_pretrained(tmp_path)
    half = AdminForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype, device_map="cpu")
    scales = {scale for module in model.modules() for scale in getattr(module, "initial_scales", {})}
    for name, parameter in half.named_parameters():
        is_scale = name.rpartition(".")[2] in scales
        assert parameter.dtype == (torch.float32 if is_scale else dtype), name
        if is_scale:
            assert torch.equal(parameter, model.get_parameter(name))
    logits, exact = half(**batch).logits.float()[..., :PAD], model(**batch).logits[..., :PAD]
    assert (logits - exact).norm() / exact.norm() < 0.05
    half.generate(batch["input_ids"], max_new_tokens=5, num_beams=2)
    half.train()(**batch).loss.backward()


def test_gradient_checkpointing_changes_no_gradient(batch):
    grads = []
    for checkpointing in (False, True):
        model = without_dropout(randomize(tiny_model())).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], msg=name)


@is_one_graph
@pytest.mark.parametrize(("encoder", "decoder"), [("admin", "admin"), ("rezero", "fixup")])
def test_compiled_training_equals_eager_and_is_not_compiled_for_every_shape(batch, encoder, decoder):
    systems = {"encoder_residual": encoder, "decoder_residual": decoder}
    model = without_dropout(randomize(tiny_model(encoder_layers=1, decoder_layers=1, **systems))).train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for length in range(3, 9):
        shorter = batch | {"labels": batch["labels"][:, :length]}
        torch.testing.assert_close(compiled(**shorter).loss, model(**shorter).loss)
    assert counter.frame_count <= 4


@is_one_graph
@pytest.mark.parametrize("attention", ["sdpa", CPU_ATTENTION])
@pytest.mark.parametrize(("encoder", "decoder"), [("admin", "admin"), ("fixup", "deepnorm")])
def test_a_compiled_training_pass_is_one_graph(batch, encoder, decoder, attention):
    model = tiny_model(encoder_residual=encoder, decoder_residual=decoder, dropout=0.1, label_smoothing=0.1).train()
    model.set_attn_implementation(attention)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(**batch, num_items_in_batch=torch.tensor(20))
    assert (explained.graph_count, explained.break_reasons) == (1, [])


# --- padding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"share_encoder_decoder_embeddings": False},
        {"decoder_residual": "fixup"},
    ],
)
@pytest.mark.parametrize("smoother", ["none", "ours", "trainer's"])
def test_the_padding_embedding_stays_exactly_zero(batch, changes, smoother):
    model = tiny_model(label_smoothing=0.1 if smoother == "ours" else 0.0, **changes).train()
    rows = [w for name, w in model.named_parameters() if w.shape == (VOCAB_SIZE, 16)]
    assert rows
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01)
    for _ in range(3):
        if smoother == "trainer's":
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
            loss = LabelSmoother(epsilon=0.1)(model(**inputs), batch["labels"].clone())
        else:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for weight in rows:
        assert not weight[PAD].any()
        assert weight[:PAD].any(dim=1).all()


def test_padding_is_never_predicted(batch):
    model = randomize(tiny_model())
    logits = model(**batch).logits
    assert (logits[..., PAD] < logits[..., :PAD].amin(-1) - 1000).all()


# --- the loss in a Trainer --------------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_whole_batch(batch):
    model = without_dropout(randomize(tiny_model(label_smoothing=0.1))).double().train()
    targets = int(batch["labels"].ne(-100).sum())
    model(**batch).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row in range(4):
        part = {name: value[row : row + 1] for name, value in batch.items()}
        model(**part, num_items_in_batch=torch.tensor(targets)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("train", [True, False])
def test_the_loss_is_divided_by_num_items_in_batch_in_evaluation_too(batch, train):
    """Trainer multiplies it with the number of processes in both modes."""
    model = without_dropout(randomize(tiny_model())).train(train)
    targets = int(batch["labels"].ne(-100).sum())
    halved = model(**batch, num_items_in_batch=torch.tensor(2 * targets)).loss
    torch.testing.assert_close(2 * halved, model(**batch).loss)


def test_training_builds_no_logits_and_smooths_only_then(batch):
    model = without_dropout(randomize(tiny_model(label_smoothing=0.2)))
    assert model.train()(**batch).logits is None
    smoothed, evaluated = model.train()(**batch).loss, model.eval()(**batch).loss
    model.config.label_smoothing = 0.0
    torch.testing.assert_close(model.train()(**batch).loss, evaluated)
    assert smoothed != evaluated
    assert model.eval()(**batch).logits.shape == (4, 7, VOCAB_SIZE)


class Adapted(nn.Linear):
    """An output layer as adapters make it: W + BA, of which `weight` is only a part."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.down = nn.Parameter(torch.randn(2, layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


def test_an_adapter_on_the_output_layer_takes_part_in_training(batch):
    model = without_dropout(tiny_model(label_smoothing=0.1, tie_word_embeddings=False)).train()
    model.lm_head = Adapted(model.lm_head)
    adapted = model(**batch).loss
    gradients = torch.autograd.grad(adapted, (model.lm_head.down, model.lm_head.up))
    assert all(gradient.any() for gradient in gradients)
    merged = nn.Linear(16, VOCAB_SIZE, bias=False)
    merged.weight.data = model.lm_head.weight + model.lm_head.up @ model.lm_head.down
    model.lm_head = merged
    torch.testing.assert_close(model(**batch).loss, adapted)


# --- saving and loading -----------------------------------------------------------------------------


@systems
def test_a_saved_model_loads_whole_and_equal(tmp_path, batch, encoder, decoder):
    model = randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder))
    model.save_pretrained(tmp_path)
    loaded, info = AdminForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not loaded.model.encoder.embed_positions.weight.requires_grad, "as in a new model"


def test_initialised_is_a_property_of_the_weights(tmp_path):
    model = tiny_model()
    assert not model.omega_initialized
    assert not copy.deepcopy(model).omega_initialized
    model.save_pretrained(tmp_path)
    assert AdminForConditionalGeneration.from_pretrained(tmp_path).omega_initialized
    assert tiny_model(encoder_residual="pre_ln", decoder_residual="post_ln").omega_initialized, "there is none"
    fresh, trained = tiny_model(), randomize(tiny_model())
    fresh.load_state_dict(model.state_dict())
    assert not fresh.omega_initialized, "as FSDP loads a model that is not profiled yet"
    fresh.load_state_dict(trained.state_dict())
    assert fresh.omega_initialized


def test_missing_weights_beside_omega_are_not_taken_for_post_ln(tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    dropped = [name for name in weights if name.endswith(("omega", "fc1.weight"))]
    save_file({n: w for n, w in weights.items() if n not in dropped}, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = AdminForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(dropped)
    assert "plain Post-LN" not in caplog.text


def test_resized_embeddings_train_and_generate(batch):
    model = tiny_model()
    model.resize_token_embeddings(VOCAB_SIZE + 6)
    assert model.config.pad_token_id == PAD, "padding keeps its id"
    grown = batch | {"labels": batch["labels"].masked_fill(batch["labels"] == 5, VOCAB_SIZE + 5)}
    model.train()(**grown).loss.backward()
    assert not model.model.shared.weight.grad[PAD].any()
    model.eval().generate(batch["input_ids"], max_new_tokens=4)
    model.resize_token_embeddings(VOCAB_SIZE)
    assert model(**batch).logits.shape[-1] == VOCAB_SIZE
    model.resize_token_embeddings(VOCAB_SIZE + 1, pad_to_multiple_of=64)
    assert model(**batch).logits.shape[-1] == 64


# --- a user's mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"input_ids": torch.tensor([[2, VOCAB_SIZE]])},
            rf"input_ids contains the id {VOCAB_SIZE}.*0 to {VOCAB_SIZE - 1}",
        ),
        ({"input_ids": torch.tensor([[-1, 3]])}, "input_ids contains the id -1"),
        ({"decoder_input_ids": torch.tensor([[2, 777]])}, "decoder_input_ids contains the id 777"),
        ({"labels": torch.tensor([[3, 51]])}, "labels contains the id 51"),
        ({"labels": torch.tensor([[3, -1]])}, "labels contains the id -1"),
        ({"input_ids": torch.full((1, 65), 3)}, "input has 65 tokens, but max_position_embeddings is 64"),
        ({"decoder_input_ids": torch.full((1, 65), 3)}, "decoder_input has 65 tokens"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_a_wrong_input_is_a_value_error_that_names_it(inputs, message, train):
    model = tiny_model().train(train)
    ids = torch.tensor([[3, 4]])
    defaults = {"input_ids": ids} | ({} if "labels" in inputs else {"decoder_input_ids": ids})
    with pytest.raises(ValueError, match=message):
        model(**defaults | inputs)


def test_decoding_past_the_last_position_is_refused_with_cache_too():
    model = tiny_model()
    ids = torch.full((1, 64), 3)
    outputs = model(input_ids=ids, decoder_input_ids=ids, use_cache=True)
    with pytest.raises(ValueError, match="decoder_input has 65 tokens"):
        model(input_ids=ids, decoder_input_ids=ids[:, :1], **{CACHE: outputs[CACHE]})


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_past_the_last_position_is_refused_with_every_cache(cache):
    ids = torch.full((1, 5), 3)
    with pytest.raises(ValueError, match="decoder_input has 65 tokens, but max_position_embeddings is 64"):
        tiny_model().generate(ids, max_length=70, eos_token_id=None, cache_implementation=cache)


def test_the_collator_of_transformers_shifts_labels_through_the_model():
    class Tokenizer:
        padding_side, pad_token_id = "right", PAD

        def pad(self, features, **kwargs):
            return {name: torch.tensor([f[name] for f in features]) for name in features[0]}

    model = tiny_model()
    collator = DataCollatorForSeq2Seq(Tokenizer(), model=model)
    features = collator([{"input_ids": [3, 0], "labels": [4, 5, 0]}, {"input_ids": [6, 0], "labels": [7, 0]}])
    assert features["decoder_input_ids"].tolist() == [[PAD, 4, 5], [PAD, 7, 0]]

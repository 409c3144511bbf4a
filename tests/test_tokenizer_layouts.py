"""Special tokens where a tokenizer has them: from training by a plain Trainer to Transformers and CTranslate2."""

import copy
import json

import ctranslate2
import pytest
import torch
from ctranslate2.converters import TransformersConverter
from datasets import Dataset
from tiny_runs import run as script
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.trainer_utils import HPSearchBackend

from admin_hf import (
    AdminConfig,
    AdminForConditionalGeneration,
    AdminProfilingCallback,
    AdminPublishingCallback,
    check_tokenizer,
    profile_residuals,
    reparameterize,
)
from admin_hf.__main__ import main


SHAPE = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SHAPE |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16, "dropout": 0.0}
SHAPE |= {"attention_dropout": 0.0, "activation_dropout": 0.0}

WORDS = [f"w{i}" for i in range(20)]

# Where the special tokens of tokenizers in use are: before the words, and behind them
LAYOUTS = {
    "marian": (["</s>", "<unk>"], ["<pad>"]),
    "t5": (["<pad>", "</s>", "<unk>"], ["<extra_id_1>", "<extra_id_0>"]),
    "bart": (["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"]),
    "fairseq": (["<s>", "<pad>", "</s>", "<unk>"], []),
    "[PAD] last": (["</s>", "<unk>"], ["[PAD]"]),
}
ROLES = {"<s>": "bos_token", "<pad>": "pad_token", "[PAD]": "pad_token", "</s>": "eos_token", "<unk>": "unk_token"}

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def make_tokenizer(first: list[str], last: list[str], encloses: bool = False, words=WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*first, *words, *last])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "<s> $A </s>" if encloses else "$A </s>"
    ends = [(token, vocabulary[token]) for token in ("<s>", "</s>") if token in vocabulary]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    roles = {ROLES[token]: token for token in vocabulary if token in ROLES}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def tokenizer_of(layout: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(*LAYOUTS[layout], encloses=layout == "bart")


def model_of(config: AdminConfig, seed: int = 0) -> AdminForConditionalGeneration:
    torch.manual_seed(seed)
    return AdminForConditionalGeneration(config)


def pairs(tokenizer) -> tuple[list[str], list[str], Dataset]:
    """Each source is told by its first word from the others, and translated by another word at each place."""
    sources = [" ".join(WORDS[i + k] for k in range(1 + i % 4)) for i in range(16)]
    targets = [" ".join(WORDS[19 - i - k] for k in range(1 + i % 4)) for i in range(16)]
    rows = [
        tokenizer(s, return_token_type_ids=False) | {"labels": tokenizer(t)["input_ids"]}
        for s, t in zip(sources, targets, strict=True)
    ]
    return sources, targets, Dataset.from_list([dict(row) for row in rows])


def trainer_of(model, tokenizer, folder, callbacks=None, collator=None, dataset=None, **changes) -> Seq2SeqTrainer:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_strategy": "no"}
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder), report_to=[], disable_tqdm=True, use_cpu=True, seed=3, **defaults | changes
    )
    return Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=pairs(tokenizer)[2] if dataset is None else dataset,
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        callbacks=[AdminProfilingCallback(verbose=False)] if callbacks is None else callbacks,
    )


# --- from training to CTranslate2 -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "vocab_size"), [*((layout, None) for layout in LAYOUTS), ("marian", 64), ("bart", 64)]
)
def test_from_training_to_stock_transformers_and_ctranslate2(tmp_path, layout, vocab_size, caplog):
    tokenizer = tokenizer_of(layout)
    config = AdminConfig.for_tokenizer(tokenizer, **SHAPE | ({} if vocab_size is None else {"vocab_size": vocab_size}))
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert config.decoder_start_token_id == tokenizer.pad_token_id
    model = model_of(config)
    run = trainer_of(
        model, tokenizer, tmp_path / "run", max_steps=120, learning_rate=1e-2, lr_scheduler_type="constant"
    )
    run.train()
    assert model.final_logits_bias.argmin() == tokenizer.pad_token_id
    assert "aligned" not in caplog.text and "not made for" not in caplog.text

    reparameterize(model, tokenizer=tokenizer).save_pretrained(tmp_path / "vanilla")
    tokenizer.save_pretrained(tmp_path / "vanilla")
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "vanilla").eval()
    assert type(stock) is MarianMTModel
    sources, targets, _ = pairs(tokenizer)
    batch = tokenizer(sources, padding=True, return_tensors="pt", return_token_type_ids=False)
    ours, theirs = (m.eval().generate(**batch, num_beams=1, max_length=12) for m in (model, stock))
    assert torch.equal(ours, theirs)
    assert tokenizer.batch_decode(theirs, skip_special_tokens=True) == targets, "learnt, and no stray word anywhere"

    TransformersConverter(str(tmp_path / "vanilla")).convert(str(tmp_path / "ct2"))
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), device="cpu", intra_threads=1)
    tokens = [tokenizer.convert_ids_to_tokens(tokenizer(source)["input_ids"]) for source in sources]
    results = translator.translate_batch(tokens, beam_size=1, max_decoding_length=11)
    ids = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == targets


@layouts
def test_the_first_loss_is_that_of_explicit_ids(layout):
    """The report: 9.38 instead of 6.10, for the loss counts a real word that is banned."""
    tokenizer = tokenizer_of(layout)
    explicit = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    configs = (
        AdminConfig.for_tokenizer(tokenizer, **SHAPE),
        AdminConfig(vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id, **explicit, **SHAPE),
    )
    assert configs[0].to_dict() == configs[1].to_dict()
    features = [dict(row) for row in pairs(tokenizer)[2]]
    for config in configs:
        model = model_of(config)
        batch = DataCollatorForSeq2Seq(tokenizer, model=model)(features)
        assert float(model(**batch).loss.detach()) < 8, "a uniform guess has 3.2"


@pytest.mark.parametrize("layout", ["t5", "bart"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, layout):
    tokenizer, states = tokenizer_of(layout), []
    for name, options in (
        ("whole", {}),
        ("resumed", {"resume_from_checkpoint": str(tmp_path / "whole/checkpoint-2")}),
    ):
        model = model_of(AdminConfig.for_tokenizer(tokenizer, **SHAPE))
        trainer_of(model, tokenizer, tmp_path / name, save_strategy="steps", save_steps=2).train(**options)
        assert model.is_profiled
        states.append((model.state_dict(), model.config.to_dict(), model.generation_config.to_dict()))
    (weights, *settings), (others, *same) = states
    assert settings == same
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


def test_what_is_trained_alone_is_exported(tmp_path):
    """A rounded vocabulary is trimmed to the tokenizer, and exported again it is the same."""
    tokenizer = tokenizer_of("t5")
    model = model_of(AdminConfig.for_tokenizer(tokenizer, vocab_size=64, **SHAPE)).eval()
    stock = reparameterize(model, tokenizer=tokenizer)
    assert stock.config.vocab_size == stock.config.decoder_vocab_size == len(tokenizer) + 1
    assert stock.final_logits_bias[0].tolist().count(-1e4) == 2 and not stock.lm_head.weight[-1].any()
    ids = {"input_ids": torch.tensor([[5, 6, 1]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    torch.testing.assert_close(stock(**ids).logits[..., :-1], model(**ids).logits[..., : len(tokenizer)])
    stock.save_pretrained(tmp_path)
    again = AdminForConditionalGeneration.from_pretrained(tmp_path)
    check_tokenizer(again, tokenizer)
    assert reparameterize(again, tokenizer=tokenizer).config.vocab_size == len(tokenizer) + 1
    assert reparameterize(model).config.vocab_size == 64, "as it is, where no tokenizer says more"


@pytest.mark.parametrize("layout", ["marian", "bart"])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"share_encoder_decoder_embeddings": False},
        {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False},
        {"encoder_residual": "pre_ln", "decoder_residual": "pre_ln"},
    ],
)
def test_every_kind_of_embedding_is_fitted(tmp_path, layout, changes):
    """Whatever is tied or shared, all entries keep their logits, also when the result is loaded again."""
    tokenizer = tokenizer_of(layout)
    model = model_of(AdminConfig.for_tokenizer(tokenizer, vocab_size=64, **SHAPE | changes)).eval()
    stock = reparameterize(model, tokenizer=tokenizer)
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[tokenizer.pad_token_id, 7]])}
    entries, expected = len(tokenizer), model(**ids).logits
    assert {stock.config.vocab_size, loaded.config.vocab_size} <= {entries, entries + 1}
    assert loaded.final_logits_bias.shape == (1, loaded.config.vocab_size)
    for fitted in (stock, loaded):
        torch.testing.assert_close(fitted(**ids).logits[..., :entries], expected[..., :entries])
    assert (loaded.config.pad_token_id, loaded.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert model.config.vocab_size == 64, "the model that was trained stays as it is"


def test_targets_that_never_end_are_warned_of(tmp_path, caplog):
    tokenizer = tokenizer_of("bart")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    model = model_of(AdminConfig.for_tokenizer(tokenizer, **SHAPE))
    trainer_of(model, tokenizer, tmp_path, max_steps=1).train()
    assert "contains the end-of-sentence token 2, so the model cannot learn to stop" in caplog.text


def test_what_a_trainer_publishes_is_fitted_to_its_tokenizer(tmp_path):
    tokenizer = tokenizer_of("t5")
    model = model_of(AdminConfig.for_tokenizer(tokenizer, vocab_size=64, **SHAPE))
    trainer_of(model, tokenizer, tmp_path / "run", [AdminPublishingCallback()]).save_model()
    assert MarianConfig.from_pretrained(tmp_path / "run").vocab_size == len(tokenizer) + 1
    TransformersConverter(str(tmp_path / "run")).convert(str(tmp_path / "ct2"))


def test_the_command_fits_the_vocabulary_and_warns_of_ids_that_disagree(tmp_path, capsys):
    tokenizer = tokenizer_of("bart")
    configs = {"right": AdminConfig.for_tokenizer(tokenizer, **SHAPE), "wrong": AdminConfig(vocab_size=25, **SHAPE)}
    for name, config in configs.items():
        model_of(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        assert main(["export", str(tmp_path / name), str(tmp_path / f"{name}-vanilla")]) == 0
        beware = (
            "Warning: The model was not made for this tokenizer: it pads with 24 ('<mask>') instead of 1 ('<pad>')"
        )
        assert (beware in capsys.readouterr().out) is (name == "wrong")
    assert MarianConfig.from_pretrained(tmp_path / "right-vanilla").vocab_size == 26
    assert MarianConfig.from_pretrained(tmp_path / "wrong-vanilla").vocab_size == 25


# --- tokenizers and configurations that are refused -------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (["</s>", "<unk>"], [], r"no padding token.*add_special_tokens\(\{'pad_token': '<pad>'\}\)"),
        (["<pad>", "<unk>"], [], "no end-of-sentence token.*`tokenizer.eos_token = …`"),
    ],
)
def test_a_tokenizer_that_lacks_a_token_is_refused_with_what_to_do(first, last, message):
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*first, *WORDS, *last])}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{ROLES[token]: token for token in first if token in ROLES}
    )
    with pytest.raises(ValueError, match=message):
        AdminConfig.for_tokenizer(tokenizer, **SHAPE)
    with pytest.raises(ValueError, match=message):
        check_tokenizer(model_of(AdminConfig(vocab_size=len(tokenizer), **SHAPE)), tokenizer)
    missing = {"pad_token": "<pad>"} if "pad" in message else {"eos_token": "</s>"}
    tokenizer.add_special_tokens(missing)
    check_tokenizer(model_of(AdminConfig.for_tokenizer(tokenizer, **SHAPE)), tokenizer)


def test_padding_that_is_also_the_end_is_refused():
    tokenizer = tokenizer_of("marian")
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="pads with its end-of-sentence token '</s>'"):
        AdminConfig.for_tokenizer(tokenizer, **SHAPE)


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path):
    tokenizer = tokenizer_of("bart")
    with pytest.raises(ValueError, match="vocab_size=24 is too small for the tokenizer, which has 25 entries"):
        AdminConfig.for_tokenizer(tokenizer, vocab_size=24, **SHAPE)
    model = model_of(AdminConfig.for_tokenizer(tokenizer, **SHAPE))
    tokenizer.add_tokens(["more"])
    with pytest.raises(ValueError, match="26 entries, but the model's vocabulary 25"):
        trainer_of(model, tokenizer, tmp_path)


def test_ids_with_gaps_have_room():
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "w": 9}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    assert len(tokenizer) == 4 and AdminConfig.for_tokenizer(tokenizer, **SHAPE).vocab_size == 10


@pytest.mark.parametrize("layout", ["t5", "bart", "fairseq"])
@pytest.mark.parametrize("late", ["model", "model_init", "callback"])
def test_the_callback_names_every_id_that_disagrees_before_update_1(tmp_path, layout, late):
    tokenizer = tokenizer_of(layout)
    model = model_of(AdminConfig(vocab_size=len(tokenizer), **SHAPE))
    before = copy.deepcopy(model.state_dict())
    last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    with pytest.raises(ValueError, match="not made for this tokenizer") as error:
        if late == "model":
            trainer_of(model, tokenizer, tmp_path)
        else:  # Trainer has overwritten the ids of the configuration by then
            run = trainer_of(model, tokenizer, tmp_path, callbacks=[])
            if late == "model_init":
                run.model_init = lambda: model
            run.add_callback(AdminProfilingCallback())
            run.train()
    message = str(error.value)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    for what in ("pads with", "never predicts", "starts decoding from"):
        assert f"it {what} {len(tokenizer) - 1} ('{last}') instead of {pad} ('<pad>')" in message, what
    assert f"it ends sentences with 0 ('{tokenizer.convert_ids_to_tokens(0)}') instead of {eos} ('</s>')" in message
    assert "AdminConfig.for_tokenizer(tokenizer, …)" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_end_that_alone_is_another_word_is_named(tmp_path):
    """Marian's default eos is 0. Trainer adds the tokenizer's to it, and generation would still stop at the word 0."""
    tokenizer = make_tokenizer(["w", "</s>", "<unk>"], ["<pad>"])
    run = trainer_of(model_of(AdminConfig(vocab_size=len(tokenizer), **SHAPE)), tokenizer, tmp_path, callbacks=[])
    run.add_callback(AdminProfilingCallback())
    message = r"tokenizer: it ends sentences with 0 \('w'\) instead of 1 \('</s>'\)\. Make"
    with pytest.raises(ValueError, match=message):
        run.train()


def test_without_the_callback_the_model_notices_that_trainer_changed_its_padding(tmp_path):
    tokenizer = tokenizer_of("t5")
    model = model_of(AdminConfig(vocab_size=len(tokenizer), **SHAPE))
    with pytest.raises(ValueError, match=r"config.pad_token_id is 0 now.*made with 24.*for_tokenizer"):
        trainer_of(model, tokenizer, tmp_path, callbacks=[]).train()


@pytest.mark.parametrize("start", ["</s>", "<2de>"])
def test_decoding_may_start_from_another_special_token(start):
    tokenizer = tokenizer_of("fairseq")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<2de>"]})
    ids = {"decoder_start_token_id": tokenizer.convert_tokens_to_ids(start)}
    check_tokenizer(model_of(AdminConfig.for_tokenizer(tokenizer, **ids, **SHAPE)), tokenizer)


def test_a_stock_marian_passes_without_a_word(tmp_path, caplog):
    """As opus-mt is: forced eos, a ban of padding in generation alone, and a bos that only the tokenizer has."""
    tokenizer = make_tokenizer(["</s>", "<unk>", "<s>"], ["<pad>"])
    pad = tokenizer.pad_token_id
    ids = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 0, "forced_eos_token_id": 0}
    stock = MarianMTModel(MarianConfig(vocab_size=len(tokenizer), **ids, **SHAPE))
    stock.generation_config.bad_words_ids = [[pad]]
    stock.save_pretrained(tmp_path / "opus")
    model = AdminForConditionalGeneration.from_pretrained(tmp_path / "opus")
    caplog.clear()
    check_tokenizer(stock, tokenizer)
    trainer_of(model, tokenizer, tmp_path / "run", max_steps=1).train()
    assert not [record for record in caplog.records if record.name.startswith("admin_hf")]


def test_the_script_takes_a_tokenizer_of_any_layout_and_refuses_another_ones_model(data, tmp_path, capsys):
    words = sorted({word for side in ("en", "de") for word in (data / f"train.{side}").read_text().split()})
    for layout in ("fairseq", "[PAD] last"):
        make_tokenizer(*LAYOUTS[layout], words=words).save_pretrained(tmp_path / layout)
    assert script(data, tmp_path / "model", tokenizer_name=tmp_path / "fairseq", max_steps=1) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    ids = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")
    assert [config[name] for name in ids] == [1, 2, 0, 1]
    TransformersConverter(str(tmp_path / "model" / "vanilla")).convert(str(tmp_path / "ct2"))
    source = {"model_name_or_path": tmp_path / "model", "config_overrides": None, "max_steps": 1}
    capsys.readouterr()
    assert script(data, tmp_path / "out", **source, tokenizer_name=tmp_path / "[PAD] last") == 2
    message = f"The model was not made for this tokenizer: it pads with 1 ('<unk>') instead of {len(words) + 2} ("
    assert f"error: {message}" in capsys.readouterr().err
    assert script(data, tmp_path / "out", **source) == 0


# --- batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("callbacks", [None, []], ids=["callback", "no callback"])
@pytest.mark.parametrize("system", ["admin", "post_ln"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("labels", r"labels contain the padding id 1 \(\d+ of \d+ entries\).*label_pad_token_id=-100"),
        ("side", r"\d of 8 sources are padded on the left.*padding_side = 'right'"),
    ],
)
def test_padding_that_spoils_training_is_refused_before_update_1(tmp_path, system, callbacks, wrong, message):
    tokenizer = tokenizer_of("fairseq")
    residuals = {"encoder_residual": system, "decoder_residual": system}
    model = model_of(AdminConfig.for_tokenizer(tokenizer, **SHAPE, **residuals))
    before = copy.deepcopy(model.state_dict())
    options = {"label_pad_token_id": tokenizer.pad_token_id} if wrong == "labels" else {}
    tokenizer.padding_side = "left" if wrong == "side" else "right"
    collator = DataCollatorForSeq2Seq(tokenizer, model=model, **options)
    with pytest.raises(ValueError, match=message):
        trainer_of(model, tokenizer, tmp_path, callbacks, collator).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batch = collator([dict(row) for row in pairs(tokenizer)[2]][:8])
    with pytest.raises(ValueError, match=message):
        profile_residuals(model, batch)


def test_a_compiled_model_has_its_first_batch_checked_by_the_callback(tmp_path):
    tokenizer = tokenizer_of("fairseq")
    model = model_of(
        AdminConfig.for_tokenizer(tokenizer, **SHAPE, encoder_residual="pre_ln", decoder_residual="pre_ln")
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=1)
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    with pytest.raises(ValueError, match="labels contain the padding id 1"):
        trainer_of(model, tokenizer, tmp_path, collator=collator, **compiled).train()


# --- the trials of a search -------------------------------------------------------------------------


class Trial:
    """What Trainer asks of a trial of Optuna."""

    def __init__(self, number: int) -> None:
        self.number, self.params = number, {"seed": number}


def test_every_trial_of_a_search_keeps_its_profile(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # which asks for Optuna
    tokenizer = tokenizer_of("marian")
    config = AdminConfig.for_tokenizer(tokenizer, **SHAPE)
    run = trainer_of(model_of(config), tokenizer, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run.model_init = lambda: AdminForConditionalGeneration(config)
    run.hp_search_backend, run.hp_name = HPSearchBackend.OPTUNA, None
    run.compute_objective, run.hp_space = (lambda metrics: 0.0), (lambda trial: trial.params)
    for number in range(2):
        run.train(trial=Trial(number))
    profiles = [json.loads((tmp_path / f"run-{n}" / "residual_profile.json").read_text()) for n in range(2)]
    assert profiles[0] != profiles[1], "of other seeds"
    assert (tmp_path / "run-1" / "checkpoint-1").is_dir(), "where Trainer saves the trial"
    run.hp_name = lambda trial: f"lr-{trial.number}"
    run.train(trial=Trial(7))
    assert (tmp_path / "lr-7" / "residual_profile.json").exists()
    assert not (tmp_path / "residual_profile.json").exists()

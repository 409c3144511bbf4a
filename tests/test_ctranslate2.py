"""CTranslate2 takes what is exported: its own converter reads it, and translates as stock Transformers does.

Of a model that is trained on generated sentences, and of one trained on Multi30k where that is at hand.
"""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import ctranslate2
import pytest
import torch
from conftest import MULTI30K
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import run_translation
from admin_hf import AdminForConditionalGeneration
from admin_hf.__main__ import main
from training.embedded_data import write_embedded_data
from training.metrics import TranslationMetric


pytestmark = pytest.mark.slow

SENTENCES, BATCH, MAX_LENGTH = 100, 50, 60

SHAPE = "d_model=64,encoder_layers=2,decoder_layers=2,encoder_ffn_dim=128,decoder_ffn_dim=128,dropout=0.0"
SHAPE += ",encoder_attention_heads=4,decoder_attention_heads=4"

# Enough for sentences that end and follow their source (about 12 BLEU), in a minute on one core
TRAINING = f"""
    --source_lang en --target_lang de --max_train_samples 12000
    --vocab_size 2000 --lowercase True --config_overrides {SHAPE}
    --do_train --max_steps 400 --per_device_train_batch_size 48 --learning_rate 6e-3 --warmup_steps 100
    --adam_beta2 0.98 --use_cpu --disable_tqdm True --seed 1
"""


class Translation(NamedTuple):
    tokens: list[str]  # with </s>, where it ended before MAX_LENGTH
    score: float  # mean log-probability of the tokens


class Texts(NamedTuple):
    train: Path  # without the language
    validation: Path

    def sentences(self, language: str) -> list[str]:
        path = self.validation.with_name(f"{self.validation.name}.{language}")
        return path.read_text(encoding="utf-8").split("\n")[:SENTENCES]


# --- the model and its translations ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["generated", "multi30k"])
def texts(request, tmp_path_factory):
    if request.param == "multi30k":
        if not MULTI30K.is_dir():
            pytest.skip("needs Multi30k beside the repository, as shared/multi30k")
        return Texts(MULTI30K / "train", MULTI30K / "val")
    folder = tmp_path_factory.mktemp("generated")
    write_embedded_data(folder, train=12_000, validation=SENTENCES, test=1)
    return Texts(folder / "train", folder / "validation")


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    return train(texts, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export(trained, tmp_path_factory.mktemp("exported") / "float32")


@pytest.fixture(scope="module")
def converted(exported, tmp_path_factory):
    return convert(exported, tmp_path_factory.mktemp("converted") / "float32")


@pytest.fixture(scope="module")
def expected(exported, texts):
    """What stock Transformers makes of the vanilla model, by the number of beams."""
    model = AutoModelForSeq2SeqLM.from_pretrained(exported)
    assert type(model).__name__ == "MarianMTModel"
    return {beams: with_transformers(model, exported, beams, texts) for beams in (1, 5)}


@pytest.fixture(scope="module")
def found(converted, exported, texts):
    """What CTranslate2 makes of it."""
    return {beams: with_ctranslate2(converted, exported, beams, texts) for beams in (1, 5)}


def train(texts: Texts, folder: Path, *changes: str) -> Path:
    output = [
        "--train_file",
        str(texts.train),
        "--cache_dir",
        str(folder / "cache"),
        "--output_dir",
        str(folder / "model"),
    ]
    assert run_translation.main([*TRAINING.split(), *output, *changes]) == 0
    return folder / "model"


def export(checkpoint: Path, out: Path, *options: str) -> Path:
    assert main(["export", str(checkpoint), str(out), *options]) == 0
    return out


def convert(model: Path, out: Path, *options: str) -> Path:
    """Run the command that comes with CTranslate2, in a process that never hears of this project."""
    command = [Path(sys.executable).with_name("ct2-transformers-converter"), "--model", model, "--output_dir", out]
    result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=out.parent)
    assert result.returncode == 0, result.stderr
    return out


def with_transformers(model, tokenizer_folder: Path, beams: int, texts: Texts) -> list[Translation]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    pad, sources, translations = tokenizer.pad_token_id, texts.sentences("en"), []
    for start in range(0, SENTENCES, BATCH):
        output = model.eval().generate(
            **tokenizer(sources[start : start + BATCH], return_tensors="pt", padding=True),
            num_beams=beams,
            early_stopping=beams > 1,  # CTranslate2 stops when it has as many hypotheses as beams
            max_length=MAX_LENGTH + 1,  # the decoder's start counts here
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[:, 1:]
        if beams == 1:
            scores = torch.stack(output.logits, dim=1).log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
            scores = scores.masked_fill(tokens == pad, 0).sum(1) / (tokens != pad).sum(1)
        else:
            scores = output.sequences_scores
        for ids, score in zip(tokens.tolist(), scores.tolist(), strict=True):
            translations.append(Translation(tokenizer.convert_ids_to_tokens([i for i in ids if i != pad]), score))
    return translations


def with_ctranslate2(folder: Path, tokenizer_folder: Path, beams: int, texts: Texts) -> list[Translation]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    results = ctranslate2.Translator(str(folder), inter_threads=1, intra_threads=1).translate_batch(
        [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts.sentences("en"))["input_ids"]],
        max_batch_size=BATCH,
        beam_size=beams,
        max_decoding_length=MAX_LENGTH,
        min_decoding_length=0,  # 1 by default, which takes </s> out of the first step's softmax
        return_end_token=True,
        return_scores=True,
    )
    return [Translation(result.hypotheses[0], result.scores[0]) for result in results]


def bleu(translations: list[Translation], tokenizer_folder: Path, texts: Texts) -> float:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = [tokenizer.convert_tokens_to_ids(translation.tokens) for translation in translations]
    lines = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return TranslationMetric(lowercase=True).compute(predictions=lines, references=texts.sentences("de"))["bleu"]


def differences(expected: list[Translation], found: list[Translation]) -> list[str]:
    """Where tokens differ: sentence, first place of it, and both, for the message of an assertion."""
    lines = []
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        if one.tokens != other.tokens:
            same = [a == b for a, b in zip(one.tokens, other.tokens, strict=False)] + [False]
            lines.append(f"{number}, from token {same.index(False)}:")
            lines += [f"  {score:.6f} {' '.join(tokens)}" for tokens, score in (one, other)]
    return lines


def agreement(expected: list[Translation], found: list[Translation]) -> float:
    return sum(one.tokens == other.tokens for one, other in zip(expected, found, strict=True)) / len(expected)


# --- the tests ------------------------------------------------------------------------------------


def test_the_model_has_learnt_something_to_compare(trained, exported, expected, texts):
    """Equal translations say nothing if every one is the same, or if there is no ω to fold."""
    omegas = {name: w for name, w in load_file(trained / "model.safetensors").items() if name.endswith(".omega")}
    assert len(omegas) == 8  # (2 - 1) + 2 in the encoder and (3 - 1) + 3 in the decoder
    for name, omega in omegas.items():
        assert omega.std() > 1e-2 and (omega - 1).abs().mean() > 1e-1, name
    assert not [name for name in load_file(exported / "model.safetensors") if name.endswith(".omega")]
    for translations in expected.values():
        assert len({tuple(translation.tokens) for translation in translations}) > 0.9 * SENTENCES
        assert sum(translation.tokens[-1] == "</s>" for translation in translations) > 0.9 * SENTENCES
        assert bleu(translations, exported, texts) > 5


@pytest.mark.parametrize("beams", [1, 5])
def test_ctranslate2_translates_as_stock_transformers(expected, found, beams, record_property):
    share = agreement(expected[beams], found[beams])
    record_property("agreement", share)
    assert share >= 0.99, "\n".join(differences(expected[beams], found[beams]))
    pairs = zip(expected[beams], found[beams], strict=True)
    distances = [abs(one.score - other.score) for one, other in pairs if one.tokens == other.tokens]
    record_property("largest score difference", max(distances))
    # Rounding of float32; an output layer or start that differs in one token gives 1e-4 and more
    assert max(distances) < 1e-5


@pytest.mark.parametrize("beams", [1, 5])
def test_ctranslate2_translates_as_the_model_that_was_trained(trained, found, beams, texts, record_property):
    expected = with_transformers(AdminForConditionalGeneration.from_pretrained(trained), trained, beams, texts)
    share = agreement(expected, found[beams])
    record_property("agreement", share)
    assert share >= 0.99, "\n".join(differences(expected, found[beams]))


def test_int8_costs_little_bleu(exported, found, texts, tmp_path, record_property):
    converted = convert(exported, tmp_path / "int8", "--quantization", "int8")
    assert ctranslate2.Translator(str(converted)).compute_type.startswith("int8")
    for beams in (1, 5):
        translations = with_ctranslate2(converted, exported, beams, texts)
        scores = {"float32": bleu(found[beams], exported, texts), "int8": bleu(translations, exported, texts)}
        record_property(f"BLEU, {beams} beams", scores)
        record_property(f"agreement, {beams} beams", agreement(found[beams], translations))
        print(f"{beams} beams: {scores}")
        # 100 sentences: one standard error of a system's BLEU is above 1
        assert abs(scores["float32"] - scores["int8"]) < 2


def test_a_float16_export_converts(trained, converted, found, texts, tmp_path, record_property):
    folder = export(trained, tmp_path / "exported", "--dtype", "float16")
    half = convert(folder, tmp_path / "converted")
    sizes = [(model / "model.bin").stat().st_size for model in (converted, half)]
    assert sizes[1] < 0.51 * sizes[0]
    share = agreement(found[1], with_ctranslate2(half, folder, 1, texts))
    record_property("agreement", share)
    assert share >= 0.9


def test_a_pre_ln_export_translates_as_stock_pegasus(trained, texts, tmp_path):
    changes = ["--config_overrides", f"{SHAPE},encoder_residual=pre_ln,decoder_residual=pre_ln"]
    changes += ["--tokenizer_name", str(trained), "--max_steps", "200", "--learning_rate", "1e-2"]
    changes += ["--per_device_train_batch_size", "32"]
    folder = export(train(texts, tmp_path, *changes), tmp_path / "exported")
    converted = convert(folder, tmp_path / "converted")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert type(model).__name__ == "PegasusForConditionalGeneration"
    for beams in (1, 5):
        expected = with_transformers(model, folder, beams, texts)
        found = with_ctranslate2(converted, folder, beams, texts)
        assert len({tuple(translation.tokens) for translation in expected}) > 0.2 * SENTENCES
        assert agreement(expected, found) >= 0.99, "\n".join(differences(expected, found))

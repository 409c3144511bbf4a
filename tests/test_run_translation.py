"""The script end to end, at tiny size: real files, real Trainer, real signals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sacrebleu
import torch
from conftest import MULTI30K, randomize
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tiny_runs import SHAPE, arguments, assert_equal_weights, flags, run, weights
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel, PegasusForConditionalGeneration

import run_translation
from admin_hf import AdminForConditionalGeneration, ResidualProfile
from training.arguments import parse_arguments
from training.data import load_data
from training.tokenization import prepare_tokenizer


REPO = Path(__file__).parents[1]


def test_trains_profiles_evaluates_and_translates(data, tmp_path, capsys):
    assert run(data, tmp_path, do_eval=True, do_predict=True, label_smoothing_factor=0.1, num_beams=2) == 0
    printed = capsys.readouterr().out
    assert "Var[f]" in printed and "test_bleu_signature" in printed and printed.count("->") == 3
    results = json.loads((tmp_path / "all_results.json").read_text())
    for split in ("eval", "test"):
        assert 0 <= results[f"{split}_bleu"] <= 100
        assert "nrefs:1|case:mixed" in results[f"{split}_bleu_signature"]
        assert f"{split}_chrf" in results and f"{split}_ter" in results
    assert len((tmp_path / "generated_predictions.txt").read_text().splitlines()) == 12

    model = AdminForConditionalGeneration.from_pretrained(tmp_path)
    profile = ResidualProfile.load(tmp_path / "residual_profile.json")
    trained = model.model.encoder.layers[0].final_layer_norm.omega
    assert (trained - profile.encoder.omega[1]).abs().max() < 0.1, "ω starts from the profile"
    assert trained.std() > 0, "and is trained"
    assert model.generation_config.max_length == 16 and model.generation_config.num_beams == 2
    assert model.config.label_smoothing == 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == model.config.vocab_size == 250
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_the_vanilla_model_is_written_scored_and_described(data, tmp_path, capsys):
    assert (
        run(data, tmp_path / "out", do_eval=True, do_predict=True, num_beams=2, max_steps=40, learning_rate=3e-2) == 0
    )
    printed, folder = capsys.readouterr().out, tmp_path / "out" / "vanilla"
    assert str(folder) in printed
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    for name in ("eval_bleu", "eval_chrf", "eval_ter", "test_bleu"):
        assert results[f"vanilla_{name}"] == results[name]
        assert re.search(rf"{name} +{results[name]:.2f} +{results[name]:.2f}\n", printed), "side by side"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is MarianMTModel and len(tokenizer) == model.config.vocab_size
    assert model.generation_config.num_beams == 2
    source = tokenizer((data / "test.en").read_text().splitlines()[0], return_tensors="pt")
    translation = tokenizer.decode(model.generate(**source)[0], skip_special_tokens=True)
    assert " ".join(translation.split()) == (tmp_path / "out/generated_predictions.txt").read_text().splitlines()[0]
    card = ModelCard.load(folder / "README.md")
    assert card.data.language == ["en", "de"] and card.data.pipeline_tag == "translation"
    expected = [f"vanilla_{split}_{metric}" for split in ("eval", "test") for metric in ("bleu", "chrf", "ter")]
    assert [round(results[name], 2) for name in expected] == [each.metric_value for each in card.data.eval_results]
    assert "seed: 1" in card.text and "wall time: 0:00:" in card.text and "hardware: " in card.text
    assert (
        results["eval_bleu_signature"] in card.text.replace("\\|", "|")
        and "omega.png" in card.text
        and '"learning_rate"' in card.text
    )
    assert str(tmp_path) not in card.content, "a card names no folder of this machine"
    assert (folder / "omega.png").read_bytes().startswith(b"\x89PNG")


def test_final_scores_are_those_of_the_saved_weights(data, tmp_path):
    """Trained in bf16, scored as a stranger's process scores the folder: in float32."""
    trained = {"bf16": True, "max_steps": 30, "learning_rate": 0.03, "do_eval": True}
    assert run(data, tmp_path / "out", **trained) == 0
    scored = {"do_train": None, "model_name_or_path": tmp_path / "out", "config_overrides": None, "do_eval": True}
    assert run(data, tmp_path / "again", **scored) == 0
    first, second = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("out", "again"))
    for name in ("eval_loss", "eval_bleu", "eval_chrf"):
        assert first[name] == second[name], name
    assert first["vanilla_eval_chrf"] == first["eval_chrf"]


def test_a_card_has_no_scores_of_an_earlier_model(data, tmp_path):
    assert run(data, tmp_path, do_eval=True, lr_scheduler_type="constant") == 0
    assert "validation | BLEU" in (tmp_path / "vanilla/README.md").read_text()
    assert run(data, tmp_path, max_steps=6, lr_scheduler_type="constant") == 0
    card = (tmp_path / "vanilla/README.md").read_text()
    assert "was not evaluated" in card and '"max_steps": 6' in card
    # A finished run that is evaluated on other sentences: the card says with which arguments
    options = {"max_eval_samples": 5, "num_beams": 3, "do_eval": True}
    assert run(data, tmp_path, max_steps=6, lr_scheduler_type="constant", **options) == 0
    card = (tmp_path / "vanilla/README.md").read_text()
    assert "validation | BLEU" in card and '"max_eval_samples": 5' in card and '"num_beams": 3' in card
    assert "nrefs:1\\|case:mixed" in card, "a bar would end the table's cell"


def test_an_omega_near_zero_ends_without_a_vanilla_model(data, tmp_path, caplog):
    assert run(data, tmp_path) == 0
    checkpoint = tmp_path / "checkpoint-4"
    trained = weights(checkpoint)
    trained["model.encoder.layers.0.final_layer_norm.omega"][3] = 0
    save_file(trained, checkpoint / "model.safetensors", {"format": "pt"})
    assert run(data, tmp_path, do_eval=True) == 0
    assert re.search(r"There is no vanilla model: .*\.omega has the entry 0 at 3, too close to zero", caplog.text)
    assert not (tmp_path / "vanilla").exists(), "the one of before is out of date"
    assert "eval_bleu" in (tmp_path / "all_results.json").read_text()


def test_a_vanilla_model_that_cannot_be_written_is_an_error(data, tmp_path, capsys):
    assert run(data, tmp_path) == 0
    before = (tmp_path / "vanilla" / "model.safetensors").read_bytes()
    (tmp_path / "vanilla" / "generation_config.json").unlink()
    (tmp_path / "vanilla" / "generation_config.json").mkdir()
    assert run(data, tmp_path) == 2
    assert "generation_config.json is in the way" in capsys.readouterr().err
    assert (tmp_path / "vanilla" / "model.safetensors").read_bytes() == before
    (tmp_path / "vanilla" / "generation_config.json").rmdir()
    assert run(data, tmp_path) == 0


def test_the_loss_of_an_evaluation_is_the_mean_over_its_targets(data, tmp_path):
    """However the sentences are cut into batches, of which the last is short, and whatever else is computed."""
    assert run(data, tmp_path) == 0
    losses = []
    for changes in (
        {"per_device_eval_batch_size": 12},
        {"per_device_eval_batch_size": 5},
        {"predict_with_generate": False},
    ):
        assert run(data, tmp_path, do_train=False, do_eval=True, val_max_target_length=None, **changes) == 0
        losses.append(json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    model = AdminForConditionalGeneration.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sources, targets = ((data / f"validation.{lang}").read_text().splitlines() for lang in ("en", "de"))
    batch = tokenizer(sources, text_target=targets, padding=True, return_tensors="pt")
    batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100
    assert losses[0] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_pre_ln_becomes_pegasus_and_a_mix_stays_as_it_is(data, tmp_path, caplog):
    shape = f"{SHAPE},encoder_residual=pre_ln"
    both = {"config_overrides": f"{shape},decoder_residual=pre_ln", "do_eval": True}
    assert run(data, tmp_path / "pre", **both) == 0
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "pre/vanilla")) is PegasusForConditionalGeneration
    card = (tmp_path / "pre/vanilla/README.md").read_text()
    assert "omega.png" not in card and "Admin" not in card and "- admin" not in card
    assert run(data, tmp_path / "mix", config_overrides=shape, do_eval=True) == 0
    assert "no vanilla model: No architecture of Transformers computes encoder_residual='pre_ln'" in caplog.text
    assert not (tmp_path / "mix" / "vanilla").exists()


def test_predictions_are_in_input_order_whatever_their_length(data, tmp_path):
    """Translated one line at a time, and in sorted batches: the same lines at the same places."""
    assert run(data, tmp_path / "model", max_steps=1) == 0
    # Weights of some size, so that sources differ in their translations
    randomize(AdminForConditionalGeneration.from_pretrained(tmp_path / "model")).save_pretrained(tmp_path / "model")
    sources = (data / "test.en").read_text().splitlines()[:6]
    sources.insert(2, "")
    sources.insert(4, "the the the the " * 30)
    (tmp_path / "some.txt").write_text("".join(f"{line}\n" for line in sources))
    predict = {
        "do_train": None,
        "do_predict": True,
        "model_name_or_path": tmp_path / "model",
        "config_overrides": None,
    }
    together = run(
        data,
        tmp_path / "together",
        **predict,
        do_eval=True,
        test_file=tmp_path / "some.txt",
        per_device_eval_batch_size=3,
    )
    alone = run(data, tmp_path / "alone", **predict, test_file=tmp_path / "some.txt", per_device_eval_batch_size=1)
    assert together == alone == 0
    lines = (tmp_path / "together" / "generated_predictions.txt").read_text().splitlines()
    assert lines == (tmp_path / "alone" / "generated_predictions.txt").read_text().splitlines()
    assert len(lines) == 8 and lines[2] == "" and len(set(lines)) > 2
    assert not (tmp_path / "together" / "test_results.json").read_text().count("bleu"), (
        "there is nothing to score against"
    )


def test_what_is_written_is_what_is_scored(data, tmp_path, caplog):
    """With lines that have nothing to translate, or nothing to compare with; the vanilla model likewise."""
    sources, targets = ((data / f"test.{lang}").read_text().splitlines()[:8] for lang in ("en", "de"))
    sources[1], sources[4], targets[4], targets[6] = " ", "\u200b\ufeff", "", "\u2060"
    for language, lines in (("en", sources), ("de", targets)):
        (tmp_path / f"test.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    options = {"do_predict": True, "test_file": tmp_path / "test"}
    assert run(data, tmp_path / "out", **options) == 0
    written = (tmp_path / "out" / "generated_predictions.txt").read_text(encoding="utf-8").split("\n")
    assert len(written) == 9 and written[8] == ""
    assert [not line for line in written[:8]] == [False, True, False, False, True, False, False, False]
    assert (
        "1 of 8 test pairs (the first is number 7) have no target; they are translated, but not scored" in caplog.text
    )
    kept = [i for i in range(8) if i not in (4, 6)]
    lines, references = ([texts[i] for i in kept] for texts in (written, targets))
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    for prefix in ("test", "vanilla_test"):
        assert results[f"{prefix}_bleu"] == sacrebleu.corpus_bleu(lines, [references]).score
        assert results[f"{prefix}_chrf"] == sacrebleu.corpus_chrf(lines, [references]).score > 0
        assert results[f"{prefix}_ter"] == sacrebleu.corpus_ter(lines, [references], case_sensitive=True).score


def test_the_best_checkpoint_is_the_best_in_a_language_without_spaces(tmp_path):
    """In sacreBLEU's default tokens every BLEU would be 0 here, and the first checkpoint the best."""
    words = {"red": "红", "old": "老", "dogs": "狗", "cats": "猫", "see": "看", "hear": "听"}
    rows = [
        (a, n, v, m)
        for a in ("red", "old")
        for n in ("dogs", "cats")
        for v in ("see", "hear")
        for m in ("dogs", "cats")
    ]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.en").write_text("".join(f"{' '.join(row)}\n" for row in rows))
        (tmp_path / f"{name}.zh").write_text("".join(f"{''.join(words[w] for w in row)}。\n" for row in rows), "utf-8")
    steps = {"max_steps": 90, "save_steps": 30, "eval_steps": 30, "eval_strategy": "steps", "vocab_size": 40}
    best = {"metric_for_best_model": "bleu", "early_stopping_patience": 3, "test_file": None, "target_lang": "zh"}
    assert (
        run(tmp_path, tmp_path / "out", **steps, **best, save_strategy="steps", do_eval=True, learning_rate=0.02) == 0
    )
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_bleu"] for entry in state["log_history"] if "eval_bleu" in entry}
    assert scores[30] < max(scores.values()) and state["best_global_step"] == max(scores, key=scores.get) > 30
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_bleu"] == results["vanilla_eval_bleu"] == max(scores.values()) > 40
    assert "tok:zh" in results["eval_bleu_signature"] and "asian:yes" in results["eval_ter_signature"]
    assert "eval_moses_bleu" not in results
    assert "tok:zh" in (tmp_path / "out" / "vanilla" / "README.md").read_text()


def test_a_json_file_of_arguments_is_the_same_and_flags_override_it(data, tmp_path):
    values = {name: str(v) if isinstance(v, Path) else v for name, v in arguments(data, tmp_path / "a").items()}
    (tmp_path / "recipe.json").write_text(json.dumps(values | {"seed": 2}))
    assert run_translation.main([str(tmp_path / "recipe.json"), "--seed", "1"]) == 0
    assert run(data, tmp_path / "b") == 0
    assert_equal_weights(tmp_path / "a", tmp_path / "b")


def test_the_same_command_resumes_and_ends_as_an_uninterrupted_run(data, tmp_path, caplog):
    options = {"save_steps": 3, "lr_scheduler_type": "constant"}  # another schedule would depend on max_steps
    assert run(data, tmp_path / "whole", **options, max_steps=6) == 0
    assert run(data, tmp_path / "parts", **options, max_steps=3) == 0
    # A checkpoint that was being written when the machine went down is not picked up
    (tmp_path / "parts" / "checkpoint-5").mkdir()
    (tmp_path / "parts" / "checkpoint-5" / "model.safetensors").write_bytes(b"half a file")
    (tmp_path / "parts" / "checkpoint-best").mkdir()  # a user's own
    assert run(data, tmp_path / "parts", **options, max_steps=6) == 0
    assert "missing keys" not in caplog.text
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")
    state = json.loads((tmp_path / "parts" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [2, 3, 4, 6], "and what is saved"


def test_a_finished_run_is_left_as_it_is_and_can_be_evaluated(data, tmp_path):
    assert run(data, tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert run(data, tmp_path, do_eval=True) == 0
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    # Not one update more; the tokenizer's configuration notes that it was loaded
    assert changed <= {"all_results.json", "results.json", "training_args.bin", "tokenizer_config.json"}
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["train_loss"] > 0 and "eval_bleu" in results
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    assert run(data, tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2") == 2, "newer ones would be mixed in"
    # From elsewhere, which is where a run begins, not where the same command goes on
    assert run(data, tmp_path / "b", max_steps=6, resume_from_checkpoint=tmp_path / "checkpoint-4") == 0
    assert run(data, tmp_path / "b", max_steps=8, resume_from_checkpoint=tmp_path / "checkpoint-4") == 0
    state = json.loads((tmp_path / "b" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [2, 4, 6, 8]
    # Killed while it wrote what the checkpoint holds as well
    (tmp_path / "trainer_state.json").write_text('{"epoch": 1,')
    assert run(data, tmp_path) == 0
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_a_run_with_a_checkpoint_that_resumes(data, tmp_path, number):
    """Sent to the whole group, workers that load data included, as terminals and torchrun do."""
    values = arguments(data, tmp_path / "stopped", max_steps=400, save_steps=1000, logging_steps=1)
    command = [sys.executable, str(REPO / "run_translation.py"), *flags(values), "--dataloader_num_workers", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=REPO, **pipes, start_new_session=True) as process:
        for line in process.stdout:
            if "'loss'" in line:
                break
        os.killpg(process.pid, number)
        output = process.stdout.read()
    assert process.returncode == 128 + number, output
    assert "The same command continues from there" in output
    checkpoints = list((tmp_path / "stopped").glob("checkpoint-*"))
    assert len(checkpoints) == 1
    step = int(checkpoints[0].name.partition("-")[2])
    assert 0 < step < 400
    resumed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert run(data, tmp_path / "whole", max_steps=400, save_steps=1000, logging_steps=1) == 0
    assert_equal_weights(tmp_path / "stopped", tmp_path / "whole")


def test_the_checkpoints_of_another_program_can_be_evaluated(data, tmp_path):
    assert run(data, tmp_path) == 0
    for name in ("arguments.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert run(data, tmp_path, do_train=False, do_eval=True) == 0


def test_the_tokenizer_that_the_first_process_trains_is_that_of_all(data, tmp_path):
    given = parse_arguments(flags(arguments(data, tmp_path)))
    first = prepare_tokenizer(given, load_data(given))
    other = given._replace(training=SimpleNamespace(output_dir=tmp_path, local_process_index=1, do_train=True))
    assert prepare_tokenizer(other, {}).get_vocab() == first.get_vocab()


def test_the_best_score_is_the_highest_but_of_an_error_rate(data, tmp_path):
    for metric, greater in (("bleu", True), ("eval_ter", False), ("loss", False)):
        values = arguments(data, tmp_path, metric_for_best_model=metric)
        assert parse_arguments(flags(values)).training.greater_is_better is greater


def test_a_profile_can_be_shared(data, tmp_path):
    assert run(data, tmp_path / "first", learning_rate=0.0) == 0
    profile = tmp_path / "first" / "residual_profile.json"
    assert run(data, tmp_path / "second", learning_rate=0.0, seed=2, residual_profile=profile) == 0
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first if name.endswith("omega"))
    assert not torch.equal(first["model.shared.weight"], second["model.shared.weight"])
    assert not (tmp_path / "second" / "residual_profile.json").exists()


def test_training_goes_on_from_a_model(data, tmp_path):
    assert run(data, tmp_path / "first") == 0
    for name, start in (("second", tmp_path / "first"), ("third", tmp_path / "first" / "vanilla")):
        assert run(data, tmp_path / name, model_name_or_path=start, config_overrides=None) == 0
        assert not (tmp_path / name / "residual_profile.json").exists(), "what was trained is not profiled again"
        assert (tmp_path / name / "vanilla" / "README.md").exists()
    first, second, third = (weights(tmp_path / name) for name in ("first", "second", "third"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    omegas = [value for name, value in third.items() if name.endswith("omega")]
    assert omegas and all(0 < (omega - 1).abs().max() < 0.2 for omega in omegas), "trained from 1 on"
    second, third = ((tmp_path / name / "vanilla" / "README.md").read_text() for name in ("second", "third"))
    assert "trained with [Admin]" in second and "- admin\n" in second
    assert "Admin]" not in third and "ω were not profiled" in third and "- admin\n" not in third
    assert "profiled on the first batch" not in third


def test_the_mean_of_the_last_checkpoints_is_what_is_scored_and_exported(data, tmp_path, monkeypatch):
    """And not the best one, which is kept beside them."""
    schedule = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    schedule |= {"predict_with_generate": False, "learning_rate": 3.0, "warmup_steps": 1, "max_tokens": 200}
    last = {"max_steps": 6, "save_total_limit": 3, "average_last": 3, "do_eval": True}
    assert run(data, tmp_path, **schedule, **last) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [Path(folder).name for folder in results["weights"]] == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_global_step"] < 4 and (tmp_path / f"checkpoint-{state['best_global_step']}").exists()
    # Evaluated by itself it is the same model, and the scores of before are kept
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    assert run(data, tmp_path, do_train=None, do_predict=True, config_overrides=None, predict_with_generate=False) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["weights"] == results["weights"] and again["scores"].keys() > results["scores"].keys()
    assert not any(elsewhere.iterdir()), "where TensorBoard would write, without a training"
    parts = [weights(tmp_path / name) for name in ("checkpoint-4", "checkpoint-5", "checkpoint-6")]
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean(0))
    vanilla = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "vanilla").eval()
    model = AdminForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[249, 5, 6]])}
    torch.testing.assert_close(vanilla(**ids).logits, model(**ids).logits, rtol=1e-4, atol=1e-4)


def test_every_decoding_of_the_test_set_is_logged(data, tmp_path):
    options = {"do_predict": True, "max_tokens": 200, "pad_to_multiple_of": 8, "save_strategy": "no"}
    assert run(data, tmp_path, **options, eval_on_start=True, eval_strategy="epoch") == 0
    assert (tmp_path / "residual_profile.json").exists(), "profiled on a training batch, after the first evaluation"
    decodes = [json.loads(line) for line in (tmp_path / "decodes.jsonl").read_text().splitlines()]
    assert [decode["weights"] for decode in decodes] == [[tmp_path.name]]
    assert (
        run(
            data,
            tmp_path,
            do_train=None,
            do_predict=True,
            config_overrides=None,
            **{"model_name_or_path": tmp_path, "num_beams": 2},
        )
        == 0
    )
    decodes = [json.loads(line) for line in (tmp_path / "decodes.jsonl").read_text().splitlines()]
    assert [decode["num_beams"] for decode in decodes] == [1, 2]
    assert all(decode["test"] == "test" and "test_moses_bleu" in decode for decode in decodes)


def test_the_model_that_is_named_is_the_one_that_translates(data, tmp_path):
    assert run(data, tmp_path / "a", seed=1) == 0
    assert run(data, tmp_path / "b", seed=2) == 0
    predict = {"do_train": None, "do_predict": True, "model_name_or_path": tmp_path / "a", "config_overrides": None}
    assert run(data, tmp_path / "b", **predict) == 0
    assert run(data, tmp_path / "c", **predict) == 0
    losses = [json.loads((tmp_path / name / "test_results.json").read_text())["test_loss"] for name in ("b", "c")]
    assert losses[0] == losses[1]


def test_no_token_is_written(data, tmp_path):
    assert run(data, tmp_path, hub_token="hf_secret") == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


@pytest.mark.skipif(
    not MULTI30K.exists(), reason="the Multi30k data set lies beside the project only where it is developed"
)
def test_real_text_survives_tokenisation(tmp_path):
    values = arguments(MULTI30K, tmp_path, max_train_samples=2000, vocab_size=1500, lowercase=True, max_steps=1)
    values |= {"validation_file": MULTI30K / "val", "test_file": MULTI30K / "test_2016_flickr"}
    assert run_translation.main(flags(values)) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lines = (MULTI30K / "train.de").read_text(encoding="utf-8").splitlines()[:2000]
    decoded = tokenizer.batch_decode(tokenizer(lines)["input_ids"], skip_special_tokens=True)
    assert decoded == [" ".join(line.lower().split()) for line in lines]


def test_every_sentence_is_scored_whatever_training_drops(data, tmp_path):
    """12 sentences in batches of 8: Trainer would leave out the last four of an evaluation too."""
    options = {"do_eval": True, "do_predict": True, "max_steps": 1}
    assert run(data, tmp_path / "all", **options) == 0
    assert run(data, tmp_path / "dropped", **options, dataloader_drop_last=True) == 0
    one, other = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("all", "dropped"))
    assert one["eval_loss"] == other["eval_loss"] and one["test_chrf"] == other["test_chrf"]
    lines = [(tmp_path / name / "generated_predictions.txt").read_text() for name in ("all", "dropped")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 12

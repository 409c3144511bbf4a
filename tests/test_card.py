"""The model card of every way to publish: what is known is said, what is written by hand stays, no path, no token."""

import copy
import json

import hub_server
import pytest
from conftest import tiny_model
from hub_server import HubServer, run_python
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from test_peft import trainer
from test_publishing import TINY_ADMIN, assert_vanilla, script
from test_reparameterization import trained_model
from transformers import MarianConfig, MarianMTModel

from admin_hf import AdminForConditionalGeneration, AdminProfilingCallback, AdminPublishingCallback, reparameterize
from admin_hf.card import MARK, Card, card_by_hand
from admin_hf.trainer_card import card_of_training


hub = hub_server.hub

GIVEN = ModelCardData(license="cc-by-4.0", language=["en", "de"], datasets=["me/corpus"], tags=["multi30k"])


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def written(card: Card, folder, repo_id: str = "me/en-de", model=None) -> ModelCard:
    (reparameterize(trained_model()) if model is None else model).save_pretrained(folder)
    card.write(folder, repo_id)
    return card_of(folder)


# --- what a model says ----------------------------------------------------------------------------


def test_what_is_unknown_is_left_out(tmp_path):
    card = written(Card.of(trained_model()), tmp_path)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "translation",
        "tags": ["translation"],
    }
    assert "Translates" not in card.text and "## Scores" not in card.text and "None" not in card.content
    named = MarianMTModel.from_pretrained(tmp_path).named_parameters()
    parameters = sum(parameter.numel() for name, parameter in named if "embed_positions" not in name)
    assert f"{parameters / 1e6:.1f} M parameters" in card.text and "vanilla Marian checkpoint" in card.text


def test_what_is_given_is_said(tmp_path):
    result = EvalResult("translation", "me/corpus", "corpus", "bleu", 31.25, metric_name="BLEU (nrefs:1)")
    given = copy.copy(GIVEN)
    given.eval_results = [result]
    model = trained_model()
    model.set_profiled(True)
    card = written(Card.of(model, given), tmp_path)
    assert (card.data.license, card.data.language, card.data.datasets) == ("cc-by-4.0", ["en", "de"], ["me/corpus"])
    assert card.data.tags == ["translation", "admin", "multi30k"] and card.data.eval_results[0].metric_value == 31.25
    assert "Translates **en → de**" in card.text and "trained with [Admin]" in card.text and "bibtex" in card.text


@pytest.mark.parametrize(("name", "base"), [("Helsinki-NLP/opus-mt-en-de", "Helsinki-NLP/opus-mt-en-de"), ("", None)])
def test_the_base_model_is_named_if_it_is_on_the_hub(name, base, tmp_path):
    model = trained_model()
    model.config._name_or_path = name
    assert written(Card.of(model), tmp_path).data.base_model == base
    model.config._name_or_path = str(tmp_path)
    card = written(Card.of(model), tmp_path)
    assert card.data.base_model is None and str(tmp_path) not in card.content
    model.config._name_or_path = "me/en-de"
    assert written(Card.of(model), tmp_path).data.base_model is None, "a model is not its own base"


def test_a_model_with_its_omega_says_what_it_needs(tmp_path):
    card = written(Card.of(trained_model()), tmp_path, model=trained_model())
    assert "needs the package `admin_hf`" in card.text and "CTranslate2" not in card.text


# --- what a Trainer knows -------------------------------------------------------------------------


def evaluated(folder, **changes):
    run = trainer(tiny_model(), folder, AdminProfilingCallback(False), AdminPublishingCallback(GIVEN), **changes)
    run.eval_dataset = run.train_dataset
    run.compute_metrics = lambda prediction: {"bleu": 12.345, "bleu_signature": "nrefs:1|tok:13a"}
    run.train()
    return run


def test_the_card_of_a_trainer_has_scores_seed_hardware_time_and_versions(tmp_path):
    run = evaluated(tmp_path / "out", seed=7)
    run.evaluate()
    run.save_model()
    run.create_model_card(license="mit", tags="mine", finetuned_from="me/base")
    card = card_of(tmp_path / "out")
    assert (card.data.license, card.data.base_model) == ("mit", "me/base"), "what is given last is right"
    assert card.data.tags == ["translation", "admin", "mine"] and card.data.datasets == ["me/corpus"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("bleu", 12.35, "me/corpus")
    assert result.metric_name == "BLEU nrefs:1|tok:13a"
    assert r"| BLEU | 12.35 | `nrefs:1\|tok:13a` |" in card.text
    for fact in ("seed: 7", "updates: 4", "hardware: ", "wall time: 0:00:0", "versions: ", '"learning_rate": 0.1'):
        assert fact in card.text, fact
    assert "fine-tuned version of" not in card.text and str(tmp_path) not in card.content


def test_scores_of_other_weights_are_left_out(tmp_path):
    run = evaluated(tmp_path)
    run.evaluate()
    assert "BLEU" in card_of_training(run.model, run.args, run.state, GIVEN).sections["Scores"]
    run.state.global_step += 1
    card = card_of_training(run.model, run.args, run.state, GIVEN)
    assert not card.sections["Scores"] and card.data.eval_results is None
    run.args.load_best_model_at_end, run.state.best_global_step = True, 4
    assert "BLEU" in card_of_training(run.model, run.args, run.state, GIVEN).sections["Scores"]


def test_a_trainer_without_the_callback_writes_its_own_card(tmp_path):
    AdminPublishingCallback()
    run = trainer(tiny_model(), tmp_path)
    run.create_model_card(language="en")
    assert card_of(tmp_path).data.tags == ["generated_from_trainer"] and card_of(tmp_path).data.language == ["en"]


def test_a_resumed_training_says_that_its_time_is_of_the_last_session(tmp_path):
    run = evaluated(tmp_path)
    (entry,) = [entry for entry in run.state.log_history if "train_runtime" in entry]
    entry |= {"train_runtime": 75.0, "train_steps_per_second": 10.0}
    run.state.global_step = 1000
    text = card_of_training(run.model, run.args, run.state).sections["Training"]
    assert "wall time: 0:01:15 (h:mm:ss, of the last session)" in text


# --- what is written by hand ----------------------------------------------------------------------


def test_a_card_by_hand_stays_and_ours_is_written_anew(tmp_path, caplog):
    card = Card.of(trained_model())
    written(card, tmp_path)
    card.sections["Scores"] = "New"
    assert "## Scores" in written(card, tmp_path).text, "ours"
    own = (tmp_path / "README.md").read_text().replace(MARK, "").replace("New", "Mine")
    (tmp_path / "README.md").write_text(own)
    with caplog.at_level("WARNING", logger="transformers"):
        card.write(tmp_path, "me/en-de")
    assert (tmp_path / "README.md").read_text() == own and "written by hand" in caplog.text
    run = evaluated(tmp_path)
    run.create_model_card()
    assert (tmp_path / "README.md").read_text() == own


# --- on the Hub -----------------------------------------------------------------------------------


def test_a_card_in_another_encoding_stays(tmp_path):
    trained_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes(b"# M\xefne")
    Card.of(trained_model()).write(tmp_path, "me/m")
    assert (tmp_path / "README.md").read_bytes() == b"# M\xefne"


def test_a_folder_without_a_model_gets_no_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no model to describe.*save_model"):
        Card.of(trained_model()).write(tmp_path, "me/m")
    assert not (tmp_path / "README.md").exists()


def test_without_a_network_no_card_counts_as_missing(monkeypatch):
    """Or one that was written by hand would be replaced when the network is back for the upload."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="offline|cannot find"):
        card_by_hand("me/there-is-no-such-repository")


@pytest.mark.slow
def test_push_to_hub_writes_a_card_and_keeps_one_by_hand(hub: HubServer, tmp_path):
    push = """
        from huggingface_hub import HfApi, ModelCardData
        model.push_to_hub("user/m", card_data=ModelCardData(license="mit"), tags=["mine"])
        model.push_to_hub("user/m", reparameterize=False, revision="with-omega")
        HfApi().upload_file(path_or_fileobj=b"# My own words", path_in_repo="README.md", repo_id="user/m")
        model.push_to_hub("user/m")
        model.push_to_hub("user/hand", create_pr=False)
    """
    done = run_python(script(TINY_ADMIN, push), hub.environment(tmp_path, hub.token))
    assert done.returncode == 0, done.stderr
    repo = hub.repos["user/m"]
    card = ModelCard(repo.commits[1].files["README.md"].decode())
    assert card.data.license == "mit" and card.data.tags == ["translation", "mine"]
    assert 'from_pretrained("user/m")' in card.text and "More Information Needed" not in card.text
    assert repo.files["README.md"] == b"# My own words"
    with_omega = repo.branches["with-omega"][-1].files
    assert json.loads(with_omega["config.json"])["model_type"] == "admin"
    assert "needs the package `admin_hf`" in with_omega["README.md"].decode()


TRAIN_LORA = """
    from huggingface_hub import ModelCardData
    from peft import LoraConfig, get_peft_model
    from admin_hf import AdminProfilingCallback, AdminPublishingCallback

    steps = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    arguments = Seq2SeqTrainingArguments(
        "run", push_to_hub=True, hub_token=TOKEN, report_to="none", use_cpu=True, disable_tqdm=True, **steps
    )
    batch = padded_batch()
    data = [{name: batch[name][i].tolist() for name in ("input_ids", "labels")} for i in (0, 0, 0, 0)]
    model = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "fc1"]))
    callbacks = [AdminProfilingCallback(), AdminPublishingCallback(ModelCardData(license="mit"))]
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
"""


@pytest.mark.slow
def test_a_trainer_with_adapters_ends_with_the_merged_vanilla_model_and_its_card(hub: HubServer, tmp_path):
    code = script(TINY_ADMIN, f"TOKEN = '{hub.token}'", TRAIN_LORA)
    trained = run_python(code, hub.environment(tmp_path, hub.token))
    assert trained.returncode == 0, trained.stderr
    repo = hub.repos["user/run"]
    messages = [commit.message for commit in repo.commits]
    assert messages[-1] == "Vanilla model" and "adapter_config.json" in repo.commits[-2].files
    assert_vanilla(repo)
    assert not [name for name in repo.files if name.startswith("adapter")], "or a loader would add the adapter"
    before = repo.files["README.md"]
    assert ModelCard(before.decode()).data.license == "mit" and b"seed: 42" in before
    pushed = run_python(script(code, "trainer.push_to_hub(language='de')"), hub.environment(tmp_path, hub.token))
    assert pushed.returncode == 0, pushed.stderr
    card = ModelCard(repo.files["README.md"].decode())
    assert messages != [commit.message for commit in repo.commits] and card.data.language == "de"
    assert "fine-tuned" not in card.text and 'from_pretrained("user/run")' in card.text
    assert str(tmp_path) not in card.content
    assert_vanilla(repo)


# --- generation -----------------------------------------------------------------------------------


def test_translations_are_not_cut_at_20_tokens(tmp_path, batch):
    model = tiny_model()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    assert model.generate(batch["input_ids"]).shape[1] == model.config.max_position_embeddings == 64
    model.save_pretrained(tmp_path / "omega")
    model.save_pretrained(tmp_path / "vanilla", reparameterize=True)
    for kind, folder in ((AdminForConditionalGeneration, "omega"), (MarianMTModel, "vanilla")):
        assert kind.from_pretrained(tmp_path / folder).generation_config.max_length == 64
    stock = MarianMTModel(MarianConfig(**{**model.config.to_dict(), "model_type": "marian"}))
    stock.generation_config.max_length = 12
    stock.save_pretrained(tmp_path / "stock")
    assert AdminForConditionalGeneration.from_pretrained(tmp_path / "stock").generation_config.max_length == 12
    (tmp_path / "stock" / "generation_config.json").unlink()
    assert AdminForConditionalGeneration.from_pretrained(tmp_path / "stock").generation_config.max_length == 64

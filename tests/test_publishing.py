"""What arrives on the Hub: the vanilla model by every path, never a token. Real client, HTTP and processes."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import hub_server
import pytest
from hub_server import HubServer, Repo, run_python
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file

from training.embedded_data import write_embedded_data


hub = hub_server.hub
REPO = Path(__file__).parents[1]
TOKEN = "hf_secretsecretsecretsecret"

TINY_ADMIN = f"""
    import json, sys
    sys.path[:0] = ["{REPO}", "{REPO / "tests"}"]
    from conftest import tiny_model, padded_batch
    from test_reparameterization import trained_model
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
    import torch

    model = trained_model()
"""

LOAD = """
    import sys
    sys.modules["admin_hf"] = None
    from transformers import AutoModelForSeq2SeqLM

    model, info = AutoModelForSeq2SeqLM.from_pretrained(REPO_ID, output_loading_info=True)
    assert type(model).__name__ == "MarianMTModel", type(model)
    assert not (info["missing_keys"] or info["unexpected_keys"]), info
"""


@pytest.fixture
def hub_with_secret():
    with HubServer(TOKEN) as server:
        yield server


def script(*parts: str) -> str:
    return "".join(map(textwrap.dedent, parts))


def pushed_config(repo: Repo) -> dict:
    return json.loads(repo.files["config.json"])


def assert_vanilla(repo: Repo) -> None:
    assert pushed_config(repo)["model_type"] == "marian"
    assert not [name for name in load(repo.files["model.safetensors"]) if name.endswith("omega")]


def assert_no_token(*places) -> None:
    """In no output, in no file below a folder, in no commit of a repository."""
    for place in places:
        if isinstance(place, Repo):
            contents = [c for history in place.branches.values() for commit in history for c in commit.files.values()]
        elif isinstance(place, Path):
            contents = [path.read_bytes() for path in place.rglob("*") if path.is_file()]
        else:
            contents = [place.encode()]
        assert not [content for content in contents if TOKEN.encode() in content]


@pytest.mark.slow
def test_push_to_hub_folds_unless_it_is_told_not_to(hub: HubServer, tmp_path):
    push = """
        model.push_to_hub("user/vanilla", commit_message="Folded")
        model.save_pretrained("folder", push_to_hub=True, repo_id="user/by-saving")
        model.register_for_auto_class()
        model.push_to_hub("user/unfolded", reparameterize=False)
    """
    done = run_python(script(TINY_ADMIN, push), hub.environment(tmp_path / "there", hub.token))
    assert done.returncode == 0, done.stderr
    assert [commit.message for commit in hub.repos["user/vanilla"].commits][1:] == ["Folded"]
    assert_vanilla(hub.repos["user/vanilla"])
    assert_vanilla(hub.repos["user/by-saving"])
    kept = load_file(tmp_path / "there" / "folder" / "model.safetensors")
    assert [name for name in kept if name.endswith("omega")], "the folder keeps ω"
    unfolded = hub.repos["user/unfolded"]
    assert pushed_config(unfolded)["model_type"] == "admin" and "modeling_admin.py" in unfolded.files
    loaded = run_python(script("REPO_ID = 'user/vanilla'", LOAD), hub.environment(tmp_path / "here"))
    assert loaded.returncode == 0, loaded.stderr


TRAIN = """
    from admin_hf import AdminForConditionalGeneration, AdminProfilingCallback, AdminPublishingCallback

    steps = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    arguments = Seq2SeqTrainingArguments(
        "run", push_to_hub=True, hub_token=TOKEN, report_to="none", use_cpu=True, disable_tqdm=True, **steps
    )
    batch = padded_batch()
    data = [{name: batch[name][i].tolist() for name in ("input_ids", "labels")} for i in (0, 0, 0, 0)]
    callbacks = [AdminProfilingCallback(), AdminPublishingCallback()]
    trainer = Seq2SeqTrainer(tiny_model(), arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
"""


@pytest.mark.slow
def test_a_plain_trainer_with_the_callback_ends_with_the_vanilla_model(hub_with_secret: HubServer, tmp_path):
    """After training already, and after the user's own push; checkpoints keep ω and go on."""
    hub, environment = hub_with_secret, hub_with_secret.environment(tmp_path)
    code = script(TINY_ADMIN, f"TOKEN = '{TOKEN}'", TRAIN)
    trained = run_python(code, environment)
    assert trained.returncode == 0, trained.stderr
    repo = hub.repos["user/run"]
    messages = [commit.message for commit in repo.commits]
    assert messages[-1] == "Vanilla model" and "Training in progress, step 2" in messages
    assert_vanilla(repo)
    checkpoint = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert [name for name in checkpoint if name.endswith("omega")]
    assert_no_token(trained.stdout, trained.stderr, tmp_path, repo)

    resume = """
        trainer.push_to_hub()
        assert json.load(open("run/config.json"))["model_type"] == "marian"
        model = AdminForConditionalGeneration.from_pretrained("run/checkpoint-4")
        assert model.model.decoder.layers[1].final_layer_norm.omega.std() > 0
        arguments.max_steps = 6
        Seq2SeqTrainer(model, arguments, train_dataset=data, callbacks=[AdminPublishingCallback()]).train(
            resume_from_checkpoint=True
        )
    """
    pushed = run_python(script(code, resume), environment)
    assert pushed.returncode == 0, pushed.stderr
    card = ModelCard(repo.files["README.md"].decode())
    assert "seed: 42" in card.text and "fine-tuned" not in card.text, "no card of Trainer's own"
    assert_vanilla(repo)
    assert_no_token(pushed.stdout, pushed.stderr, tmp_path, repo)


@pytest.mark.slow
def test_a_failed_push_does_not_lose_the_training(hub: HubServer, tmp_path):
    once = TRAIN.replace('"save_steps": 2', '"save_strategy": "no"')
    code = script(TINY_ADMIN, f"TOKEN = '{hub.token}'", once, "trainer.push_to_hub()")
    hub.fail_commits = 1
    # Without Xet the client does not repeat a broken upload by itself
    done = run_python(code, hub.environment(tmp_path) | {"HF_HUB_DISABLE_XET": "1"})
    assert done.returncode == 0, done.stderr
    assert "The vanilla model was not pushed to run" in done.stderr and "trainer.push_to_hub()" in done.stderr
    assert [commit.message for commit in hub.repos["user/run"].commits] == ["initial commit", "End of training"]
    assert_vanilla(hub.repos["user/run"])


@pytest.mark.slow
def test_run_translation_pushes_the_vanilla_folder(hub_with_secret: HubServer, tmp_path):
    hub = hub_with_secret
    write_embedded_data(tmp_path / "data", train=120, validation=12, test=12)
    shape = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=32,decoder_ffn_dim=32"
    values = {"train_file": "data/train", "validation_file": "data/validation", "source_lang": "en"}
    values |= {"target_lang": "de", "config_overrides": f"{shape},encoder_attention_heads=2,decoder_attention_heads=2"}
    values |= {"vocab_size": 250, "max_steps": 4, "val_max_target_length": 16, "do_train": True, "do_eval": True}
    values |= {"output_dir": "run", "push_to_hub": True, "hub_model_id": "user/en-de", "disable_tqdm": True}
    command = [sys.executable, str(REPO / "run_translation.py")]
    command += [text for name, value in values.items() for text in (f"--{name}", str(value))]

    def run(token: str | None, *flags: str) -> subprocess.CompletedProcess:
        # Without Xet the client does not repeat a broken upload by itself
        environment = hub.environment(tmp_path / "home", token) | {"HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [*command, *flags], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )

    def assert_refused(result: subprocess.CompletedProcess, sentence: str) -> None:
        assert result.returncode == 2, result.stderr
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and sentence in errors[0] and "Traceback" not in result.stderr

    for token in (None, "hf_wrong"):
        assert_refused(run(token), "--push_to_hub: the Hub does not let you in")
    assert not (tmp_path / "run" / "model.safetensors").exists() and not hub.repos, "before any training"

    hub.fail_commits = 1
    interrupted = run(None, "--hub_token", TOKEN)
    assert_refused(interrupted, "The upload to user/en-de failed")
    repo = hub.repos["user/en-de"]
    assert [commit.message for commit in repo.commits] == ["initial commit"]
    assert (tmp_path / "run" / "vanilla" / "model.safetensors").exists()

    again = run(None, "--hub_token", TOKEN)
    assert again.returncode == 0, again.stderr
    assert f"Pushed to {hub.url}/user/en-de" in again.stdout
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    expected |= {"tokenizer_config.json", "README.md", "omega.png", ".gitattributes"}
    assert repo.files.keys() == expected
    assert_vanilla(repo)
    card = ModelCard(repo.files["README.md"].decode())
    assert card.data.model_name == "en-de" and 'from_pretrained("user/en-de")' in card.text
    assert str(tmp_path) not in card.content
    assert_no_token(interrupted.stdout, interrupted.stderr, again.stdout, again.stderr, tmp_path, repo)
    loaded = run_python(script("REPO_ID = 'user/en-de'", LOAD), hub.environment(tmp_path / "elsewhere"))
    assert loaded.returncode == 0, loaded.stderr

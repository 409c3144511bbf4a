"""The local Hub that other tests push to behaves as the real one where it matters: stock classes can use it."""

from pathlib import Path

import hub_server
import pytest
from hub_server import HubServer, Repo, run_python


hub = hub_server.hub

TINY_MARIAN = """
    import torch
    from transformers import MarianConfig, MarianMTModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 49, "decoder_start_token_id": 49, "eos_token_id": 0, "forced_eos_token_id": 0}
    model = MarianMTModel(MarianConfig(vocab_size=50, max_position_embeddings=32, **sizes, **heads, **tokens))
"""

PUSH = """
    model.push_to_hub("user/model")
    torch.save(model.state_dict(), "weights.pt")
"""

LOAD = """
    import torch
    from transformers import AutoModelForSeq2SeqLM

    expected = torch.load("../there/weights.pt")
    loaded = AutoModelForSeq2SeqLM.from_pretrained("user/model").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
"""

TRAIN = """
    steps = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}
    arguments = Seq2SeqTrainingArguments("run", push_to_hub=True, report_to="none", use_cpu=True, **steps)
    data = [{"input_ids": [1, 2, 3, 0], "labels": [3, 2, 1, 0]}] * 4
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
"""

# Large enough to be still on its way when the connection breaks
UPLOAD = """
    from pathlib import Path
    from huggingface_hub import HfApi

    Path("folder").mkdir(exist_ok=True)
    Path("folder/weights").write_bytes(bytes(3_000_000))
    Path("folder/note").write_text("a note")
    HfApi().upload_folder(repo_id="user/model", folder_path="folder", commit_message="Upload")
"""


def messages(repo: Repo) -> list[str]:
    return [commit.message for commit in repo.commits]


def pushed_files(repo: Repo) -> dict[str, bytes]:
    """All but the file that the Hub itself adds."""
    return {path: content for path, content in repo.files.items() if path != ".gitattributes"}


@pytest.mark.slow
def test_a_pushed_model_comes_back_elsewhere(hub: HubServer, tmp_path: Path):
    pushed = run_python(TINY_MARIAN + PUSH, hub.environment(tmp_path / "there", hub.token))
    assert pushed.returncode == 0, pushed.stderr
    assert messages(hub.repos["user/model"]) == ["initial commit", "Upload model"]
    # Without a token: the repository is public
    loaded = run_python(LOAD, hub.environment(tmp_path / "here"))
    assert loaded.returncode == 0, loaded.stderr
    assert {request.status for request in hub.requests} <= {200, 404}


def test_a_push_with_a_wrong_token_stores_nothing(hub: HubServer, tmp_path: Path):
    hub.repos["user/model"] = Repo()
    for token, reason in [(None, "Invalid username or password"), ("hf_wrong", "Invalid credentials")]:
        refused = run_python(UPLOAD, hub.environment(tmp_path, token))
        assert refused.returncode == 1 and "401 Unauthorized" in refused.stderr and reason in refused.stderr
        assert "hf_wrong" not in refused.stdout + refused.stderr
    assert messages(hub.repos["user/model"]) == ["initial commit"]
    assert not any(request.authorized for request in hub.requests)


def test_a_broken_commit_stores_nothing_and_the_next_one_works(hub: HubServer, tmp_path: Path):
    hub.repos["user/model"] = Repo()
    hub.fail_commits = 1
    # Without Xet the client does not try again by itself
    environment = hub.environment(tmp_path, hub.token) | {"HF_HUB_DISABLE_XET": "1"}
    broken = run_python(UPLOAD, environment)
    assert broken.returncode == 1 and broken.stderr.splitlines()[-1].startswith("httpx")
    assert hub.requests[-1].status == 0
    assert pushed_files(hub.repos["user/model"]) == {}

    again = run_python(UPLOAD, environment)
    assert again.returncode == 0, again.stderr
    assert messages(hub.repos["user/model"]) == ["initial commit", "Upload"]
    assert pushed_files(hub.repos["user/model"]) == {"weights": bytes(3_000_000), "note": b"a note"}


def test_with_xet_the_client_repeats_a_broken_commit(hub: HubServer, tmp_path: Path):
    hub.repos["user/model"] = Repo()
    hub.fail_commits = 1
    done = run_python(UPLOAD, hub.environment(tmp_path, hub.token))
    assert done.returncode == 0 and "Retrying" in done.stderr
    assert [request.status for request in hub.requests if "/commit/" in request.path] == [0, 200]
    assert messages(hub.repos["user/model"]) == ["initial commit", "Upload"]


@pytest.mark.slow
def test_the_stock_trainer_pushes_its_folder(hub: HubServer, tmp_path: Path):
    done = run_python(TINY_MARIAN + TRAIN, hub.environment(tmp_path, hub.token))
    assert done.returncode == 0, done.stderr
    repo = hub.repos["user/run"]
    assert messages(repo)[0] == "initial commit" and messages(repo)[-1] == "End of training"
    saved = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "README.md"} <= saved.keys()
    assert pushed_files(repo) == saved
    assert {request.status for request in hub.requests} <= {200, 404}

"""Tiny models and batches that the tests share."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from admin_hf import AdminConfig, AdminForConditionalGeneration, initialize_omega, profile_residuals
from admin_hf.residual import SYSTEMS
from training.embedded_data import write_embedded_data


# The adapter of Hugging Face's own tests runs inside their tree only (see test_hf_common.py)
collect_ignore = ["hf_common"]

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Every system in both stacks, and mixes of them
SYSTEM_PAIRS = [(name, name) for name in SYSTEMS]
SYSTEM_PAIRS += [("post_ln", "pre_ln"), ("admin_uniform", "admin"), ("rezero", "fixup"), ("fixup", "deepnorm")]

VOCAB_SIZE, PAD = 50, 49

TRANSFORMERS = Version(transformers.__version__)
# What Transformers calls the cache that a forward takes and returns
CACHE = "cache" if TRANSFORMERS >= Version("5.24") else "past_key_values"
# Before, Marian drew a number for layerdrop in each layer of a training pass, which ended the graph of a compiled one
is_one_graph = pytest.mark.skipif(TRANSFORMERS < Version("5.23"), reason="Marian's layerdrop ends graphs")

MULTI30K = Path(__file__).parents[2] / "shared" / "multi30k"


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Arguments such as --fsdp are handed on in the environment, where processes of later tests would find them."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


def tiny_config(**changes) -> AdminConfig:
    """Two layers in each stack, width 16: a forward pass takes milliseconds."""
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return AdminConfig(**{"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, **sizes, **heads, **changes})


def tiny_model(seed: int = 0, **changes) -> AdminForConditionalGeneration:
    """A tiny model in evaluation mode."""
    torch.manual_seed(seed)
    return AdminForConditionalGeneration(tiny_config(**changes)).eval()


def randomize(model: torch.nn.Module, seed: int = 1, scale: float = 0.1) -> torch.nn.Module:
    """Move all weights away from their initial values (positions and the zero padding rows excepted)."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter += scale * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model


def padded_batch(rows: int = 4, source: int = 9, target: int = 7, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random sentences of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, PAD, (rows, source), generator=generator)
    labels = torch.randint(2, PAD, (rows, target), generator=generator)
    for row in range(1, rows):
        input_ids[row, source - row :] = PAD
        labels[row, target - row :] = -100
    return {"input_ids": input_ids, "attention_mask": input_ids.ne(PAD).long(), "labels": labels}


def learn(model: torch.nn.Module, batch: dict[str, torch.Tensor], updates: int = 60) -> torch.nn.Module:
    """Train on one batch, which is enough to know its sentences by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(updates):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """Switch all dropout off, so that train mode is deterministic."""
    for module in model.modules():
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return padded_batch()


@pytest.fixture
def run_folder(tmp_path, batch):
    """A run's folder with a profile and two checkpoints, as Trainer leaves it; ω is 1.5 and 2 in them but for one."""
    model = tiny_model(encoder_layers=12)
    profile = profile_residuals(model, batch)
    initialize_omega(model, profile)
    profile.save(tmp_path / "residual_profile.json")
    for step, value in ((90, 1.5), (100, 2.0)):
        for name, parameter in model.named_parameters():
            if name.endswith("omega"):
                parameter.data.fill_(value)
        model.model.encoder.layers[10].final_layer_norm.omega.data[0] = 7.0
        for layer in model.model.encoder.layers:
            layer.self_attn.q_proj.weight.data *= 1.5
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-110").mkdir()  # cut short
    return tmp_path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Files of embedded sentences, for short runs of the script; they stay as they are."""
    folder = tmp_path_factory.mktemp("data")
    write_embedded_data(folder, train=120, validation=12, test=12)
    return folder

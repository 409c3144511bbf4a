"""The recipes: what run_translation.py reads from them, and the models they build, against the paper."""

import dataclasses
import json
import re
import shlex
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch

from admin_hf import AdminConfig, AdminForConditionalGeneration
from training.arguments import parse_arguments
from training.model import config_changes


REPO = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (REPO / "hub_configs").glob("*/config.json"))
NAMES = [folder.name for folder in FOLDERS]
README = (REPO / "hub_configs" / "README.md").read_text(encoding="utf-8")
SYSTEMS = ("post_ln", "pre_ln", "admin")

# Rows of Table 2 and 4 (and 100-100), parameters in millions (appendix D; Wu et al. 2021 for Multi30k)
ROWS = {
    "iwslt14-de-en-6-6": (SYSTEMS, 37),
    "wmt14-en-de-6-6": (SYSTEMS, 63),
    "wmt14-en-de-12-12": (SYSTEMS, 107),
    "wmt14-en-de-18-18": (SYSTEMS, 151),
    "wmt14-en-de-100-100": (("admin",), None),
    "wmt14-en-fr-6-6": (SYSTEMS, 67),
    "wmt14-en-fr-60-12": (SYSTEMS, 262),
    "multi30k-4-4-tiny": (None, 2.57),
    "multi30k-4-4-tiny-en-fr": (None, 2.57),
    "multi30k-4-4-tiny-en-cs": (None, 2.57),
    "multi30k-4-4-tiny-fr-en": (None, 2.57),
    "multi30k-4-4-tiny-en-mul": (None, 2.57),
    "multi30k-6-6-tiny": (None, None),
    "multi30k-12-12-tiny": (None, None),
    "multi30k-18-18-tiny": (None, None),
}
ROW_FOLDERS = {
    f"{row}-{system}" if system else row: (row, system, millions)
    for row, (systems, millions) in ROWS.items()
    for system in systems or (None,)
}
PAPER_FOLDERS = [name for name, (_, system, _) in ROW_FOLDERS.items() if system]

# Appendix D; tokens of an update, warm-up's first learning rate and the beams: the authors' scripts
COMMON = {
    "optim": "radam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "lr_scheduler_type": "inverse_sqrt",
    "warmup_init_lr": 1e-7,
    "max_grad_norm": 0,
    "label_smoothing_factor": 0.1,
    "fp16": True,
    "fp16_scale_window": 256,
    "fp16_min_scale": 0.03125,
    "average_last": 10,
    "save_strategy": "epoch",
    "save_total_limit": 10,
    "seed": 1111,
}
SETTINGS = {
    "iwslt14-de-en": {
        "learning_rate": 7e-4,
        "warmup_steps": 6000,
        "weight_decay": 1e-4,
        "num_train_epochs": 90,
        "num_beams": 5,
        "vocab_size": 10_000,
    },
    "wmt14-en-de": {
        "learning_rate": 1e-3,
        "warmup_steps": 8000,
        "weight_decay": 0,
        "num_train_epochs": 100,
        "num_beams": 4,
        "length_penalty": 0.6,
        "vocab_size": 37_000,
    },
    "wmt14-en-fr": {
        "learning_rate": 7e-4,
        "warmup_steps": 8000,
        "weight_decay": 0,
        "num_train_epochs": 50,
        "num_beams": 5,
        "length_penalty": 0.8,
        "vocab_size": 44_500,
    },
}
SIZES = {  # D, FFN, heads; dropout, attention dropout, activation dropout
    "iwslt14-de-en": ((512, 1024, 4), (0.3, 0.1, 0.1)),
    "wmt14-en-de": ((512, 2048, 8), (0.1, 0.1, 0.1)),
    "wmt14-en-fr": ((512, 2048, 8), (0.1, 0.1, 0.1)),
    "multi30k": ((128, 256, 4), (0.3, 0.0, 0.0)),
}
TOKENS_AN_UPDATE = {"wmt14-en-fr-6-6": 8 * 8000 * 10, "wmt14-en-fr-60-12": 16 * 5000 * 16}
TOKENS_AN_UPDATE |= {row: 4 * 8192 for row in ROWS if row.startswith("wmt14-en-de")} | {"iwslt14-de-en-6-6": 4096}


def read(name: str, file: str) -> dict:
    return json.loads((REPO / "hub_configs" / name / file).read_text(encoding="utf-8"))


@cache
def arguments(name: str) -> tuple:
    return parse_arguments([str(REPO / "hub_configs" / name / "recipe.json")])


def values(name: str) -> dict:
    return {field: value for part in arguments(name) for field, value in vars(part).items()}


def parameters(config: AdminConfig) -> int:
    """Trainable parameters, from the formulas of the layers; positions are a fixed table."""
    D, N, M = config.d_model, config.encoder_layers, config.decoder_layers
    attention = 4 * (D * D + D)
    norm = 2 * D

    def feed_forward(F: int) -> int:
        return D * F + F + F * D + D

    def beside_layers(system: str, sublayers: int) -> int:  # ω but for the first sub-layer, Pre-LN's last norm
        return {"post_ln": 0, "pre_ln": norm, "admin": (sublayers - 1) * D}[system]

    encoder = N * (attention + feed_forward(config.encoder_ffn_dim) + 2 * norm)
    decoder = M * (2 * attention + feed_forward(config.decoder_ffn_dim) + 3 * norm)
    extra = beside_layers(config.encoder_residual, 2 * N) + beside_layers(config.decoder_residual, 3 * M)
    return config.vocab_size * D + encoder + decoder + extra


# --- models ---------------------------------------------------------------------------------------


def test_there_is_a_folder_for_every_row():
    assert ROW_FOLDERS.keys() <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_is_of_this_model_and_every_field_known(name):
    config = AdminConfig.from_pretrained(REPO / "hub_configs" / name)
    written = read(name, "config.json")
    assert written.pop("model_type") == AdminConfig.model_type
    assert written.keys() <= {field.name for field in dataclasses.fields(AdminConfig)}
    assert {field: getattr(config, field) for field in written} == written


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_the_parameters_of_the_formula_and_of_the_paper(name):
    config = AdminConfig.from_pretrained(REPO / "hub_configs" / name)
    with torch.device("meta"):
        model = AdminForConditionalGeneration(config)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count == parameters(config)
    _, _, millions = ROW_FOLDERS.get(name, (None, None, None))
    if millions is not None:
        assert count == pytest.approx(1e6 * millions, rel=0.02)


@pytest.mark.parametrize("name", ROW_FOLDERS)
def test_the_shape_is_that_of_the_name(name):
    _, system, _ = ROW_FOLDERS[name]
    data = next(data for data in SIZES if name.startswith(data))
    layers = [int(number) for number in re.search(r"-(\d+)-(\d+)", name.removeprefix(data)).groups()]
    config = read(name, "config.json")
    (d_model, ffn_dim, heads), dropouts = SIZES[data]
    assert [config["encoder_layers"], config["decoder_layers"]] == layers
    assert config["d_model"] == d_model
    assert config["encoder_ffn_dim"] == config["decoder_ffn_dim"] == ffn_dim
    assert config["encoder_attention_heads"] == config["decoder_attention_heads"] == heads
    assert tuple(config[f"{kind}dropout"] for kind in ("", "attention_", "activation_")) == dropouts
    assert config["encoder_residual"] == config["decoder_residual"] == (system or "admin")


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_script_understands_the_recipe_and_finds_its_configuration(name, monkeypatch):
    monkeypatch.chdir(REPO)
    model, data, training = arguments(name)
    assert model.config_name == f"hub_configs/{name}"
    changes = config_changes(model, AdminConfig)
    expected = {k: v for k, v in read(name, "config.json").items() if k not in ("model_type", "vocab_size")}
    built = AdminConfig(**changes, vocab_size=model.vocab_size)
    assert {field: getattr(built, field) for field in expected} == expected
    assert model.vocab_size == read(name, "config.json")["vocab_size"]
    assert training.do_train and data.source_lang != data.target_lang


def test_no_two_recipes_share_an_output_dir():
    folders = [Path(values(name)["output_dir"]) for name in NAMES]
    for one, other in combinations(folders, 2):
        assert one != other and one not in other.parents and other not in one.parents


@pytest.mark.parametrize("row", [row for row, (systems, _) in ROWS.items() if systems])
def test_the_systems_of_a_row_differ_in_nothing_else(row):
    systems, _ = ROWS[row]
    for system in systems:
        name = f"{row}-{system}"
        same = read(name, "recipe.json") | {"config_name": "", "output_dir": ""}
        assert same == read(f"{row}-admin", "recipe.json") | {"config_name": "", "output_dir": ""}
        stacks = {"encoder_residual": "", "decoder_residual": ""}
        assert read(name, "config.json") | stacks == read(f"{row}-admin", "config.json") | stacks
        assert values(name)["output_dir"] == f"runs/{name}"


@pytest.mark.parametrize("layers", ["6-6", "12-12", "18-18"])
def test_deeper_models_of_multi30k_train_as_the_shallow_one(layers):
    deep = read(f"multi30k-{layers}-tiny", "recipe.json")
    own = {"config_name": f"hub_configs/multi30k-{layers}-tiny", "output_dir": f"runs/multi30k-{layers}-tiny"}
    assert deep | read("multi30k-4-4-tiny", "recipe.json") | own == deep


@pytest.mark.parametrize(
    ("pair", "languages"),
    {"en-fr": ("en", "fr"), "en-cs": ("en", "cs"), "fr-en": ("fr", "en"), "en-mul": ("en", "de,fr,cs")}.items(),
)
def test_other_languages_of_multi30k_train_as_german_does(pair, languages):
    name = f"multi30k-4-4-tiny-{pair}"
    own = {"config_name": f"hub_configs/{name}", "output_dir": f"runs/{name}"}
    own |= dict(zip(("source_lang", "target_lang"), languages, strict=True))
    assert read(name, "recipe.json") == read("multi30k-4-4-tiny", "recipe.json") | own
    assert read(name, "config.json") == read("multi30k-4-4-tiny", "config.json")


@pytest.mark.parametrize("name", PAPER_FOLDERS)
def test_the_recipe_has_the_settings_of_the_paper(name):
    row, _, _ = ROW_FOLDERS[name]
    found = values(name)
    expected = COMMON | next(settings for data, settings in SETTINGS.items() if row.startswith(data))
    assert {field: found[field] for field in expected} == expected
    assert found["max_tokens"] * found["gradient_accumulation_steps"] == TOKENS_AN_UPDATE[row]
    assert found["max_tokens"] <= 8192, "what the paper profiles on at most"


@pytest.mark.parametrize("name", PAPER_FOLDERS)
def test_the_recipe_translates_in_the_direction_of_its_name(name):
    _, source, target, *_ = name.split("-")
    recipe = read(name, "recipe.json")
    assert (recipe["source_lang"], recipe["target_lang"]) == (source, target)
    if name.startswith("wmt14"):  # the Hub's configurations put English last
        assert recipe["dataset_config_name"] == f"{target}-{source}"


# --- README.md ------------------------------------------------------------------------------------


def rows_of_the_table() -> dict[str, str]:
    """Each folder and its line of the table; `a-{b,c}` stands for two folders, as in a shell."""
    lines = {}
    for line in README.splitlines():
        if found := re.match(r"\| `([\w{},-]+)` \|", line):
            prefix, _, systems = found[1].partition("{")
            for system in systems.rstrip("}").split(","):
                lines[prefix + system] = line
    return lines


def test_the_readme_lists_every_folder_and_no_other():
    assert rows_of_the_table().keys() == set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_ln")])
def test_the_readme_states_layers_and_parameters(name):
    config = AdminConfig.from_pretrained(REPO / "hub_configs" / name)
    line = rows_of_the_table()[name]
    assert f"| {config.encoder_layers}-{config.decoder_layers} |" in line
    assert f"| {parameters(config) / 1e6:.1f} M" in line


def test_the_commands_of_the_readme_are_understood():
    commands = re.findall(r"run_translation\.py (hub_configs/\S+\.json[^\n`|#]*)", README)
    assert len(commands) >= 3
    for command in commands:
        recipe, *flags = shlex.split(command)
        parse_arguments([str(REPO / recipe), *flags])


@pytest.mark.parametrize("name", [name for name in NAMES if "max_tokens" in read(name, "recipe.json")])
def test_the_readme_splits_the_batch_over_gpus_without_changing_it(name):
    recipe = read(name, "recipe.json")
    found = re.search(r"([\d,]+) × ([\d,]+) × ([\d,]+)", rows_of_the_table()[name])
    gpus, tokens, accumulated = (int(number.replace(",", "")) for number in found.groups())
    assert tokens == recipe["max_tokens"]
    assert gpus * accumulated == recipe.get("gradient_accumulation_steps", 1)


def test_the_links_of_the_readme_lead_somewhere():
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 10
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        else:
            assert link.startswith("https://") or (REPO / "hub_configs" / link).exists(), link

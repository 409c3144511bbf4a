"""The configurations of `accelerate launch` say what their comments and docs/distributed.md say."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import tiny_model
from torch.distributed.fsdp import StateDictType

from admin_hf import modeling_admin


REPO = Path(__file__).parents[1]
CONFIGS = sorted((REPO / "hub_configs" / "accelerate").glob("*.yaml"))
PAGE = (REPO / "docs" / "distributed.md").read_text(encoding="utf-8")
TYPES = {
    "multi_gpu": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def load(name: str) -> ClusterConfig:
    return load_config_from_file(str(REPO / "hub_configs" / "accelerate" / f"{name}.yaml"))


def launch_line(path: Path) -> list[str]:
    """The words of the command in a configuration's comments, for machine 1."""
    text = re.sub(r"\\\n# *", "", path.read_text(encoding="utf-8")).replace("--machine_rank K", "--machine_rank 1")
    return shlex.split(re.search(r"^# +accelerate launch (.*)$", text, re.MULTILINE)[1])


def test_every_way_of_training_has_a_configuration():
    assert {path.stem for path in CONFIGS} == TYPES.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))  # which refuses unknown keys of the upper level
    assert config.distributed_type == TYPES[path.stem]
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for section in (config.fsdp_config, config.deepspeed_config):
        assert section.keys() <= known.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_comment_gives_a_launch_line_and_the_way_of_profiling(path):
    arguments = launch_command_parser().parse_args(launch_line(path))
    assert REPO / arguments.config_file == path
    assert arguments.training_script == "run_translation.py"
    assert arguments.training_script_args == ["hub_configs/NAME/recipe.json"]
    by_callback = TYPES[path.stem] == DistributedType.MULTI_GPU
    route = "Profiling: AdminProfilingCallback" if by_callback else "Profiling: before"
    assert f"# {route}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipe_decides_on_half_precision(path):
    assert load_config_from_file(str(path)).mixed_precision is None
    assert not {"bf16", "fp16"} & yaml.safe_load(path.read_text(encoding="utf-8")).keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_page_names_it(path):
    assert f"(../hub_configs/accelerate/{path.name})" in PAGE


def test_machines_of_a_cluster_are_told_apart_on_the_command_line():
    config = load("multi_node")
    assert config.num_machines > 1 and config.num_processes % config.num_machines == 0
    path = REPO / "hub_configs" / "accelerate" / "multi_node.yaml"
    assert {"--machine_rank", "--main_process_ip"} <= set(launch_line(path))


def test_fsdp_shards_every_layer_and_saves_whole_weights(monkeypatch):
    config = str(REPO / "hub_configs" / "accelerate" / "fsdp.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", config, "--main_process_port", "0", "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    for name, value in prepare_multi_gpu_env(arguments).items():  # what the launcher hands to the processes
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading
    assert set(plugin.transformer_cls_names_to_wrap) == tiny_model()._no_split_modules
    assert all(hasattr(modeling_admin, name) for name in plugin.transformer_cls_names_to_wrap)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_from_trainer_what_trainer_decides(stage):
    plugin = DeepSpeedPlugin(**load(f"deepspeed_zero{stage}").deepspeed_config)
    config = plugin.deepspeed_config
    assert config["zero_optimization"]["stage"] == stage
    decided_by_trainer = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert {config[name] for name in (*decided_by_trainer, "gradient_clipping")} == {"auto"}
    assert not plugin.zero3_init_flag  # profiling needs whole weights
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)

"""The recipes of runs are what the installed trl and accelerate read, and say what their comments promise."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env

from perceptio.data.recipe import read_recipe
from perceptio.hub.tiny import tiny_config
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration

RECIPES = Path(__file__).parents[1] / "recipes"
RUNS = sorted(RECIPES.glob("*.yaml"))
PUBLISHED = [path for path in RUNS if path.stem[-1] == "b"]  # the sizes of the paper
LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))
KINDS = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}


def launch_path(name: str) -> str:
    return str(RECIPES / "accelerate" / f"{name}.yaml")


def test_there_is_a_recipe_for_every_way():
    assert [path.stem for path in LAUNCHES] == sorted(KINDS)
    assert [path.stem for path in RUNS] == ["perceptio-4b", "perceptio-8b", "perceptio-tiny"]


# Accelerate


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    """Its parser refuses keys that it does not know."""
    config = ClusterConfig.from_yaml_file(launch_path(name))
    assert isinstance(load_config_from_file(launch_path(name)), ClusterConfig)
    assert config.distributed_type == KINDS[name]
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (8, 1, "bf16")


def launched(name: str, *more: str):
    """The arguments of `accelerate launch`, flags and file put together."""
    arguments = ["--config_file", launch_path(name), *more, "train_sft.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_flag_changes_the_number_of_processes(name):
    args = launched(name, "--num_processes", "2")
    assert args.num_processes == 2 and args.mixed_precision == "bf16"


def test_fsdp2_cuts_the_layers_that_the_model_names(monkeypatch):
    for key, value in prepare_multi_gpu_env(launched("fsdp2")).items():
        if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(key, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading
    for family, layer in (("qwen2", "Qwen2DecoderLayer"), ("llama", "LlamaDecoderLayer")):
        with torch.device("meta"):
            model = PerceptioForConditionalGeneration(tiny_config(family))
        is_cut = fsdp2_prepare_auto_wrap_policy(plugin, model)
        cut = {type(module).__name__ for module in model.modules() if is_cut(module)}
        assert cut == {layer, "InternVLVisionLayer"}


def test_zero3_leaves_the_steps_to_the_trainer():
    values = yaml.safe_load(Path(launch_path("zero3")).read_text(encoding="utf-8"))["deepspeed_config"]
    plugin = DeepSpeedPlugin(**values)  # every key is one of its arguments
    config = plugin.deepspeed_config
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
    assert plugin.zero3_init_flag is False


# Runs


def parse(path: Path):
    """(what is run, the trainer's configuration) as `train_sft.py` reads the file; unknown keys raise."""
    from perceptio.train_sft import PerceptioSFTConfig, RunArguments, TrlParser

    return TrlParser((RunArguments, PerceptioSFTConfig)).parse_args_and_config(
        ["--config", str(path), "--bf16", "false"]  # which a machine without a GPU would refuse
    )


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_key_of_a_run_is_a_field(path):
    run, config = parse(path)
    assert run.model == ("build/tiny/base" if path not in PUBLISHED else path.stem)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields = vars(run) | vars(config)
    assert set(written) <= set(fields)
    for key, value in written.items():
        if key not in ("bf16", "report_to", "optim", "lr_scheduler_type"):
            assert fields[key] == value, key


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_run_is_that_of_the_paper_and_its_ancestors(path):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    processes = ClusterConfig.from_yaml_file(launch_path("ddp")).num_processes
    batch = written["per_device_train_batch_size"] * written["gradient_accumulation_steps"] * processes
    assert batch == 64 and written["learning_rate"] == 4e-5 and written["warmup_steps"] == 0.05
    assert (written["lora_r"], written["lora_alpha"], written["lora_dropout"]) == (128, 256, 0.05)
    assert (written["adam_beta1"], written["adam_beta2"], written["weight_decay"]) == (0.9, 0.999, 0.05)
    assert written["bf16"] is True and written["gradient_checkpointing"] is True and written["max_length"] == 8192
    for name in ("data", "eval_data"):
        read_recipe(path.parents[1] / written[name])
    assert "general" in {entry.name for entry in read_recipe(path.parents[1] / written["eval_data"]).sources}


def test_the_two_sizes_differ_in_their_names_alone():
    texts = [path.read_text(encoding="utf-8") for path in PUBLISHED]
    assert texts[0].replace("4B", "8B").replace("-4b", "-8b").replace(":4b", ":8b") == texts[1]

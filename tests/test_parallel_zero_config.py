"""What DeepSpeed is told, and what of a user's JSON file is refused; none of it needs DeepSpeed, or another process."""

import json
import sys
from pathlib import Path

import pytest
import torch

from titans_scale.config import ConfigError, EngineConfig, ParallelismConfig, TitansConfig, TrainingConfig
from titans_scale.parallel import check_layout, mesh_sizes
from titans_scale.parallel.zero.engine import import_deepspeed
from titans_scale.parallel.zero.settings import deepspeed_settings

RANKS = 2
SHIPPED = sorted((Path(__file__).parent.parent / "configs" / "deepspeed").glob("*.json"))


def config_with(*, stage=2, file=None, offload=False, clip=1.0):
    """Two micro-batches of two sequences for each rank."""
    return TitansConfig(
        training=TrainingConfig(sequence_length=32, global_batch_tokens=256, micro_batch_size=2, max_grad_norm=clip),
        parallelism=ParallelismConfig(cpu_offload=offload),
        engine=EngineConfig(name="deepspeed", zero_stage=stage, config=None if file is None else str(file)),
    )


def settings_with(tmp_path, content, *, precision="float32"):
    file = tmp_path / "zero.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_settings(config_with(file=file), ranks=RANKS, precision=precision)


def test_our_settings_are_told_in_deepspeed_s_words():
    settings = deepspeed_settings(config_with(stage=3, offload=True, clip=0.5), ranks=RANKS, precision="bfloat16")
    assert (settings["train_batch_size"], settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]) == (8, 2, 2)
    assert (settings["gradient_clipping"], settings["bf16"]["enabled"], settings["communication_data_type"]) == (0.5, True, "fp32")
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (3, "cpu", "cpu")


def test_what_we_do_not_decide_is_passed_through(tmp_path):
    settings = settings_with(tmp_path, {"steps_per_print": 7, "zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000}})
    assert settings["steps_per_print"] == 7
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000 and settings["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3 in .*zero.json, and engine.zero_stage makes it 2"),
        ({"train_batch_size": 64}, "train_batch_size is 64 in .*, and training.global_batch_tokens / .* makes it 8"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu is 1 .*training.micro_batch_size makes it 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1 .* makes it 2"),
        ({"gradient_clipping": 0.3}, r"gradient_clipping is 0.3 .*training.max_grad_norm makes it 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true .*training.dtype makes it false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true .*training.dtype, which knows no float16"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, 'device is "cpu" .*parallelism.cpu_offload makes it "none"'),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, 'device is "nvme" .*parallelism.cpu_offload'),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op is "sum"'),
        ({"communication_data_type": "bf16"}, 'communication_data_type is "bf16" .*float32 makes it "fp32"'),
        ({"optimizer": {"type": "Adam"}}, "has 'optimizer', which optimizer decides here; take it out"),
        ({"scheduler": {"type": "WarmupLR"}}, "has 'scheduler', which lr_scheduler decides here"),
        ({"zero_optimisation": {"stage": 2}}, "unknown key 'zero_optimisation' in .*; did you mean 'zero_optimization'?"),
        ({"bfloat16": {"enabled": False}}, "unknown key 'bfloat16' in .*; did you mean 'bf16'?"),
        ({"xyz": 1}, "unknown key 'xyz' in .*; known are aio, bf16"),
        ({"zero_optimization": 2}, "zero_optimization is 2 in .*; it has to be a mapping"),
        ("[1]", "holds a list; DeepSpeed's settings are a mapping"),
        ("{", "is not valid JSON"),
    ],
)
def test_what_contradicts_ours_is_told_in_one_sentence_with_both_values(tmp_path, content, told):
    with pytest.raises(ConfigError, match=told) as error:
        settings_with(tmp_path, content)
    assert "\n" not in str(error.value)


def test_the_same_value_is_no_contradiction(tmp_path):
    settings_with(tmp_path, {"gradient_clipping": 1, "fp16": {"enabled": False}, "zero_optimization": {"stage": 2, "offload_param": None}})
    settings_with(tmp_path, {"zero_optimization": {"offload_optimizer": {"device": None, "pin_memory": True}}})
    settings_with(tmp_path, {"bf16": {"enabled": True}}, precision="auto")  # as long as nobody knows what it will be


def test_a_missing_file_is_named_before_anything_is_built(tmp_path):
    config = config_with(file=tmp_path / "absent.json")
    with pytest.raises(ConfigError, match=r"absent.json cannot be read \(No such file or directory\); examples are in configs/deepspeed"):
        check_layout(config, mesh_sizes(config.parallelism, RANKS))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_the_files_we_ship_go_with_our_settings(file):
    config = config_with(stage=int(file.name[4]), file=file, offload="offload" in file.name)
    settings = deepspeed_settings(config, ranks=RANKS, precision="bfloat16")
    assert "auto" not in json.dumps(settings)
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    deepspeed_config.DeepSpeedConfig({**settings, "train_batch_size": 4})  # one process, so half as many sequences


def test_there_are_files_to_ship():
    assert [file.name for file in SHIPPED] == ["zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"]


def test_without_deepspeed_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r'that is not installed: pip install "titans-scale\[deepspeed\]", or set engine.name to fsdp2'):
        import_deepspeed(torch.device("cpu"))

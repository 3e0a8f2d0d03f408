"""The estimate: its sums are the model's own numbers, its memory follows what a real forward pass keeps, its errors are sentences."""

import dataclasses
import gc
import json
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from small_models import VARIANTS
from torch.profiler import ProfilerActivity, profile

from titans_scale import TitansLM, load_config
from titans_scale.config import ConfigError, TitansConfig
from titans_scale.models.blocks import BLOCKS
from titans_scale.models.plans import flops_per_token
from titans_scale.parallel import MeshSizes, mesh_sizes
from titans_scale.parallel.planning.activations import block_activation_bytes
from titans_scale.parallel.planning.estimate import Estimate, estimate
from titans_scale.parallel.planning.layouts import COLUMNS, recommended
from titans_scale.parallel.planning.memory_plan import ALLOWANCE_BYTES
from titans_scale.parallel.planning.plan import plan, set_mesh

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "estimate.py"
PRESET = ROOT / "configs" / "lmm_170m.yaml"


@cache
def run_config(variant: str = "mac", *overrides: str) -> TitansConfig:
    settings = [f"model.variant={variant}", "model.dim=64", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=500"]
    settings += ["model.segment_len=64", "model.window=48", "model.memory.num_heads=2", "model.memory.chunk_size=32"]
    settings += ["training.sequence_length=256", "training.micro_batch_size=2", "training.global_batch_tokens=8192", "training.steps=10"]
    return load_config(None, [*settings, *overrides])


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_sum_to_the_parameters_of_the_model(variant, tied):
    config = run_config(variant, f"model.tie_embeddings={tied}")
    model = TitansLM(config.model)
    assert sum(estimate(config).parameters.values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_flops_are_those_that_mfu_is_computed_from(variant):
    config = run_config(variant)
    result = estimate(config)
    assert round(sum(result.training_flops_per_token.values())) == flops_per_token(config.model, config.training.sequence_length)
    assert sum(result.forward_flops_per_token.values()) < sum(result.training_flops_per_token.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_activations_are_what_a_real_forward_pass_leaves_in_memory(variant):
    """Measured by the allocator, on a CPU, whose norms and attention are not fused and keep a little more than is counted."""
    config = run_config(variant).model
    block = BLOCKS[config.variant](config)
    x_BTM = torch.randn(2, 256, config.dim, requires_grad=True)
    gc.collect()  # what an earlier test left must not be freed while we measure
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = block(x_BTM)[0]
    allocated = sum(event.self_cpu_memory_usage for event in profiler.events() or [])
    assert output.requires_grad
    counted = block_activation_bytes(config, batch_size=2, sequence_length=256, dtype=torch.float32)
    assert 0.88 * allocated < counted < 1.02 * allocated


@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_are_linear_in_the_batch_and_nearly_so_in_the_length(variant):
    config = run_config(variant).model
    one, two, long = (
        block_activation_bytes(config, batch_size=batch_size, sequence_length=length, dtype=torch.bfloat16)
        for batch_size, length in ((1, 256), (2, 256), (1, 1024))
    )
    assert two == pytest.approx(2 * one, rel=0.1)
    assert long == pytest.approx(4 * one, rel=0.2)


@cache
def estimated(*overrides: str, world_size: int = 1) -> Estimate:
    return estimate(run_config("mac", *overrides), world_size=world_size)


def test_sharding_divides_the_state_and_leaves_the_activations():
    alone, sharded = estimated(), estimated(world_size=4)
    for part in ("parameters", "gradients", "optimizer state"):
        assert sharded.gpu_bytes[part] == alone.gpu_bytes[part] // 4
    assert sharded.gpu_bytes["activations"] == alone.gpu_bytes["activations"]


def test_adamw_in_float32_takes_sixteen_bytes_a_parameter():
    state = sum(estimated().gpu_bytes[part] for part in ("parameters", "gradients", "optimizer state"))
    assert state == 16 * sum(estimated().parameters.values())


def test_replicas_do_not_divide_the_state():
    replicated = estimated("parallelism.data_parallel_replicate=2", world_size=4)
    assert replicated.gpu_bytes["optimizer state"] == estimated(world_size=2).gpu_bytes["optimizer state"]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("activation_checkpoint.mode=full", "activations"),
        ("training.micro_batch_size=1", "activations"),
        ("training.global_batch_tokens=512", "gradients before reduction"),
        ("model.vocab_size=250", "logits and loss"),
        ("model.num_layers=1", "optimizer state"),
    ],
)
def test_what_should_save_memory_does(override, part):
    assert estimated(override).gpu_bytes[part] < estimated().gpu_bytes[part]


def test_resharding_keeps_fewer_parameters_gathered():
    kept, resharded = (estimated("model.num_layers=8", f"parallelism.reshard_after_forward={value}") for value in ("false", "true"))
    assert resharded.gpu_bytes["gathered parameters"] < kept.gpu_bytes["gathered parameters"]


def test_time_is_flops_over_what_the_gpus_do():
    result = estimate(run_config(), world_size=4, mfu=0.5, peak_tflops=100)
    assert (result.tokens, result.accumulation_steps) == (10 * 8192, 4)
    seconds = result.tokens * sum(result.training_flops_per_token.values()) / (4 * 0.5 * 100e12)
    assert result.hours * 3600 == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"world_size": 0}, "the world size is 0"),
        ({"world_size": 3}, "not a multiple of sequence_length 256 .* 3 ranks"),
        ({"world_size": 32}, "not a multiple of sequence_length 256 .* 32 ranks"),
        ({"mfu": 40.0}, "the MFU is 40.0; it must be above 0 and at most 1"),
        ({"peak_tflops": -1.0}, "must be positive"),
    ],
)
def test_numbers_that_cannot_be_are_told(arguments, told):
    with pytest.raises(ConfigError, match=told):
        estimate(run_config(), **arguments)


def test_context_ranks_read_the_same_data_and_share_its_activations():
    alone, shared = estimated(), estimated("parallelism.context_parallel=2", world_size=2)
    assert shared.accumulation_steps == alone.accumulation_steps
    assert shared.gpu_bytes["optimizer state"] == alone.gpu_bytes["optimizer state"] // 2
    assert 0.4 < shared.gpu_bytes["activations"] / alone.gpu_bytes["activations"] < 0.6


def test_tensor_ranks_share_everything():
    alone, shared = estimated(), estimated("parallelism.tensor_parallel=2", world_size=2)
    for part in ("parameters", "optimizer state", "activations", "gathered parameters"):
        assert shared.gpu_bytes[part] == pytest.approx(alone.gpu_bytes[part] / 2, rel=0.01)


def test_an_offloaded_optimizer_takes_no_gpu_memory():
    assert estimated("parallelism.cpu_offload=true").gpu_bytes["optimizer state"] == 0


def test_each_zero_stage_takes_less_than_the_one_before():
    stages = [estimated("engine.name=deepspeed", f"engine.zero_stage={stage}", "model.num_layers=8", world_size=4) for stage in (1, 2, 3)]
    whole, buckets, resharded = ({**stage.gpu_bytes} for stage in stages)
    assert whole["optimizer state"] == buckets["optimizer state"] == resharded["optimizer state"]
    assert whole["gathered parameters"] == buckets["gathered parameters"] > resharded["gathered parameters"]
    assert whole["gradients before reduction"] >= buckets["gradients before reduction"]


def test_formulas_come_near_the_rehearsal():
    """Within a quarter: the one counts a block's backward pass as a second block, the other what it really makes."""
    result = plan(run_config("mag", "model.num_layers=6", "parallelism.reshard_after_forward=false"), world_size=4)
    formulas = sum(result.estimate.gpu_bytes.values()) - ALLOWANCE_BYTES
    assert sum(result.gpu_bytes.values()) - ALLOWANCE_BYTES == pytest.approx(formulas, rel=0.25)


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ("replcate=64", "--mesh has 'replcate=64'; write replicate=N, shard=N, context=N, tensor=N, any of them"),
        ("replicate=many", "--mesh has 'replicate=many'; replicate takes a whole number, or -1 for all ranks that are left"),
    ],
)
def test_a_mistyped_mesh_is_told(mesh, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        set_mesh(run_config().parallelism, mesh)


def test_a_mesh_sets_what_it_names():
    config = load_config(None, ["parallelism.tensor_parallel=2"])
    set_mesh(config.parallelism, "replicate=4, shard=-1")
    assert mesh_sizes(config.parallelism, 64) == MeshSizes(replicate=4, shard=8, context=1, tensor=2)


SMALL = ["--model.num_layers=1", "--model.memory.chunk_size=1024", "--training.micro_batch_size=1", "--world", "8"]


def test_the_tool_prints_the_table_and_the_same_numbers_as_json(capsys):
    main = runpy.run_path(str(TOOL))["main"]
    arguments = ["--config", str(PRESET), *SMALL, "--mesh", "replicate=2,shard=4"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {field.name for field in dataclasses.fields(Estimate)} < set(printed)
    assert {"collectives_per_step", "step_seconds", "parameters_here"} < set(printed)
    by_kind = {(one["kind"], one["dimension"]) for one in printed["collectives_per_step"]}
    assert {("all-gather", "shard"), ("reduce-scatter", "shard"), ("all-reduce", "replicate")} <= by_kind
    for value in (
        f"{printed['parameters_total'] / 1e6:,.1f} M",
        f"{printed['gpu_bytes_total'] / 2**30:,.2f} GiB",
        f"{printed['step_seconds']['step'] * 1e3:,.1f} ms",
        "15.000 G",
        "28,610",
    ):
        assert value in shown


def test_the_tool_can_leave_the_rehearsal_out(capsys):
    main = runpy.run_path(str(TOOL))["main"]
    assert main(["--config", str(PRESET), *SMALL, "--quick"]) == 0
    assert "estimated: formulas" in capsys.readouterr().out


def test_the_tool_tells_a_mistake_in_one_line():
    command = [sys.executable, str(TOOL), "--config", str(PRESET), "--wrld", "8"]
    failed = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert failed.returncode == 2
    assert failed.stderr == "estimate: unknown key 'wrld' on the command line; did you mean 'world'?\n"


@pytest.mark.parametrize(("same_batch", "widest"), [(False, (64, 8, 1, 1, 2**21)), (True, (64, 2, 4, 1, 2**19))])
def test_layouts_put_a_copy_in_each_node_and_give_every_rank_something_to_read(same_batch, widest):
    config = load_config(PRESET)  # 128 sequences a step, 4 at once
    expected = {1: (1, 1, 1, 4, 2**19), 8: (1, 8, 1, 4, 2**19), 64: (8, 8, 1, 2, 2**19), 512: widest}
    found = {world_size: recommended(config, world_size, gpus_per_node=8, same_batch=same_batch) for world_size in expected}
    assert {world_size: dataclasses.astuple(layout) for world_size, layout in found.items()} == expected


def test_the_layouts_are_a_table_of_one_line_each(capsys):
    main = runpy.run_path(str(ROOT / "tools" / "layouts.py"))["main"]
    assert main([str(PRESET), "--worlds", "8", "512"]) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in (head, rule, *rows)} == {len(COLUMNS) + 1}
    assert [row.split(" | ")[3] for row in rows] == ["1 x 8 x 1", "64 x 8 x 1"]

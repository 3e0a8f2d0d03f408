"""Sizes of the device mesh, who belongs to which group, and what cannot be split that way."""

import pytest
from distributed import run_ranks
from torch.distributed import get_process_group_ranks
from training_runs import small_config

from titans_scale.config import ConfigError, ParallelismConfig
from titans_scale.parallel import Mesh, MeshSizes, check_layout, mesh_sizes


def sizes(world_size, **settings):
    return mesh_sizes(ParallelismConfig(**settings), world_size)


def test_the_default_shards_over_all_ranks():
    assert sizes(6) == MeshSizes(replicate=1, shard=6)


def test_minus_one_is_what_is_left():
    assert sizes(8, data_parallel_replicate=2) == MeshSizes(replicate=2, shard=4)
    assert sizes(8, data_parallel_replicate=-1, data_parallel_shard=2) == MeshSizes(replicate=4, shard=2)
    assert sizes(24, context_parallel=3, tensor_parallel=2) == MeshSizes(replicate=1, shard=4, context=3, tensor=2)
    assert sizes(8, data_parallel_shard=1, tensor_parallel=-1) == MeshSizes(replicate=1, shard=1, tensor=8)


@pytest.mark.parametrize(
    ("world_size", "settings", "sentence"),
    [
        (4, {"data_parallel_replicate": 3}, "data_parallel_replicate 3 does not fit 4 ranks; start 3 ranks or a multiple of it"),
        (1, {"data_parallel_replicate": 2, "data_parallel_shard": 2}, "does not fit 1 rank; start 4 ranks"),
        (4, {"data_parallel_replicate": -1}, "data_parallel_replicate and parallelism.data_parallel_shard are both -1"),
        (4, {"context_parallel": -1}, "data_parallel_shard and parallelism.context_parallel are both -1"),
        (4, {"data_parallel_shard": 0}, "data_parallel_shard is 0"),
        (
            6,
            {"context_parallel": 2, "tensor_parallel": 2},
            r"context_parallel 2 \* tensor_parallel 2 does not fit 6 ranks; start 4 ranks or",
        ),
        (4, {"tensor_parallel": -2}, "tensor_parallel is -2; it must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_the_ranks_are_refused(world_size, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        sizes(world_size, **settings)


def groups_of_a_rank():
    mesh = Mesh(MeshSizes(replicate=1, shard=1, context=2, tensor=2), "cpu")
    hybrid = Mesh(MeshSizes(replicate=2, shard=2), "cpu")
    assert mesh.context is not None and mesh.tensor is not None
    ranks = [get_process_group_ranks(group.get_group()) for group in (mesh.tensor, mesh.context, mesh.fsdp)]
    return {
        "groups": ranks,
        "places": (mesh.data_rank, mesh.context_rank, mesh.tensor_rank, mesh.is_first_reader),
        "replicas": hybrid.fsdp.mesh.tolist(),
        "data": hybrid.data_rank,
        "alone": (hybrid.context, hybrid.tensor),
    }


def test_neighbours_share_layers_then_sequences_then_parameters():
    first, second, third, fourth = run_ranks(groups_of_a_rank, 4)
    assert first["groups"] == [[0, 1], [0, 2], [0, 2]]
    assert fourth["groups"] == [[2, 3], [1, 3], [1, 3]]
    assert [rank["places"] for rank in (first, second, third)] == [(0, 0, 0, True), (0, 0, 1, False), (0, 1, 0, False)]
    assert first["replicas"] == [[0, 1], [2, 3]]
    assert [rank["data"] for rank in (first, second, third, fourth)] == [0, 1, 2, 3]
    assert first["alone"] == (None, None)


@pytest.mark.parametrize(
    ("changes", "layout", "sentence"),
    [
        ({"model.num_heads": 4}, {"tensor": 4}, "memory.num_heads, 2, does not divide by .*tensor_parallel 4; .*or memory_split to hidden"),
        ({"model.memory.num_heads": 4}, {"tensor": 4}, "model.num_heads, 2, does not divide by"),
        ({"model.mlp_dim": 33}, {"tensor": 2}, r"\(model.mlp_dim\), 33, does not divide by"),
        (
            {"parallelism.memory_split": "hidden", "model.memory.depth": 3},
            {"tensor": 2},
            "model.memory.depth is 3; set it to 2, or memory_split",
        ),
        ({"parallelism.memory_split": "hidden", "model.variant": "lmm"}, {"tensor": 3}, "does not divide by parallelism.tensor_parallel 3"),
        ({}, {"context": 4}, r"sequence_length 32 does not divide by .*4 ranks \* model.segment_len 16"),
        ({"model.variant": "mag"}, {"context": 3}, "sequence_length 32 does not divide by .*3 ranks; change"),
        ({"data.reset_at_document": "true"}, {"context": 2}, "data.reset_at_document ends it"),
        ({"engine.name": "deepspeed"}, {"tensor": 2}, "tensor_parallel is 2, and engine deepspeed"),
        ({"engine.config": "zero.json"}, {}, "engine.config zero.json is for DeepSpeed; set engine.name"),
    ],
)
def test_what_cannot_be_split_is_refused(changes, layout, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_layout(small_config("data", "run", changes), MeshSizes(**{"replicate": 1, "shard": 1, **layout}))


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"model.variant": "mac"}, {"context": 2, "tensor": 2}),
        ({"model.variant": "lmm", "model.num_heads": 1}, {"tensor": 2}),  # no attention to split
        ({"parallelism.memory_split": "hidden", "model.memory.num_heads": 1}, {"tensor": 2}),
        ({"engine.name": "deepspeed"}, {"shard": 8}),
    ],
)
def test_what_can_be_split_is_let_through(changes, layout):
    check_layout(small_config("data", "run", changes), MeshSizes(**{"replicate": 1, "shard": 1, **layout}))

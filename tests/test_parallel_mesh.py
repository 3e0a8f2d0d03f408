"""Sizes of the device mesh."""

import pytest

from titans_scale.config import ConfigError, ParallelismConfig
from titans_scale.parallel import MeshSizes, mesh_sizes


def sizes(world_size, **settings):
    return mesh_sizes(ParallelismConfig(**settings), world_size)


def test_the_default_shards_over_all_ranks():
    assert sizes(6) == MeshSizes(replicate=1, shard=6)


def test_minus_one_is_what_is_left():
    assert sizes(8, data_parallel_replicate=2) == MeshSizes(replicate=2, shard=4)
    assert sizes(8, data_parallel_replicate=-1, data_parallel_shard=2) == MeshSizes(replicate=4, shard=2)


@pytest.mark.parametrize(
    ("world_size", "settings", "sentence"),
    [
        (4, {"data_parallel_replicate": 3}, "data_parallel_replicate 3 does not fit 4 ranks; start 3 ranks or a multiple of it"),
        (1, {"data_parallel_replicate": 2, "data_parallel_shard": 2}, "does not fit 1 rank; start 4 ranks"),
        (4, {"data_parallel_replicate": -1}, "are both -1"),
        (4, {"data_parallel_shard": 0}, "data_parallel_shard is 0"),
    ],
)
def test_sizes_that_do_not_fit_the_ranks_are_refused(world_size, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        sizes(world_size, **settings)

"""What FSDP2 and HSDP send in a step, by formula: for layouts without tensor and context parallelism, in a second.

tests/test_estimate_world.py holds it to what a rehearsed step really issues.
"""

from collections.abc import Iterable

import torch

from titans_scale.config import TitansConfig
from titans_scale.models import TitansLM
from titans_scale.models.plans import fsdp_groups
from titans_scale.parallel.mesh import MeshSizes
from titans_scale.parallel.planning.memory_plan import compute_dtype
from titans_scale.parallel.planning.traffic import Collective, Pass, Traffic


def sharding_passes(config: TitansConfig, sizes: MeshSizes, accumulation_steps: int) -> list[Pass]:
    """Rank 0's collectives in each micro-batch of a step.

    Every group of modules is gathered in the compute precision and reduced in float32: with P numbers and n shards, an all-gather of P, a
    reduce-scatter of P and, over replicas, an all-reduce of P / n. Kept parameters are gathered once a step. With reshard_after_forward
    they are in every micro-batch, those of all groups but the last once more in its backward pass. Gradients are reduced in the last
    micro-batch.
    """
    groups, root = padded_groups(config, sizes.shard)
    again = groups[:-1] if config.parallelism.reshard_after_forward else []
    groups = [*groups, *root]
    passes = []
    for number in range(accumulation_steps):
        forward, backward = Traffic(), Traffic()
        if number == 0 or config.parallelism.reshard_after_forward:
            _gather(forward, groups, config, sizes)
        _gather(backward, again, config, sizes)
        if number == accumulation_steps - 1:
            _reduce(backward, groups, sizes)
        passes.append(Pass(forward=forward, backward=backward))
    return passes


def padded_groups(config: TitansConfig, shards: int) -> tuple[list[int], list[int]]:
    """Numbers of each group that is gathered at once, and of the root if it has any: dimension 0 of a parameter is filled up to a multiple
    of the shards.
    """
    with torch.device("meta"):
        model = TitansLM(config.model)
    groups = [_padded((x for module in group for x in module.parameters()), shards) for group in fsdp_groups(model)]
    root = _padded(model.parameters(), shards) - sum(groups)
    return groups, [root] if root else []


def _padded(parameters: Iterable[torch.Tensor], shards: int) -> int:
    return sum(-(-x.shape[0] // shards) * shards * x[0].numel() for x in parameters)


def _gather(traffic: Traffic, groups: list[int], config: TitansConfig, sizes: MeshSizes) -> None:
    ranks = tuple(range(sizes.shard))
    for numbers in groups if sizes.shard > 1 else []:
        size = compute_dtype(config).itemsize * numbers
        traffic.add(Collective(kind="all-gather", dimension="shard", ranks=ranks, calls=1, bytes=size))


def _reduce(traffic: Traffic, groups: list[int], sizes: MeshSizes) -> None:
    ranks, copies = tuple(range(sizes.shard)), tuple(range(0, sizes.data, sizes.shard))
    for numbers in groups:
        if sizes.shard > 1:
            traffic.add(Collective(kind="reduce-scatter", dimension="shard", ranks=ranks, calls=1, bytes=4 * numbers))
        if sizes.replicate > 1:
            traffic.add(Collective(kind="all-reduce", dimension="replicate", ranks=copies, calls=1, bytes=4 * numbers // sizes.shard))

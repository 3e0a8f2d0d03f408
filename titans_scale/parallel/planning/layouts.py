"""Layouts for models that fit one GPU, on any number of them, and what is predicted for each: the tables of docs/scaling.md."""

from copy import deepcopy
from dataclasses import dataclass

from titans_scale.config import TitansConfig
from titans_scale.parallel.planning.plan import Plan, plan
from titans_scale.parallel.planning.step_time import Links


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the mesh, and sequences a GPU takes at once."""

    replicate: int
    shard: int
    context: int
    micro_batch_size: int
    global_batch_tokens: int


def recommended(config: TitansConfig, world_size: int, *, gpus_per_node: int, same_batch: bool) -> Layout:
    """One copy of the model a node. Where there are more ranks than sequences in the global batch, either the batch grows until each
    rank has one or, with same_batch, ranks share sequences.
    """
    length, tokens = config.training.sequence_length, config.training.global_batch_tokens
    context = max(1, world_size * length // tokens) if same_batch else 1
    data, copy = world_size // context, min(world_size, gpus_per_node)
    tokens = max(tokens, data * length)
    return Layout(
        replicate=world_size // copy,
        shard=max(1, copy // context),
        context=context,
        micro_batch_size=min(config.training.micro_batch_size, tokens // length // data),
        global_batch_tokens=tokens,
    )


def planned(config: TitansConfig, layout: Layout, *, mfu: float, links: Links, rehearsed: bool) -> Plan:
    """The plan of a configuration in that layout."""
    config = deepcopy(config)
    parallelism = config.parallelism
    parallelism.data_parallel_replicate, parallelism.data_parallel_shard = layout.replicate, layout.shard
    parallelism.context_parallel, parallelism.tensor_parallel = layout.context, 1
    config.training.micro_batch_size = layout.micro_batch_size
    config.training.global_batch_tokens = layout.global_batch_tokens
    world_size = layout.replicate * layout.shard * layout.context
    return plan(config, world_size=world_size, mfu=mfu, links=links, rehearsed=rehearsed)


COLUMNS = (
    "preset",
    "GPUs",
    "tokens a step",
    "replicate x shard x context",
    "sequences x micro-batches",
    "GiB of a GPU",
    "GB on NVLink",
    "GB on the network",
    "compute ms",
    "bubble ms",
    "beside ms",
    "in the way ms",
    "step ms",
    "of it compute",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def row(name: str, result: Plan, layout: Layout, links: Links) -> str:
    """One line of a Markdown table under HEAD. Bytes are what a rank sends in a step."""
    assert result.traffic is not None and result.time is not None, "context parallelism has no formula; rehearse it"
    nvlink = network = 0.0
    for collective in result.traffic:
        if links.nodes(collective.ranks) == 1:
            nvlink += collective.wire_bytes
        else:
            network += collective.wire_bytes
    time = result.time
    cells = [
        name,
        result.estimate.world_size,
        f"{layout.global_batch_tokens / 2**20:g}M",
        f"{layout.replicate} x {layout.shard} x {layout.context}",
        f"{layout.micro_batch_size} x {result.estimate.accumulation_steps}",
        f"{sum(result.gpu_bytes.values()) / 2**30:.1f}",
        *(f"{sent / 1e9:.2f}" for sent in (nvlink, network)),
        *(f"{seconds * 1e3:.1f}" for seconds in (time.compute, time.bubble, time.beside, time.in_the_way, time.step)),
        f"{time.compute / time.step:.0%}",
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"

"""How long a step would take on links of given speeds: a prediction from the collectives of a step, not a measurement.

A collective over n ranks takes `calls * (start + hops) + wire bytes / rate`, as NCCL's own cost model has it for a ring. Gathers and
reductions of parameters and gradients run beside the computation of other blocks; what tensor and context parallelism send stands in its
way. The optimizer's own work, the input and a GPU's host are taken to cost nothing, and a CPU offload's copies are left out.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from titans_scale.config import ConfigError
from titans_scale.parallel.planning.traffic import MESSAGES, Collective, Pass, Traffic, total_of

NVLINK_GBS = 450.0
"""One direction of an H100 SXM's NVLink (NVIDIA's data sheet: 900 GB/s both ways)."""
NETWORK_GBS = 50.0
"""One direction of a GPU's own 400 Gb/s network card, as in NVIDIA's DGX H100."""
START_SECONDS = 10e-6
NVLINK_HOP_SECONDS = 1.9e-6
NETWORK_HOP_SECONDS = 4.0e-6
"""Start of a ring collective, and of each of its n - 1 steps, over either link: NCCL's tuning table for its LL128 protocol."""
BESIDE = ("shard", "replicate")
"""Dimensions whose collectives run beside the computation."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """What joins the GPUs. Rates in GB/s, one direction, of one GPU."""

    nvlink_gbs: float = NVLINK_GBS
    network_gbs: float = NETWORK_GBS
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ConfigError(f"{name} is {value}; it must be positive")

    def nodes(self, ranks: tuple[int, ...]) -> int:
        """How many nodes a group is spread over."""
        return len({rank // self.gpus_per_node for rank in ranks})

    def seconds(self, collective: Collective) -> float:
        """Of all its calls, one after the other.

        Inside a node the rate is NVLink's. A group with m ranks in each of several nodes leaves a node over m network cards at once, in as
        many rings, so its rate is m times a card's, or NVLink's where that is less. A message to a neighbour goes over one card.
        """
        ranks, nodes = len(collective.ranks), self.nodes(collective.ranks)
        inside = NVLINK_HOP_SECONDS, self.nvlink_gbs
        if collective.kind in MESSAGES:
            hop, rate = inside if nodes == 1 else (NETWORK_HOP_SECONDS, self.network_gbs)
            return collective.calls * (START_SECONDS + hop) + collective.bytes / (rate * 1e9)
        rate = self.nvlink_gbs if nodes == 1 else min(self.nvlink_gbs, ranks / nodes * self.network_gbs)
        hops = (ranks - nodes) * NVLINK_HOP_SECONDS + (nodes - 1) * NETWORK_HOP_SECONDS
        around = 2 if collective.kind == "all-reduce" else 1
        return collective.calls * (START_SECONDS + around * hops) + collective.wire_bytes / (rate * 1e9)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step of one rank, predicted."""

    compute: float
    bubble: float
    """Waiting for the ranks with earlier tokens (context parallelism)."""
    beside: float
    """Communication that runs beside the computation, hidden or not."""
    in_the_way: float
    """Communication that nothing hides: that of tensor and context parallelism, of the optimizer, the first gather, the last reduction."""
    step: float
    """Compute, bubble, what is in the way, and of what runs beside as much as is not hidden."""
    by_dimension: dict[str, float]
    """All communication, by mesh dimension."""


def predict(
    passes: list[Pass],
    optimizer: Traffic,
    links: Links,
    *,
    micro_batch_flops: float,
    flops_per_second: float,
    layers: int,
    context: int,
    root_share: float,
) -> StepTime:
    """The time of a step.

    Each pass takes max(compute + bubble, what runs beside) + what is in the way; a third of the compute is the forward pass's. R context
    ranks work as a wavefront over L layers: L + R - 1 layer times in place of L.

    Args:
        passes, optimizer: what one rank sends in each micro-batch, and when it clips and steps.
        micro_batch_flops: model FLOPs of one micro-batch on one rank.   flops_per_second: what a GPU achieves, peak * MFU.
        layers, context: L and R.
        root_share: of the parameters, those that are gathered first and reduced last, with nothing to run beside.
    """
    compute = micro_batch_flops / flops_per_second
    bubble = compute * (context - 1) / layers
    step = beside = in_the_way = 0.0
    for number, one in enumerate(passes):
        for traffic, share, alone in (
            (one.forward, 1 / 3, number == 0),
            (one.backward, 2 / 3, number == len(passes) - 1),
        ):
            hideable = _seconds(links, (x for x in traffic if x.dimension in BESIDE))
            stuck = _seconds(links, (x for x in traffic if x.dimension not in BESIDE))
            if alone:
                stuck, hideable = stuck + root_share * hideable, (1 - root_share) * hideable
            beside += hideable
            in_the_way += stuck
            step += max(share * (compute + bubble), hideable) + stuck
    last = _seconds(links, optimizer)
    by_dimension: dict[str, float] = {}
    for collective in total_of(passes, optimizer):
        by_dimension[collective.dimension] = by_dimension.get(collective.dimension, 0.0) + links.seconds(collective)
    number = len(passes)
    return StepTime(
        compute=number * compute,
        bubble=number * bubble,
        beside=beside,
        in_the_way=in_the_way + last,
        step=step + last,
        by_dimension=by_dimension,
    )


def _seconds(links: Links, collectives: Iterable[Collective]) -> float:
    return sum(links.seconds(collective) for collective in collectives)

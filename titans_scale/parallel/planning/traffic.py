"""Collectives of one rank: which, over which dimension of the mesh, how often and how large.

Bytes are those of whole tensors, as NCCL's own tests count them: what an all-gather returns, what a reduce-scatter takes, what an
all-reduce sums, what a send sends. What each rank puts on the wire for that: `Collective.wire_bytes`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._pytree import tree_leaves

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
KINDS = {
    "reduce_scatter": "reduce-scatter",
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "broadcast": "broadcast",
    "alltoall": "all-to-all",
    "all_to_all": "all-to-all",
    "send": "send",
    "recv": "receive",
}
"""Of torch's operators, by a part of their names."""
WAITS = ("wait_tensor", "barrier")
MESSAGES = ("send", "receive")
"""Kinds that have one rank at the other end."""
Dimensions = Callable[[dist.ProcessGroup, str], str]
"""The name of the mesh dimension that a kind of collective over a process group is for."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Calls of one kind over one group."""

    kind: str
    """One of those above."""
    dimension: str
    """Of the mesh."""
    ranks: tuple[int, ...]
    """Of the group, as numbers in the world."""
    calls: float
    bytes: float
    """All calls together."""

    @property
    def wire_bytes(self) -> float:
        """What a rank sends: over a ring of n (n - 1) / n of the bytes, for an all-reduce twice that; a send all; a receive nothing."""
        around = (len(self.ranks) - 1) / len(self.ranks)
        shares = {"send": 1.0, "receive": 0.0, "broadcast": 1.0, "all-reduce": 2 * around}
        return shares.get(self.kind, around) * self.bytes

    def times(self, factor: float) -> "Collective":
        return replace(self, calls=factor * self.calls, bytes=factor * self.bytes)


class Traffic:
    """A sum of collectives, kept by kind and group."""

    def __init__(self) -> None:
        self._collectives: dict[tuple[str, str, tuple[int, ...]], Collective] = {}

    def __iter__(self) -> Iterator[Collective]:
        return iter(self._collectives.values())

    def add(self, new: Collective) -> None:
        key = (new.kind, new.dimension, new.ranks)
        old = self._collectives.get(key)
        self._collectives[key] = new if old is None else replace(old, calls=old.calls + new.calls, bytes=old.bytes + new.bytes)

    def add_all(self, other: "Traffic", times: float = 1) -> None:
        """Another's collectives, so many times: a negative number takes them away."""
        for collective in other:
            self.add(collective.times(times))

    def to_dicts(self) -> list[dict[str, Any]]:
        """For machines; of the ranks of a group the first and their number."""
        rows = []
        for collective in self:
            row = asdict(collective) | {"wire_bytes": collective.wire_bytes, "group_size": len(collective.ranks)}
            del row["ranks"]
            rows.append(row)
        return rows


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Collectives of one micro-batch."""

    forward: Traffic
    backward: Traffic


def total_of(passes: Iterable[Pass], optimizer: Traffic) -> Traffic:
    """Of a whole step: its micro-batches, and clipping and stepping."""
    total = Traffic()
    for part in (*(part for one in passes for part in (one.forward, one.backward)), optimizer):
        total.add_all(part)
    return total


def collective_of(func: Any, args: Any, kwargs: Any, result: Any, dimension_of: Dimensions) -> Collective | None:
    """The collective that an operator of torch issues; None: it is none, or only waits, or has a rank by itself."""
    name = func._schema.name.split("::")[1]
    if func.namespace not in NAMESPACES or any(wait in name for wait in WAITS):
        return None
    kind = next((kind for part, kind in KINDS.items() if part in name), None)
    assert kind is not None, f"the collective {name} is not known here; give it a kind"
    group = _group_of(func, args, kwargs)
    ranks = tuple(dist.get_process_group_ranks(group))
    if len(ranks) == 1:
        return None
    sizes = [sum(x.numel() * x.element_size() for x in tree_leaves(value) if isinstance(x, Tensor)) for value in (*args, result)]
    return Collective(kind=kind, dimension=dimension_of(group, kind), ranks=ranks, calls=1, bytes=max(sizes))


def _group_of(func: Any, args: Any, kwargs: Any) -> dist.ProcessGroup:
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    if "process_group" in named:
        return dist.ProcessGroup.unbox(named["process_group"])
    return _resolve_process_group(named["group_name"])

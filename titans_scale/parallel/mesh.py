"""How the ranks are laid out: replicas of the model, shards of a replica, blocks of a sequence, parts of a layer.

A rank's number counts through these dimensions with the last changing fastest, so that those who talk most are neighbours: tensor
(several times a layer), context (once a layer), shard (parameters and gradients), replicate (gradients).
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titans_scale.config import ConfigError, ParallelismConfig

DIMENSIONS = ("data_parallel_replicate", "data_parallel_shard", "context_parallel", "tensor_parallel")


@dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Ranks along each dimension of the mesh."""

    replicate: int
    """Copies of the whole model; gradients are all-reduced over them."""
    shard: int
    """Ranks that share one copy, each with a slice of every parameter, and read different data."""
    context: int = 1
    """Ranks that share a sequence, each with a block of it. They share the copy's parameters too."""
    tensor: int = 1
    """Ranks that share every layer."""

    @property
    def data(self) -> int:
        """Ranks that read different data."""
        return self.replicate * self.shard

    @property
    def same_data(self) -> int:
        """Ranks that read the same data."""
        return self.context * self.tensor

    def __str__(self) -> str:
        named = {"replicate": self.replicate, "shard": self.shard, "context": self.context, "tensor": self.tensor}
        return " x ".join(f"{name} {size}" for name, size in named.items() if size > 1 or name == "shard")


def mesh_sizes(config: ParallelismConfig, world_size: int) -> MeshSizes:
    """Resolve -1 ("all ranks that are left") and check that the product is the number of ranks.

    Raises:
        ConfigError: sizes that cannot be made from world_size ranks.
    """
    sizes: dict[str, int] = {name: getattr(config, name) for name in DIMENSIONS}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"parallelism.{name} is {size}; it must be at least 1, or -1 for all ranks that are left")
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(f"{' and '.join(f'parallelism.{name}' for name in rest)} are both -1; only one can be the rest")
    given = 1
    for size in sizes.values():
        given *= 1 if size == -1 else size
    if rest and world_size % given == 0:
        sizes[rest[0]] = world_size // given
    elif rest or given != world_size:
        shape = " * ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "data_parallel_shard 1"
        way_out = "ranks or a multiple of it" if rest else "ranks, or set data_parallel_shard to -1"
        raise ConfigError(f"parallelism.{shape} does not fit {world_size} rank{'s' if world_size > 1 else ''}; start {given} {way_out}")
    replicate, shard, context, tensor = sizes.values()
    return MeshSizes(replicate=replicate, shard=shard, context=context, tensor=tensor)


class Mesh:
    """The groups that this rank belongs to, one for each kind of sharing. All ranks make it together.

    Args:
        device_type: "cuda" or "cpu".
    """

    def __init__(self, sizes: MeshSizes, device_type: str) -> None:
        self.sizes = sizes
        # One mesh for parameters: ranks with blocks of the same sequence shard them as those with other sequences do.
        shape = {"replicate": sizes.replicate, "shard": sizes.shard * sizes.context, "tensor": sizes.tensor}
        kept = {name: size for name, size in shape.items() if size > 1 or name == "shard"}
        self._parameters = init_device_mesh(device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))
        by_use = (sizes.replicate, sizes.shard, sizes.context, sizes.tensor)
        self._by_use = (
            init_device_mesh(device_type, by_use, mesh_dim_names=("replicate", "shard", "context", "tensor")) if sizes.context > 1 else None
        )

    @property
    def fsdp(self) -> DeviceMesh:
        """For `fully_shard`: one dimension for FSDP2; two, replicas outside, for HSDP."""
        return self._parameters["replicate", "shard"] if self.sizes.replicate > 1 else self._parameters["shard"]

    @property
    def tensor(self) -> DeviceMesh | None:
        """The ranks that share every layer with this one; None: it has them to itself."""
        return self._parameters["tensor"] if self.sizes.tensor > 1 else None

    @property
    def context(self) -> DeviceMesh | None:
        """The ranks that share this one's sequences, in the order of their blocks; None: it has them to itself."""
        return None if self._by_use is None else self._by_use["context"]

    @property
    def tensor_rank(self) -> int:
        """This rank's place among those that share every layer."""
        return dist.get_rank() % self.sizes.tensor

    @property
    def context_rank(self) -> int:
        """Which block of the sequence this rank has."""
        return dist.get_rank() // self.sizes.tensor % self.sizes.context

    @property
    def data_rank(self) -> int:
        """Which data this rank reads, of `sizes.data`."""
        return dist.get_rank() // self.sizes.same_data

    @property
    def is_first_reader(self) -> bool:
        """Whether this rank counts for all that read the same data."""
        return dist.get_rank() % self.sizes.same_data == 0

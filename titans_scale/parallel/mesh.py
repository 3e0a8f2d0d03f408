"""How the ranks are laid out: replicas of the model times shards of one replica."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titans_scale.config import ConfigError, ParallelismConfig


@dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Ranks along each dimension of the mesh."""

    replicate: int
    """Copies of the whole model; gradients are all-reduced over them."""
    shard: int
    """Ranks that share one copy, each with a slice of every parameter."""

    def __str__(self) -> str:
        return f"replicate {self.replicate} x shard {self.shard}" if self.replicate > 1 else f"shard {self.shard}"


def mesh_sizes(config: ParallelismConfig, world_size: int) -> MeshSizes:
    """Resolve -1 ("all ranks that are left") and check that the product is the number of ranks.

    Raises:
        ConfigError: sizes that cannot be made from world_size ranks.
    """
    sizes = {"data_parallel_replicate": config.data_parallel_replicate, "data_parallel_shard": config.data_parallel_shard}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"parallelism.{name} is {size}; it must be at least 1, or -1 for all ranks that are left")
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) == 2:
        raise ConfigError("parallelism.data_parallel_replicate and parallelism.data_parallel_shard are both -1; only one can be the rest")
    given = sizes["data_parallel_replicate"] * sizes["data_parallel_shard"] * (-1 if rest else 1)
    if rest and world_size % given == 0:
        sizes[rest[0]] = world_size // given
    elif rest or given != world_size:
        shape = " * ".join(f"{name} {size}" for name, size in sizes.items() if size != -1)
        raise ConfigError(
            f"parallelism.{shape} does not fit {world_size} rank{'s' if world_size > 1 else ''};"
            f" start {given} ranks{' or a multiple of it' if rest else ''}, or set data_parallel_shard to -1"
        )
    return MeshSizes(replicate=sizes["data_parallel_replicate"], shard=sizes["data_parallel_shard"])


def build_mesh(sizes: MeshSizes, device_type: str) -> DeviceMesh:
    """The mesh for `fully_shard`: one dimension for FSDP2; two, replicas outside, for HSDP. Neighbouring ranks share a replica."""
    if sizes.replicate == 1:
        return init_device_mesh(device_type, (sizes.shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(device_type, (sizes.replicate, sizes.shard), mesh_dim_names=("dp_replicate", "dp_shard"))

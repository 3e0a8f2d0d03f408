"""Values for a model that was built on the meta device and sharded there: one full parameter at a time passes through host memory."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titans_scale.models import TitansLM


def materialize(model: TitansLM, device: torch.device, *, seed: int) -> None:
    """Allocate every parameter on `device` and give it its initial value: this rank's slice of a full tensor that all ranks make alike."""
    model.to_empty(device=device)
    assert not list(model.buffers()), "a buffer has no initial value here; compute it in forward, or yield it from initial_values"
    missing = dict(model.named_parameters())
    for name, value in model.initial_values(seed):
        fill(missing.pop(name), value)
    assert not missing, f"initial_values gave nothing for {sorted(missing)}"


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a full tensor, or this rank's slice of it where the parameter is sharded. No communication: every rank has the full one."""
    if isinstance(parameter, DTensor):
        value, parameter = local_part(value, parameter), parameter.to_local()
    parameter.copy_(value)


def local_part(value: Tensor, layout: DTensor) -> Tensor:
    """This rank's slice of a full tensor laid out as another is.

    The mesh's last dimension cuts first: a rank of `fully_shard` has a slice of a rank of tensor parallelism's. (`distribute_tensor` would
    begin with the first, and takes no sharding of a part of a tensor.)
    """
    coordinate = layout.device_mesh.get_coordinate()
    assert coordinate is not None
    for mesh_dim in reversed(range(layout.device_mesh.ndim)):
        placement = layout.placements[mesh_dim]
        if not placement.is_replicate():
            dimension: int = placement.dim  # type: ignore[attr-defined]  # Shard, or torch's private kind for two cuts of one dimension
            length = value.shape[dimension]
            size = -(-length // layout.device_mesh.size(mesh_dim))
            begin = min(coordinate[mesh_dim] * size, length)
            value = value.narrow(dimension, begin, min(size, length - begin))
    return value

"""Values for a model that was built on the meta device and sharded there: one full parameter at a time passes through host memory."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

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
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)

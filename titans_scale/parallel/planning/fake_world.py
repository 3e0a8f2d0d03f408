"""One rank of a cluster on a machine without one: a process group that sends nothing, tensors that have a shape and no memory.

Everything above runs as it would there: meshes, `parallelize`, the hooks of `fully_shard`, collectives. Device "cpu" stands for the GPU,
since FSDP2 asks a GPU's driver for streams; `like_a_gpu` mends where the model itself takes another way on a CPU.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives of tensors without memory
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from titans_scale.config import ConfigError
from titans_scale.memory import around


@contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """This process as one rank of world_size: collectives return at once, and leave whatever was there.

    Raises:
        ConfigError: no such rank.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"the rank is {rank}; of {world_size} ranks it must be 0 to {world_size - 1}")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # what DTensor remembers of a mesh holds for the rank that it was made by


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made inside have a shape and no memory. Their values must not be asked for; those of meshes, which are ranks, may."""
    ranks = DeviceMesh.mesh
    assert isinstance(ranks, property) and ranks.fget is not None
    with (
        FakeTensorMode(),
        patch.object(DeviceMesh, "__init__", _on_real_tensors(DeviceMesh.__init__)),
        patch.object(DeviceMesh, "mesh", property(_on_real_tensors(ranks.fget))),
        patch.object(dist, "send_object_list", lambda *args, **kwargs: None),  # once a run, and nobody is there
    ):
        yield


def _on_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Norms as one kernel that keeps input and output, and convolutions over all tokens at once, where a CPU has many small operators."""
    with FusedNorms(), patch.object(around, "BLOCK_ELEMENTS", sys.maxsize):
        yield


class FusedNorms(TorchFunctionMode):
    """RMSNorm as its fused GPU kernel keeps it, not as the small operators it falls apart into without a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.rms_norm, torch.rms_norm):
            weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
            return _KeepsInputsAndOutput.apply(args[0], weight)
        return func(*args, **kwargs)


class _KeepsInputsAndOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        output = torch.empty_like(x)
        ctx.save_for_backward(x, weight, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)

"""From a model on the meta device to one that is sharded over the mesh and holds its initial values.

The order matters and is the one order that composes: what replaces a layer's parameters first, then what wraps a block's
computation, and the sharding, which has to see the final modules, last.
"""

import warnings
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import nn
from torch._ops import OpOverload
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from titans_scale.config import ConfigError, TitansConfig
from titans_scale.models import TitansLM
from titans_scale.models.plans import fsdp_groups, keeps_result
from titans_scale.parallel.materialize import materialize
from titans_scale.parallel.mesh import Mesh
from titans_scale.parallel.recompute import recomputed
from titans_scale.parallel.sequence import hand_states_on
from titans_scale.parallel.tensor import tensor_parallel

Precision = Literal["float32", "bfloat16"]


def parallelize(model: TitansLM, config: TitansConfig, mesh: Mesh, device: torch.device) -> TitansLM:
    """Shard a model in place and fill in its initial values; the same weights on any number of ranks.

    Always `fully_shard`, on one rank too: then precision, gradient accumulation and checkpoints have one code path.

    Args:
        model: built under `torch.device("meta")`.   mesh: of this rank.   device: of this rank.
    Returns:
        The same model, its parameters DTensors on `device`, or on the CPU with parallelism.cpu_offload.
    Raises:
        ConfigError: bfloat16 on a GPU that has none.
    """
    if mesh.tensor is not None:
        tensor_parallel(model, mesh.tensor, memory_split=config.parallelism.memory_split)
    wrap_blocks(model, config)
    if mesh.context is not None:
        hand_states_on(model, mesh.context.get_group())
    parallelism = config.parallelism
    shard(
        model,
        mesh,
        precision=resolve_precision(config.training.dtype, device),
        reshard_after_forward=parallelism.reshard_after_forward,
        cpu_offload=parallelism.cpu_offload,
        prefetch=parallelism.prefetch,
    )
    materialize(model, torch.device("cpu") if parallelism.cpu_offload else device, seed=config.training.seed)
    return model


def wrap_blocks(model: TitansLM, config: TitansConfig) -> None:
    """Activation checkpointing, then compile, where they are asked for."""
    if config.activation_checkpoint.mode != "none":
        checkpoint_blocks(model, keeps_result if config.activation_checkpoint.mode == "selective" else None)
    if config.compile.enabled:
        compile_blocks(model)


def checkpoint_blocks(model: TitansLM, keeps: Callable[[OpOverload], bool] | None = None) -> None:
    """Keep a block's input only, and the results of the operators that `keeps` names, and recompute the rest in the backward pass.

    In place of `forward`, not around the module: names stay.
    """
    for block in model.blocks:
        block.forward = recomputed(block.forward, keeps)


def compile_blocks(model: TitansLM) -> None:
    """Compile every block by itself: one graph serves all layers, and sharding can prefetch between them.

    Packed documents come in rows of a dozen lengths or more, with and without gradients: past torch's limit of 8 a block would run
    uncompiled.
    """
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.forward = torch.compile(block.forward)  # not the call: hooks that gather parameters would break its graph into pieces


def shard(
    model: TitansLM,
    mesh: Mesh,
    *,
    precision: Precision,
    reshard_after_forward: bool,
    cpu_offload: bool = False,
    prefetch: int = 1,
) -> None:
    """`fully_shard` each group of the model's plan, then what is left, as the root.

    Gradients are summed over ranks, not averaged: the loss is divided by the global number of target tokens already.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.fsdp.device_type == "cuda") if cpu_offload else OffloadPolicy()
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    groups = fsdp_groups(model)
    for group in groups:
        # The backward pass starts with the last group, so freeing it in between would only gather it twice; likewise the root.
        again = reshard_after_forward and group is not groups[-1]
        fully_shard(group, mesh=mesh.fsdp, mp_policy=policy, offload_policy=offload, reshard_after_forward=again)
    fully_shard(model, mesh=mesh.fsdp, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss_sum")  # or the root's parameters would not be gathered for it
    # A block's second output, its streaming state, holds views; nothing here writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    prefetch_blocks(model, prefetch)


def prefetch_blocks(model: TitansLM, ahead: int) -> None:
    """Gather the parameters of the next blocks, in either direction, while one is at work.

    By itself FSDP2 gathers the next in the backward pass alone, and in the forward pass relies on the host being ahead of the GPU.
    """
    blocks = cast(list[FSDPModule], list(model.blocks))
    for place, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[place + 1 : place + 1 + ahead])
        block.set_modules_to_backward_prefetch(blocks[max(0, place - ahead) : place][::-1])


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules `fully_shard` was applied to, outermost first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free gathered parameters that a forward pass without a backward pass left; until then names lead to those, not to the shards."""
    for module in sharded_modules(model):
        module.reshard()


def resolve_precision(dtype: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Precision:
    """What "auto" means on this device, after checking that the device can do what is asked for."""
    if dtype == "float32" or (dtype == "auto" and device.type == "cpu"):
        return "float32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"training.dtype is {dtype}, but {name} has no bfloat16; set training.dtype to float32")
    return "bfloat16"

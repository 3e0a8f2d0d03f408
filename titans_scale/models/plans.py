"""What a model tells the trainer about itself: how to group it for sharding, which parameters decay, how large and how costly it is."""

import torch
from torch import nn
from torch._ops import OpOverload

from titans_scale.config import ModelConfig
from titans_scale.models.flops import flops_per_token
from titans_scale.models.model import TitansLM

__all__ = ["decay_groups", "flops_per_token", "fsdp_groups", "keeps_result", "num_parameters", "parameters_by_part"]

NO_DECAY = ("norm", "bias", "persistent", "initial_weights", "memory_scale", "memory_shift", "_conv")
"""Marks, in a parameter's name, of what weight decay must leave alone: scales, shifts, and what is not a projection."""

MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def fsdp_groups(model: TitansLM) -> list[list[nn.Module]]:
    """Modules to shard together, in order; the root is sharded last and is not listed.

    A block is one group. A tied embedding stays with the root, which uses it at both ends; untied, embedding and head are
    groups of their own, the final norm with the head.
    """
    blocks: list[list[nn.Module]] = [[block] for block in model.blocks]
    return blocks if model.head is None else [[model.embedding], *blocks, [model.norm, model.head]]


def keeps_result(operator: OpOverload) -> bool:
    """Whether selective checkpointing keeps what an operator of a block made: matrix products, attention, and what we registered
    ourselves, which is the scan. Elementwise operations, norms and convolutions take little time to do again, and most of the memory.
    """
    namespace, name = operator.namespace, operator._schema.name.split("::")[1]
    return namespace == "titans_scale" or (namespace == "aten" and (name in MATRIX_PRODUCTS or "dot_product" in name))


def decay_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Qualified names of the parameters with and without weight decay."""
    names = [name for name, _ in model.named_parameters()]
    without = [name for name in names if any(mark in name for mark in NO_DECAY)]
    return [name for name in names if name not in set(without)], without


def num_parameters(config: ModelConfig) -> int:
    """All parameters, tied ones counted once. Built on the meta device: takes no memory."""
    return sum(parameters_by_part(config).values())


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Parameters of embedding, head, attention, memory, mlp, and the rest (norms, gates, persistent tokens)."""
    with torch.device("meta"):
        model = TitansLM(config)
    parts = dict.fromkeys(("embedding", "head", "attention", "memory", "mlp", "other"), 0)
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight").split(".")
        part = path[2] if path[0] == "blocks" else path[0]
        parts[part if part in parts else "other"] += parameter.numel()
    return parts

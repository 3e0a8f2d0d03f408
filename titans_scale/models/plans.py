"""What a model tells the trainer about itself: how to group and split it, which parameters decay, how large and how costly it is."""

from typing import Literal

import torch
from torch import nn
from torch._ops import OpOverload

from titans_scale.config import ModelConfig
from titans_scale.models.flops import flops_per_token
from titans_scale.models.model import TitansLM

__all__ = ["decay_groups", "flops_per_token", "fsdp_groups", "keeps_result", "num_parameters", "parameters_by_part", "tensor_split"]

NO_DECAY = ("norm", "bias", "persistent", "initial_weights", "memory_scale", "memory_shift", "_conv")
"""Marks, in a parameter's name, of what weight decay must leave alone: scales, shifts, and what is not a projection."""

MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")

OUTSIDE_MEMORY = {
    **dict.fromkeys(("embedding.weight", "head.weight", "mlp.gate.weight", "mlp.up.weight"), 0),
    **dict.fromkeys((f"attention.{name}_proj.weight" for name in ("q", "k", "v")), 0),
    **dict.fromkeys(("mlp.down.weight", "attention.out_proj.weight"), 1),
}
MEMORY_BY_HIDDEN_WIDTH = {"memory.initial_weights.0": 1, "memory.initial_weights.1": 2, "memory.out_proj.weight": 1}

MemorySplit = Literal["heads", "hidden"]


def fsdp_groups(model: TitansLM) -> list[list[nn.Module]]:
    """Modules to shard together, in order; the root is sharded last and is not listed.

    A block is one group. A tied embedding stays with the root, which uses it at both ends; untied, embedding and head are
    groups of their own, the final norm with the head.
    """
    blocks: list[list[nn.Module]] = [[block] for block in model.blocks]
    return blocks if model.head is None else [[model.embedding], *blocks, [model.norm, model.head]]


def keeps_result(operator: OpOverload) -> bool:
    """Whether selective checkpointing keeps what an operator of a block made: matrix products, attention, and what we registered
    ourselves, which is the scan, and sums over ranks. Elementwise operations, norms and convolutions take little time to do again, and
    most of the memory. So do tokens gathered from ranks, which are more than most of what a rank makes of them: they are gathered again.
    """
    namespace, name = operator.namespace, operator._schema.name.split("::")[1]
    if namespace == "aten":
        return name in MATRIX_PRODUCTS or "dot_product" in name
    return namespace == "titans_scale" or name == "reduce_scatter_tensor"


def tensor_split(model: TitansLM, memory_split: MemorySplit) -> dict[str, int | None]:
    """For every parameter, the dimension that ranks which share every layer split it in; None: each of them has all of it.

    What makes heads, hidden units or logits is split by its outputs; what takes them back to the model's width by its inputs, so that each
    rank makes a part of a sum. A memory split by its hidden width is held alike but for its own weights and the projection after it.
    """

    def dimension(name: str) -> int | None:
        within = ".".join(name.split(".")[2:]) if name.startswith("blocks.") else name
        if not within.startswith("memory."):
            return OUTSIDE_MEMORY.get(within)
        if memory_split == "hidden":
            return MEMORY_BY_HIDDEN_WIDTH.get(within)
        return 1 if within == "memory.out_proj.weight" else 0

    return {name: dimension(name) for name, _ in model.named_parameters()}


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

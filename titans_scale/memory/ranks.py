"""Sums over the ranks that share the hidden width of the memories; nothing at all where a rank has it to itself.

The collectives are torch's own operators, which know a process group by its name, so that nothing on this floor imports torch.distributed.
A sum is taken in the scan's dtype, float32 or float64. Every rank first sums over its own hidden units; the order over ranks is the
collective's, and the result is the same on all of them.
"""

from typing import Any

import torch
from torch import Tensor


def sum_over(x: Tensor, group: str) -> Tensor:
    """x summed over a group's ranks, on all of them; x itself where the group is "". Not for autograd."""
    return _all_reduce_(x.clone(memory_format=torch.contiguous_format), group) if group else x


def sum_together(group: str, *xs: Tensor) -> list[Tensor]:
    """Several tensors of one dtype summed as one, since a small collective costs what it takes to start it. Not for autograd."""
    if not group:
        return list(xs)
    flat = _all_reduce_(torch.cat([x.reshape(-1) for x in xs]), group)
    return [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in xs]), xs, strict=True)]


def differentiable_sum_over(x: Tensor, group: str) -> Tensor:
    """`sum_over` for autograd. Of the gradient each rank has a part, so its adjoint is the same sum again."""
    if not group:
        return x
    total: Tensor = sum_op(x, group)
    return total


@torch.library.custom_op("titans_scale::sum_over_ranks", mutates_args=())
def sum_op(x: Tensor, group: str) -> Tensor:
    """`sum_over` as an operator: with a gradient, and one node to torch.compile and checkpointing."""
    return sum_over(x, group)


@sum_op.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return sum_op(grad, ctx.group), None


sum_op.register_autograd(_backward, setup_context=_setup_context)


def _all_reduce_(x: Tensor, group: str) -> Tensor:
    reduced: Tensor = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce_(x, "sum", group))
    return reduced

"""Tokens gathered from ranks, and sums scattered over them: collectives that gradients flow through, made of operators that torch.compile
and selective checkpointing see. (The sum that all ranks have alike is in titans_scale.memory.ranks.)

Each adds up in the dtype of its tensor, in an order that the backend chooses (a ring, for most sizes on a GPU): results differ from
those of one rank, and of another number of ranks, by rounding.

Shape letters: B batch, T all tokens, S a rank's share of the tokens, M width.
"""

from typing import Any

import torch
from torch import Tensor

_c10d = torch.ops._c10d_functional


def all_gather_tokens(x_BSM: Tensor, group: str, size: int) -> Tensor:
    """(B, T, M) from every rank's consecutive share; the gradients of all ranks are added up, and each gets back its share."""
    y: Tensor = _AllGatherTokens.apply(x_BSM, group, size)
    return y


def reduce_scatter_tokens(x_BTM: Tensor, group: str, size: int) -> Tensor:
    """A rank's share (B, S, M) of the sum over ranks; the gradient is that of all shares together."""
    y: Tensor = _ReduceScatterTokens.apply(x_BTM, group, size)
    return y


def gathered(x: Tensor, group: str, size: int) -> Tensor:
    """Every rank's tensor, all of one shape, one behind the other in dimension 0. Without a gradient."""
    return _wait(_c10d.all_gather_into_tensor(x.contiguous(), size, group))


def _gather_tokens(x_BSM: Tensor, group: str, size: int) -> Tensor:
    return gathered(x_BSM.transpose(0, 1), group, size).transpose(0, 1).contiguous()


def _scatter_tokens(x_BTM: Tensor, group: str, size: int) -> Tensor:
    y_SBM = _wait(_c10d.reduce_scatter_tensor(x_BTM.transpose(0, 1).contiguous(), "sum", size, group))
    return y_SBM.transpose(0, 1).contiguous()


def _wait(x: Tensor) -> Tensor:
    y: Tensor = _c10d.wait_tensor(x)
    return y


class _AllGatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSM: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _gather_tokens(x_BSM, group, size)

    @staticmethod
    def backward(ctx: Any, grad_BTM: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_tokens(grad_BTM, ctx.group, ctx.size), None, None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTM: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _scatter_tokens(x_BTM, group, size)

    @staticmethod
    def backward(ctx: Any, grad_BSM: Tensor) -> tuple[Tensor, None, None]:
        return _gather_tokens(grad_BSM, ctx.group, ctx.size), None, None

"""Decay algebra of a chunk: how the chunk's start state and the writes so far add up at each token.

Shape letters: ... any leading dimensions (batch, heads, chunks), C tokens of a chunk; in a pair of C the first is the reading token.
Source: Titans (arXiv 2501.00663) section 3.2, with momentum; the derivation is in docs/memory.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ChunkCoefficients(NamedTuple):
    """With g_i the surprise of token i, M_0 and S_0 the weights and momentum at the chunk's start:

    M_t = start_t M_0 + carry_t S_0 - sum_i write_ti g_i        for every token t
    S_C = momentum_decay S_0 - sum_i momentum_write_i g_i       at the chunk's end
    """

    start_C: Tensor
    carry_C: Tensor
    write_CC: Tensor
    """Lower triangular: a token reads its own write and those before it."""
    momentum_decay: Tensor
    momentum_write_C: Tensor


def chunk_coefficients(theta_C: Tensor, eta_C: Tensor, alpha_C: Tensor) -> ChunkCoefficients:
    """Coefficients of every chunk at once; they depend on the gates alone, so this runs before the sequential loop.

    Args:
        theta_C: step size, >= 0.   eta_C: momentum decay, in [0, 1].   alpha_C: forgetting, in [0, 1].   All (..., C).

    Gates at the ends of their ranges give finite values and the exact gradients. Pass float32 or float64: a product of
    decays over a chunk loses everything in bfloat16.
    """
    log_keep_C = _log_decay(1 - alpha_C)
    log_momentum_C = _log_decay(eta_C)
    keep_CC = _segment_decay(log_keep_C)
    momentum_CC = _segment_decay(log_momentum_C)
    momentum_since_start_C = torch.exp(torch.cumsum(log_momentum_C, dim=-1))
    return ChunkCoefficients(
        start_C=torch.exp(torch.cumsum(log_keep_C, dim=-1)),
        carry_C=(keep_CC @ momentum_since_start_C.unsqueeze(-1)).squeeze(-1),
        write_CC=(keep_CC @ momentum_CC) * theta_C.unsqueeze(-2),
        momentum_decay=momentum_since_start_C[..., -1],
        momentum_write_C=momentum_CC[..., -1, :] * theta_C,
    )


def _log_decay(decay: Tensor) -> Tensor:
    """log(decay), held above a floor whose square is still a normal number's neighbour of zero.

    The floor is added as a constant, so the gradient passes: the product that a zero factor belongs to has a derivative
    there (the other factors), and exp(...) / floor gives just that.
    """
    floor = 1e-200 if decay.dtype == torch.float64 else 1e-30
    return torch.log(decay + (floor - decay).clamp(min=0).detach())


def _segment_decay(log_decay_C: Tensor) -> Tensor:
    """D[t, i] = product of the decays of tokens i+1..t; 1 on the diagonal, 0 above it.

    Sums are taken inside each segment, never as a difference of two sums from the start: that would cancel.
    """
    length = log_decay_C.shape[-1]
    ones = torch.ones(length, length, dtype=torch.bool, device=log_decay_C.device)
    steps_CC = log_decay_C.unsqueeze(-1).expand(*log_decay_C.shape, length).masked_fill(~ones.tril(-1), 0.0)
    return torch.exp(torch.cumsum(steps_CC, dim=-2)).masked_fill(~ones.tril(), 0.0)

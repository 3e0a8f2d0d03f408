"""Decay algebra of a chunk: how the chunk's start state and the writes so far add up at each token.

Shape letters: ... any leading dimensions (batch, heads, chunks), C tokens of a chunk; in a pair of C the first is the reading token.
Source: Titans (arXiv 2501.00663) section 3.2, with momentum; the derivation is in docs/memory.md.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ChunkCoefficients(NamedTuple):
    """With g_i the surprise of token i, M_0 and S_0 the weights and momentum at the chunk's start:

    M_t = start_t M_0 + carry_t S_0 - sum_i write_ti g_i              for every token t
    (M_C, S_C) = decay (M_0, S_0) - sum_i into_i g_i                  at the chunk's end
    """

    start_C: Tensor
    carry_C: Tensor
    write_CC: Tensor
    """Lower triangular: a token reads its own write and those before it."""
    decay_22: Tensor
    into_C2: Tensor
    """Into the weights and into the momentum."""


class CoefficientsTape(NamedTuple):
    """What `coefficients_vjp` needs beyond the result."""

    theta_C: Tensor
    kept_C: Tensor
    """1 - alpha, held above the floor; likewise eta."""
    eta_C: Tensor
    keep_CC: Tensor
    momentum_CC: Tensor
    unscaled_CC: Tensor
    """The write coefficients before the step size."""
    momentum_since_start_C: Tensor


def chunk_coefficients(theta_C: Tensor, eta_C: Tensor, alpha_C: Tensor) -> tuple[ChunkCoefficients, CoefficientsTape]:
    """Coefficients of any number of chunks at once; they depend on the gates alone, so this runs before the sequential loop.

    Args:
        theta_C: step size, >= 0.   eta_C: momentum decay, in [0, 1].   alpha_C: forgetting, in [0, 1].   All (..., C).

    Gates at the ends of their ranges give finite values and the exact gradients. Pass float32 or float64: a product of
    decays over a chunk loses everything in bfloat16.
    """
    kept_C, eta_C = _above_floor(1 - alpha_C), _above_floor(eta_C)
    keep_CC, momentum_CC = _segment_decay(kept_C), _segment_decay(eta_C)
    start_C, since_start_C = kept_C.cumprod(-1), eta_C.cumprod(-1)
    carry_C = (keep_CC @ since_start_C.unsqueeze(-1)).squeeze(-1)
    unscaled_CC = keep_CC @ momentum_CC
    write_CC = unscaled_CC * theta_C.unsqueeze(-2)
    end = (start_C[..., -1], carry_C[..., -1], torch.zeros_like(start_C[..., -1]), since_start_C[..., -1])
    into = (write_CC[..., -1, :], momentum_CC[..., -1, :] * theta_C)
    decay_22 = torch.stack(end, dim=-1).unflatten(-1, (2, 2))
    coefficients = ChunkCoefficients(start_C, carry_C, write_CC, decay_22, torch.stack(into, dim=-1))
    return coefficients, CoefficientsTape(theta_C, kept_C, eta_C, keep_CC, momentum_CC, unscaled_CC, since_start_C)


def coefficients_vjp(grad: ChunkCoefficients, made: ChunkCoefficients, tape: CoefficientsTape) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in theta, eta and alpha; `grad` is overwritten.

    A decay enters every product whose segment it belongs to. The gradient in its logarithm is the sum of theirs, each times
    its product, and dividing by the decay gives the product of the others: exact also where the decay is (held above) zero.
    """
    grad.start_C[..., -1] += grad.decay_22[..., 0, 0]
    grad.carry_C[..., -1] += grad.decay_22[..., 0, 1]
    into_weights_C, into_momentum_C = grad.into_C2.unbind(-1)
    grad.write_CC[..., -1, :] += into_weights_C
    grad_theta_C = (grad.write_CC * tape.unscaled_CC).sum(-2).addcmul_(into_momentum_C, tape.momentum_CC[..., -1, :])
    grad_unscaled_CC = grad.write_CC * tape.theta_C.unsqueeze(-2)
    grad_keep_CC = grad_unscaled_CC @ tape.momentum_CC.mT
    grad_keep_CC.addcmul_(grad.carry_C.unsqueeze(-1), tape.momentum_since_start_C.unsqueeze(-2))
    grad_momentum_CC = tape.keep_CC.mT @ grad_unscaled_CC
    grad_momentum_CC[..., -1, :].addcmul_(into_momentum_C, tape.theta_C)
    grad_since_start_C = (tape.keep_CC.mT @ grad.carry_C.unsqueeze(-1)).squeeze(-1)
    grad_since_start_C[..., -1] += grad.decay_22[..., 1, 1]
    grad_log_keep_C = _segment_decay_vjp(grad_keep_CC, tape.keep_CC) + _cumprod_vjp(grad.start_C, made.start_C)
    grad_log_eta_C = _segment_decay_vjp(grad_momentum_CC, tape.momentum_CC) + _cumprod_vjp(grad_since_start_C, tape.momentum_since_start_C)
    return grad_theta_C, grad_log_eta_C / tape.eta_C, -grad_log_keep_C / tape.kept_C


def one_token_earlier(coefficients: ChunkCoefficients) -> ChunkCoefficients:
    """Coefficients of the state that a token finds, before its own write; those of the chunk's end are left as they are."""
    start_C, carry_C, write_CC, *of_end = coefficients
    return ChunkCoefficients(
        F.pad(start_C[..., :-1], (1, 0), value=1.0), F.pad(carry_C[..., :-1], (1, 0)), F.pad(write_CC[..., :-1, :], (0, 0, 1, 0)), *of_end
    )


def one_token_earlier_vjp(grad: ChunkCoefficients, grad_coefficients: ChunkCoefficients) -> None:
    """Adds the gradients of `one_token_earlier`."""
    grad_coefficients.start_C[..., :-1] += grad.start_C[..., 1:]
    grad_coefficients.carry_C[..., :-1] += grad.carry_C[..., 1:]
    grad_coefficients.write_CC[..., :-1, :] += grad.write_CC[..., 1:, :]


def _above_floor(decay: Tensor) -> Tensor:
    """The decay, held above a floor whose square is still a normal number's neighbour of zero."""
    return decay.clamp(min=1e-200 if decay.dtype == torch.float64 else 1e-30)


def _segment_decay(decay_C: Tensor) -> Tensor:
    """D[t, i] = product of the decays of tokens i+1..t; 1 on the diagonal, 0 above it.

    A running product inside each segment, never a quotient of two from the chunk's start: those underflow.
    """
    length = decay_C.shape[-1]
    inside_CC = torch.ones(length, length, dtype=decay_C.dtype, device=decay_C.device).tril_(-1)
    return torch.addcmul(1 - inside_CC, decay_C.unsqueeze(-1), inside_CC).cumprod(-2).tril_()


def _segment_decay_vjp(grad_CC: Tensor, decay_CC: Tensor) -> Tensor:
    """Gradient in the logarithms: token r is in every segment that starts before it and ends at it or later."""
    started_before_CC = (grad_CC * decay_CC).cumsum(-1).tril_(-1)
    return F.pad(started_before_CC.sum(-2)[..., :-1], (1, 0))


def _cumprod_vjp(grad_C: Tensor, product_C: Tensor) -> Tensor:
    """Gradient of a running product in the logarithms."""
    return (grad_C * product_C).flip(-1).cumsum(-1).flip(-1)

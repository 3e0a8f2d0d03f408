"""What stands around the scan in a memory layer (section 4.4), with gradients that compute again rather than keep.

Under plain autograd these few products and norms keep more than the scan itself. Each function here keeps its inputs alone. They are
autograd functions of ordinary operations, so torch.compile sees through them and fuses what is inside.

Shape letters: B batch, T tokens, I inner width = H * D, H memory heads, D head dimension, K convolution kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT_EPS = 1e-6
RMS_EPS = 1e-5


def short_convolution(x_BTI: Tensor, weight_IK: Tensor | None, tail_BKI: Tensor, num_heads: int, *, unit: bool) -> Tensor:
    """SiLU of a causal depthwise convolution, per head of unit l2 norm (smooth at zero) if `unit`.

    Args:
        weight_IK: the last entry is for the token itself; None: no convolution.   tail_BKI: the K - 1 inputs before the first.
    Returns:
        (B, H, T, D) in x's dtype; computed in float32 or wider.
    """
    y: Tensor = _ShortConvolution.apply(x_BTI, weight_IK, tail_BKI, num_heads, unit)
    return y.transpose(1, 2)


def gated_norm(y_BHTD: Tensor, scale_I: Tensor, gate_BTI: Tensor) -> Tensor:
    """RMSNorm of every head, times scale, times SiLU(gate): (B, T, I) in gate's dtype, computed in float32 or wider."""
    out: Tensor = _GatedNorm.apply(y_BHTD.transpose(1, 2), scale_I, gate_BTI)
    return out


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, tail: Tensor, num_heads: int, unit: bool) -> Tensor:
        ctx.save_for_backward(x, weight, tail)
        ctx.num_heads, ctx.unit = num_heads, unit
        y = F.silu(_convolve(x, weight, tail)).unflatten(-1, (num_heads, -1))
        return (y * _inverse_length(y) if unit else y).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        x, weight, tail = ctx.saved_tensors
        z = _convolve(x, weight, tail)
        grad = grad.to(z.dtype)
        if ctx.unit:
            y = F.silu(z).unflatten(-1, (ctx.num_heads, -1))
            inverse_length = _inverse_length(y)
            y = y * inverse_length
            grad = (grad - y * (y * grad).sum(-1, keepdim=True)) * inverse_length
        grad_z = torch.ops.aten.silu_backward(grad.flatten(-2), z)
        if weight is None:
            return grad_z.to(x.dtype), None, torch.zeros_like(tail), None, None
        wide_weight = weight.to(z.dtype)
        grad_x, grad_tail = grad_z * wide_weight[:, -1], torch.zeros_like(tail, dtype=z.dtype)
        grad_weights = [(grad_z * x).sum((0, 1))]
        length = x.shape[1]
        for back in range(1, weight.shape[1]):  # the weight of the token so far back
            here, inside = wide_weight[:, -1 - back], min(back, length)
            first = tail.shape[1] - back
            grad_x[:, : length - inside].addcmul_(grad_z[:, inside:], here)
            grad_tail[:, first : first + inside].addcmul_(grad_z[:, :inside], here)
            of_x = (grad_z[:, inside:] * x[:, : length - inside]).sum((0, 1))
            grad_weights.append(of_x + (grad_z[:, :inside] * tail[:, first : first + inside]).sum((0, 1)))
        grad_weight = torch.stack(grad_weights[::-1], dim=-1).to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, grad_tail.to(tail.dtype), None, None


def _convolve(x: Tensor, weight: Tensor | None, tail: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight is None:
        return x.to(wide)
    weight = weight.to(wide)
    z = x * weight[:, -1]
    length = x.shape[1]
    for back in range(1, weight.shape[1]):
        here, inside = weight[:, -1 - back], min(back, length)
        first = tail.shape[1] - back
        z[:, inside:].addcmul_(x[:, : length - inside].to(wide), here)
        z[:, :inside].addcmul_(tail[:, first : first + inside].to(wide), here)
    return z


def _inverse_length(y: Tensor) -> Tensor:
    return torch.rsqrt(y.square().sum(-1, keepdim=True) + UNIT_EPS)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, scale, gate)
        normed, _, wide_gate = _normed(y, gate)
        return (normed.flatten(2) * scale * F.silu(wide_gate)).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, scale, gate = ctx.saved_tensors
        normed, inverse_rms, wide_gate = _normed(y, gate)
        open_gate = F.silu(wide_gate)
        grad = grad.to(normed.dtype)
        grad_scaled = grad * open_gate
        grad_gate = torch.ops.aten.silu_backward(grad * (normed.flatten(2) * scale), wide_gate)
        grad_scale = (grad_scaled * normed.flatten(2)).sum((0, 1))
        grad_normed = (grad_scaled * scale).unflatten(-1, y.shape[-2:])
        grad_y = inverse_rms * (grad_normed - normed * (normed * grad_normed).mean(-1, keepdim=True))
        return grad_y.to(y.dtype), grad_scale.to(scale.dtype), grad_gate.to(gate.dtype)


def _normed(y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(y.dtype, gate.dtype), torch.float32)
    y = y.to(wide)
    inverse_rms = torch.rsqrt(y.square().mean(-1, keepdim=True) + RMS_EPS)
    return y * inverse_rms, inverse_rms, gate.to(wide)

"""What stands around the scan in a memory layer (section 4.4), with gradients that compute again rather than keep.

Under plain autograd these few products and norms keep more than the scan itself. Each function here keeps its inputs alone. They are
autograd functions of ordinary operations, so torch.compile sees through them and fuses what is inside. On a CPU they go through the
tokens a block at a time, which stays in the cache.

Shape letters: B batch, T tokens, I inner width = H * D, H memory heads, D head dimension, K convolution kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT_EPS = 1e-6
RMS_EPS = 1e-5
BLOCK_ELEMENTS = 2**16


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
        out = torch.empty_like(x, memory_format=torch.contiguous_format).unflatten(-1, (num_heads, -1))
        for begin, end in _blocks(x):
            y = F.silu(_convolve(x[:, begin:end], weight, _inputs_before(x, tail, begin))).unflatten(-1, (num_heads, -1))
            out[:, begin:end] = y * _inverse_length(y) if unit else y
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        x, weight, tail = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_x = torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format)
        grad_weight = None if weight is None else torch.zeros_like(weight, dtype=wide)
        grad_tail = torch.zeros_like(tail, dtype=wide)
        for begin, end in _blocks(x):
            before = _inputs_before(x, tail, begin)
            z = _convolve(x[:, begin:end], weight, before)
            grad_z = _activation_vjp(grad[:, begin:end].to(wide), z, ctx.num_heads, ctx.unit)
            if weight is None or grad_weight is None:
                grad_x[:, begin:end] = grad_z
                continue
            grad_before = torch.zeros_like(before, dtype=wide)
            _convolve_vjp(grad_z, x[:, begin:end], weight, before, grad_x[:, begin:end], grad_weight, grad_before)
            inside = min(begin, before.shape[1])  # of the inputs before the block, those that are x's and not the tail's
            grad_x[:, begin - inside : begin] += grad_before[:, before.shape[1] - inside :]
            grad_tail[:, tail.shape[1] - (before.shape[1] - inside) :] += grad_before[:, : before.shape[1] - inside]
        return grad_x.to(x.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), grad_tail.to(tail.dtype), None, None


def _inputs_before(x: Tensor, tail: Tensor, begin: int) -> Tensor:
    """The K - 1 inputs before token `begin`."""
    inside = min(begin, tail.shape[1])
    return x[:, begin - inside : begin] if inside == tail.shape[1] else torch.cat((tail[:, inside:], x[:, :begin]), dim=1)


def _convolve(x: Tensor, weight: Tensor | None, before: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    if weight is None:
        return x
    weight, before = weight.to(wide), before.to(wide)
    z = x * weight[:, -1]
    length = x.shape[1]
    for back in range(1, weight.shape[1]):  # the weight of the token so far back
        here, inside = weight[:, -1 - back], min(back, length)
        first = before.shape[1] - back
        z[:, inside:].addcmul_(x[:, : length - inside], here)
        z[:, :inside].addcmul_(before[:, first : first + inside], here)
    return z


def _convolve_vjp(
    grad_z: Tensor, x: Tensor, weight: Tensor, before: Tensor, grad_x: Tensor, grad_weight: Tensor, grad_before: Tensor
) -> None:
    """Sets `grad_x`, adds to the other two."""
    x, weight, before = (y.to(grad_z.dtype) for y in (x, weight, before))
    grad_x.copy_(grad_z * weight[:, -1])
    grad_weight[:, -1] += (grad_z * x).sum((0, 1))
    length = x.shape[1]
    for back in range(1, weight.shape[1]):
        here, inside = weight[:, -1 - back], min(back, length)
        first = before.shape[1] - back
        grad_x[:, : length - inside].addcmul_(grad_z[:, inside:], here)
        grad_before[:, first : first + inside].addcmul_(grad_z[:, :inside], here)
        grad_weight[:, -1 - back] += (grad_z[:, inside:] * x[:, : length - inside]).sum((0, 1))
        grad_weight[:, -1 - back] += (grad_z[:, :inside] * before[:, first : first + inside]).sum((0, 1))


def _activation_vjp(grad: Tensor, z: Tensor, num_heads: int, unit: bool) -> Tensor:
    if unit:
        y = F.silu(z).unflatten(-1, (num_heads, -1))
        inverse_length = _inverse_length(y)
        y = y * inverse_length
        grad = (grad - y * (y * grad).sum(-1, keepdim=True)) * inverse_length
    return torch.ops.aten.silu_backward(grad.flatten(-2), z)


def _inverse_length(y: Tensor) -> Tensor:
    return torch.rsqrt(y.square().sum(-1, keepdim=True) + UNIT_EPS)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, scale, gate)
        out = torch.empty_like(gate)
        for begin, end in _blocks(gate):
            normed, _, wide_gate = _normed(y[:, begin:end], gate[:, begin:end])
            out[:, begin:end] = normed.flatten(2) * scale * F.silu(wide_gate)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, scale, gate = ctx.saved_tensors
        grad_y, grad_gate = torch.empty_like(y), torch.empty_like(gate)
        grad_scale = torch.zeros_like(scale, dtype=torch.promote_types(scale.dtype, torch.float32))
        for begin, end in _blocks(gate):
            normed, inverse_rms, wide_gate = _normed(y[:, begin:end], gate[:, begin:end])
            wide_grad = grad[:, begin:end].to(normed.dtype)
            grad_scaled = wide_grad * F.silu(wide_gate)
            flat = normed.flatten(2)
            grad_gate[:, begin:end] = torch.ops.aten.silu_backward(wide_grad * (flat * scale), wide_gate)
            grad_scale += (grad_scaled * flat).sum((0, 1))
            grad_normed = (grad_scaled * scale).unflatten(-1, y.shape[-2:])
            grad_y[:, begin:end] = inverse_rms * (grad_normed - normed * (normed * grad_normed).mean(-1, keepdim=True))
        return grad_y, grad_scale.to(scale.dtype), grad_gate


def _normed(y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(y.dtype, gate.dtype), torch.float32)
    y = y.to(wide)
    inverse_rms = torch.rsqrt(y.square().mean(-1, keepdim=True) + RMS_EPS)
    return y * inverse_rms, inverse_rms, gate.to(wide)


def _blocks(x_BTI: Tensor) -> list[tuple[int, int]]:
    length = x_BTI.shape[1]
    size = length
    if x_BTI.device.type == "cpu" and not torch.compiler.is_compiling():
        size = max(64, BLOCK_ELEMENTS // (x_BTI.shape[0] * x_BTI.shape[2]))
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]

"""Small parts that every block shares: rotary embedding, SwiGLU, the gate that joins attention and memory.

Shape letters: B batch, H heads, T tokens, D head dimension, M model width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_scale.config import ModelConfig

TURN = 2 * math.pi


def rotate(x_BHTD: Tensor, *, start: int, theta: float) -> Tensor:
    """Rotary position embedding (RoFormer) for positions start, start + 1, ...

    Positions here are counted from the first key of a call: attention sees only differences. Computed in float32 (float64 stays),
    but angles are brought below one turn in float64 first: in float32 alone a rotated number is off by 0.004 at position 32,768 and by
    0.17 at a million, this way by 1e-6 at both. (Apple's GPUs have no float64.)
    """
    dtype = torch.promote_types(x_BHTD.dtype, torch.float32)
    exact = dtype if x_BHTD.device.type == "mps" else torch.float64
    half = x_BHTD.shape[-1] // 2
    turns = theta ** (-torch.arange(half, device=x_BHTD.device, dtype=exact) / half) / TURN
    position = torch.arange(start, start + x_BHTD.shape[-2], device=x_BHTD.device, dtype=exact)
    angle_TD = TURN * (position[:, None] * turns).frac().to(dtype)
    cos, sin = angle_TD.cos(), angle_TD.sin()
    first, second = x_BHTD.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHTD.dtype)


def mlp_width(config: ModelConfig) -> int:
    """Hidden width of the MLP: model.mlp_dim, or 8/3 of model.dim rounded up to a multiple of 64."""
    return config.mlp_dim or -(-config.dim * 8 // (3 * 64)) * 64


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = mlp_width(config)
        self.gate = nn.Linear(config.dim, hidden, bias=False)
        self.up = nn.Linear(config.dim, hidden, bias=False)
        self.down = nn.Linear(hidden, config.dim, bias=False)

    def forward(self, x_BTM: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTM)) * self.up(x_BTM))


class MemoryGate(nn.Module):
    """o = norm(y) (x) SiLU(norm(m)): both normalised with learnable vectors, then a non-linearity (section 4.2).

    No projection follows that could start small, so the vector on y does: at init_std / sqrt(2 * num_layers), or the outputs of the
    first blocks would drown the embeddings, which start at init_std. In a small MAC (4 layers of 128, 200 steps) the loss
    came to 5.62 from a start at 0.35, 5.48 from 0.1, 5.27 from 0.03 and 5.21 from 0.01.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.y_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.memory_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, y_BTM: Tensor, memory_BTM: Tensor) -> Tensor:
        return self.y_norm(y_BTM) * F.silu(self.memory_norm(memory_BTM))

"""Projections of multi-head attention, and the keys and values they make.

Shape letters: B batch, H heads, T query tokens, S key tokens, D head dimension, M model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans_scale.config import ModelConfig


class KeyValue(NamedTuple):
    """Keys without position, and values: (B, H, S, D) each."""

    k: Tensor
    v: Tensor

    def then(self, newer: "KeyValue") -> "KeyValue":
        return KeyValue(torch.cat((self.k, newer.k), dim=2), torch.cat((self.v, newer.v), dim=2))

    def between(self, begin: int, end: int | None = None) -> "KeyValue":
        return KeyValue(self.k[:, :, begin:end], self.v[:, :, begin:end])


class Attention(nn.Module):
    """Projections of multi-head attention; which tokens see which is the caller's choice of function."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.out_proj = nn.Linear(config.dim, config.dim, bias=False)

    def queries(self, x_BTM: Tensor) -> Tensor:
        return self._heads(self.q_proj(x_BTM))

    def keys_values(self, x_BTM: Tensor) -> KeyValue:
        return KeyValue(self._heads(self.k_proj(x_BTM)), self._heads(self.v_proj(x_BTM)))

    def output(self, y_BHTD: Tensor) -> Tensor:
        return self.out_proj(y_BHTD.transpose(1, 2).flatten(2))

    def _heads(self, x_BTM: Tensor) -> Tensor:
        return x_BTM.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

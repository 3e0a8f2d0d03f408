"""Attention with a persistent prefix: causal inside a segment (mac), or over a sliding window (mag, mal).

The portable path: torch's scaled_dot_product_attention over blocks of one window each, so time and memory are linear in the
sequence. Keys of the prefix have no position: a persistent token says the same to every token, however far along.

Shape letters: B batch, H heads, T query tokens, S key tokens, P persistent tokens, W window, D head dimension, M model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from titans_scale.config import ModelConfig
from titans_scale.models.layers import rotate


class KeyValue(NamedTuple):
    """Keys without position, and values: (B, H, S, D) each."""

    k: Tensor
    v: Tensor

    def then(self, newer: "KeyValue") -> "KeyValue":
        return KeyValue(torch.cat((self.k, newer.k), dim=2), torch.cat((self.v, newer.v), dim=2))

    def between(self, begin: int, end: int | None = None) -> "KeyValue":
        return KeyValue(self.k[:, :, begin:end], self.v[:, :, begin:end])


class Attention(nn.Module):
    """Projections of multi-head attention; which tokens see which is the caller's choice of function below."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
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
        return x_BTM.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def segment_attention(q_BHTD: Tensor, memory: KeyValue, segment: KeyValue, prefix: KeyValue, *, theta: float) -> Tensor:
    """Causal attention of the last T tokens of a segment over [prefix || memory tokens || segment] (equations 22 and 23).

    Memory token j was asked for by token j, so token i sees memory tokens j <= i only: more would leak the segment's future.

    Args:
        q_BHTD: queries of the last T of the S tokens.   memory, segment: keys and values of all S tokens so far in the segment.
        prefix: those of the persistent tokens; P may be 0.   theta: base of the rotary embedding.
    """
    num_queries, num_keys = q_BHTD.shape[2], segment.k.shape[2]
    past = num_keys - num_queries
    causal_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BHTD.device).tril(past)
    keys = torch.cat((rotate(memory.k, start=0, theta=theta), rotate(segment.k, start=0, theta=theta)), dim=2)
    values = torch.cat((memory.v, segment.v), dim=2)
    rotated = rotate(q_BHTD, start=past, theta=theta)
    return _attend(q_BHTD, rotated, KeyValue(keys, values), prefix, torch.cat((causal_TS, causal_TS), dim=1))


def window_attention(q_BHTD: Tensor, context: KeyValue, prefix: KeyValue, *, window: int, theta: float) -> Tensor:
    """Each token attends to the prefix and to the last `window` tokens, itself included.

    Args:
        q_BHTD: queries of the last T of the S tokens.   context: keys and values of all S, at least the last T + window - 1 there are.
        prefix: those of the persistent tokens; P may be 0.   theta: base of the rotary embedding.
    Cost: O(T * (window + P)); the first block alone is handled by itself, so that all others share one mask.
    """
    num_queries, past = q_BHTD.shape[2], context.k.shape[2] - q_BHTD.shape[2]
    first = min(window, num_queries)
    y = _one_block(q_BHTD[:, :, :first], context.between(max(0, past - window + 1), past + first), prefix, window, theta)
    if first == num_queries:
        return y
    return torch.cat((y, _further_blocks(q_BHTD, context, prefix, window, theta, first, past)), dim=2)


def _one_block(q_BHTD: Tensor, context: KeyValue, prefix: KeyValue, window: int, theta: float) -> Tensor:
    num_queries, num_keys = q_BHTD.shape[2], context.k.shape[2]
    mask_TS = _band(num_queries, num_keys, window, q_BHTD.device)
    keys = context._replace(k=rotate(context.k, start=0, theta=theta))
    return _attend(q_BHTD, rotate(q_BHTD, start=num_keys - num_queries, theta=theta), keys, prefix, mask_TS)


def _further_blocks(q_BHTD: Tensor, context: KeyValue, prefix: KeyValue, window: int, theta: float, first: int, past: int) -> Tensor:
    """Blocks of W queries after the first, each over its own W keys and the W before them: one call, one mask."""
    num_queries = q_BHTD.shape[2]
    rest = num_queries - first
    blocks = -(-rest // window)
    filling = blocks * window - rest
    begin = past + first - window

    def overlapping(x: Tensor) -> Tensor:
        """Each block's keys, a block being a row of the batch."""
        padded = F.pad(x[:, :, begin:], (0, 0, 0, filling))
        return rearrange(padded.unfold(2, 2 * window, window), "b h n d s -> (b n) h s d")

    queries = rearrange(F.pad(q_BHTD[:, :, first:], (0, 0, 0, filling)), "b h (n t) d -> (b n) h t d", t=window)
    keys = KeyValue(rotate(overlapping(context.k), start=0, theta=theta), overlapping(context.v))
    rotated = rotate(queries, start=window, theta=theta)
    mask_TS = _band(window, 2 * window, window, q_BHTD.device)
    repeated = KeyValue(*(repeat(x, "b h p d -> (b n) h p d", n=blocks) for x in prefix))
    y = _attend(queries, rotated, keys, repeated, mask_TS)
    return rearrange(y, "(b n) h t d -> b h (n t) d", n=blocks)[:, :, :rest]


def _band(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """True where the query (the last num_queries of the keys) sees the key: not after itself, less than `window` before."""
    past = num_keys - num_queries
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(past) & ones.triu(past - window + 1)


def _attend(q_BHTD: Tensor, rotated_BHTD: Tensor, context: KeyValue, prefix: KeyValue, mask_TS: Tensor) -> Tensor:
    """softmax over [prefix || context], the prefix met by the unrotated query and the context by the rotated one.

    One call serves both: queries and keys are twice as wide, with zeros where a pair must not meet.
    """
    scale = q_BHTD.shape[-1] ** -0.5
    num_prefix = prefix.k.shape[2]
    if num_prefix == 0:
        return F.scaled_dot_product_attention(rotated_BHTD, context.k, context.v, attn_mask=mask_TS, scale=scale)
    wide_prefix = F.pad(prefix.k, (prefix.k.shape[-1], 0))
    wide_context = F.pad(context.k, (0, context.k.shape[-1]))
    return F.scaled_dot_product_attention(
        torch.cat((rotated_BHTD, q_BHTD), dim=-1),
        torch.cat((wide_prefix, wide_context), dim=2),
        torch.cat((prefix.v, context.v), dim=2),
        attn_mask=F.pad(mask_TS, (num_prefix, 0), value=True),
        scale=scale,
    )

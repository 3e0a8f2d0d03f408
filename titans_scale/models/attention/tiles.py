"""The portable kernel: causal attention over a sliding window, a tile of queries at a time, each over the keys that it sees.

A tile's scores fit into a core's cache, and nothing larger is ever made: time and memory are linear in the sequence. On a CPU a tile
is one call of torch's own flash kernel: 2.6 us forward and 6.5 us backward per query and head of 64 at window 512, one thread, against
3.3 and 7.2 as matrix products, and 4.1 and 10.3 in tiles of 512 queries, of which half is masked. Elsewhere it is matrix products.

Forward and backward are separate here because merge.py calls the backward pass with numbers of a larger softmax.

Shape letters: B batch, H heads, T query tokens, S key tokens, D head dimension.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

KEYS_ALIGNMENT = 16
"""Tiles begin at keys that are multiples of this: a key too many costs less than a matrix product of odd width."""


class Tile(NamedTuple):
    """Queries begin to end, over the keys first_key to last_key; the mask is 0 where a query sees a key, else -inf.

    For each row a mask of its own, (B, 1, T, S), where documents differ.
    """

    begin: int
    end: int
    first_key: int
    last_key: int
    mask: Tensor | None


def tiled_forward(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, window: int, document_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each of the last T of S tokens over the last `window` up to itself: the output (B, H, T, D), log-sum-exp of the scores (B, H, T).

    Args:
        document_BT: of each token the number of its document, and no token sees one of another; T = S then. None: all are of one.
    """
    if document_BT is None and _is_one_causal_call(q_BHTD, k_BHSD, window):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k_BHSD, v_BHSD, 0.0, True)
    forward = _cpu_forward if q_BHTD.device.type == "cpu" else _product_forward
    out, lse = _zeros_by_token(q_BHTD, q_BHTD.dtype), q_BHTD.new_empty(q_BHTD.shape[:3], dtype=wide(q_BHTD.dtype))
    for begin, end, first_key, last_key, mask in _tiles(q_BHTD, k_BHSD.shape[2], window, document_BT):
        keys = slice(first_key, last_key)
        out[:, :, begin:end], lse[:, :, begin:end] = forward(q_BHTD[:, :, begin:end], k_BHSD[:, :, keys], v_BHSD[:, :, keys], mask)
    return out, lse


def tiled_backward(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    window: int,
    document_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. The probabilities are exp(score - lse), so that lse may be that of a softmax over more keys than these."""
    if document_BT is None and _is_one_causal_call(q_BHTD, k_BHSD, window):
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash_backward(grad_BHTD, q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT, 0.0, True)
    backward = _cpu_backward if q_BHTD.device.type == "cpu" else _product_backward
    sums = wide(k_BHSD.dtype)  # a key's gradient comes from several tiles
    dq, dk, dv = _zeros_by_token(q_BHTD, q_BHTD.dtype), _zeros_by_token(k_BHSD, sums), _zeros_by_token(v_BHSD, sums)
    for begin, end, first_key, last_key, mask in _tiles(q_BHTD, k_BHSD.shape[2], window, document_BT):
        grad, q, out = (x[:, :, begin:end] for x in (grad_BHTD, q_BHTD, out_BHTD))
        keys = slice(first_key, last_key)
        gradients = backward(grad, q, k_BHSD[:, :, keys], v_BHSD[:, :, keys], out, lse_BHT[:, :, begin:end], mask)
        dq[:, :, begin:end] = gradients[0]
        dk[:, :, keys] += gradients[1]
        dv[:, :, keys] += gradients[2]
    return dq, dk.to(k_BHSD.dtype), dv.to(v_BHSD.dtype)


def visible_pairs(num_queries: int, num_keys: int, window: int) -> int:
    """How many (query, key) pairs meet: each of the last num_queries tokens sees the last `window` up to itself."""
    past = num_keys - num_queries
    return sum(min(past + t + 1, window) for t in range(num_queries))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of exponentials are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _zeros_by_token(x_BHTD: Tensor, dtype: torch.dtype) -> Tensor:
    """Of x's shape, the heads of a token side by side in memory, as the projections have them."""
    return torch.zeros_like(x_BHTD.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _is_one_causal_call(q_BHTD: Tensor, k_BHSD: Tensor, window: int) -> bool:
    """The CPU kernel knows the mask of a whole causal sequence by itself; up to here it is faster than tiles (MAC's segments are short)."""
    num_queries = q_BHTD.shape[2]
    return q_BHTD.device.type == "cpu" and num_queries == k_BHSD.shape[2] <= min(window, 1024)


def _tiles(q_BHTD: Tensor, num_keys: int, window: int, document_BT: Tensor | None) -> Iterator[Tile]:
    num_queries = q_BHTD.shape[2]
    past = num_keys - num_queries
    # A GPU wants few launches, a CPU scores that stay in its cache: measured best between windows of 16 and 2,048.
    size = (64 if window < 256 else 128) if q_BHTD.device.type == "cpu" else 256
    for begin in range(0, num_queries, size):
        end = min(begin + size, num_queries)
        last_key = past + end
        first_key = max(0, past + begin + 1 - window)
        mask = None
        if end - begin > 1:
            first_key -= first_key % KEYS_ALIGNMENT
            mask = _band(end - begin, last_key - first_key, window, q_BHTD.dtype, q_BHTD.device)
        if document_BT is not None:
            differ = document_BT[:, None, begin:end, None] != document_BT[:, None, None, first_key:last_key]
            mask = (q_BHTD.new_zeros(()) if mask is None else mask).expand(differ.shape).masked_fill(differ, -torch.inf)
        yield Tile(begin, end, first_key, last_key, mask)


@lru_cache(maxsize=8)
def _band(num_queries: int, num_keys: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where the query (the last num_queries of the keys) sees the key: not after itself, less than `window` before; else -inf."""
    past = num_keys - num_queries
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    seen = ones.tril(past) & ones.triu(past - window + 1)
    return torch.zeros(num_queries, num_keys, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)


def _cpu_forward(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k_BHSD, v_BHSD, 0.0, False, attn_mask=mask)


def _cpu_backward(
    grad_BHTD: Tensor, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, out_BHTD: Tensor, lse_BHT: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return flash_backward(grad_BHTD, q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT, 0.0, False, attn_mask=mask)


def _product_forward(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = _scores(q_BHTD, k_BHSD, mask)
    lse = scores.logsumexp(-1)
    return (scores.sub_(lse[..., None]).exp_() @ v_BHSD.to(scores.dtype)).to(q_BHTD.dtype), lse


def _product_backward(
    grad_BHTD: Tensor, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, out_BHTD: Tensor, lse_BHT: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    p = _scores(q_BHTD, k_BHSD, mask).sub_(lse_BHT[..., None]).exp_()
    return softmax_gradients(p, grad_BHTD, q_BHTD, k_BHSD, v_BHSD, out_BHTD)


def _scores(q_BHTD: Tensor, k_BHSD: Tensor, mask: Tensor | None) -> Tensor:
    scores = scaled_scores(q_BHTD, k_BHSD)
    return scores if mask is None else scores.add_(mask)


def scaled_scores(q_BHTD: Tensor, k_BHSD: Tensor) -> Tensor:
    """q k^T / sqrt(D) in float32 (float64 stays), as flash kernels have it: rounded to bfloat16, a score is off by up to 0.4%."""
    dtype = wide(q_BHTD.dtype)
    return (q_BHTD.to(dtype) * q_BHTD.shape[-1] ** -0.5) @ k_BHSD.to(dtype).mT


def softmax_gradients(
    p_BHTS: Tensor, grad_BHTD: Tensor, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, out_BHTD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from probabilities p, which need not add up to 1 here: `out` is that of the whole softmax."""
    q, k, v, grad, out = (x.to(p_BHTS.dtype) for x in (q_BHTD, k_BHSD, v_BHSD, grad_BHTD, out_BHTD))
    through_sum = (grad * out).sum(-1, keepdim=True)
    ds = (grad @ v.mT - through_sum) * p_BHTS * q.shape[-1] ** -0.5
    return (ds @ k).to(q_BHTD.dtype), (ds.mT @ q).to(k_BHSD.dtype), (p_BHTS.mT @ grad).to(v_BHSD.dtype)

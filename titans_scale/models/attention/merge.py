"""One softmax over several groups of keys, each attended to by a kernel of its own, with exact gradients.

Forward, every group gives its output and the log-sum-exp of its scores; with lse = log sum exp of those, the whole output is
sum_i exp(lse_i - lse) out_i. The persistent prefix is one such group: its keys have no position and are met by the query as it was before
rotation, so that the others stay a plain window of FlashAttention.

Backward, nothing of the merging is differentiated. The probabilities of the whole softmax are p_ts = exp(s_ts - lse_t), and
d s_ts = p_ts (dout_t . v_s - dout_t . out_t): what a flash kernel's backward pass makes of (out, lse), if given those of the whole, as in
ring attention (arXiv 2310.01889). So no gradient through a log-sum-exp is needed, which flash kernels do not have.

It is one operator (`titans_scale::attention`), so that torch.compile leaves the kernels alone and selective activation checkpointing
can keep its result.

Shape letters: B batch, H heads, T query tokens, S key tokens, P persistent tokens, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from titans_scale.models.attention.flash import flash_backward, flash_forward
from titans_scale.models.attention.tiles import scaled_scores, softmax_gradients, tiled_backward, tiled_forward, visible_pairs, wide
from titans_scale.models.documents import DocumentLayout


def attend(
    q_BHTD: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    prefix_q_BHTD: Tensor,
    prefix_k_BHPD: Tensor,
    prefix_v_BHPD: Tensor,
    window: int,
    backend: str,
    documents: DocumentLayout | None = None,
) -> Tensor:
    """Softmax over the prefix, seen by every query, and over all groups: of each, a query sees the last `window` up to its own place.

    Args:
        q_BHTD: queries of the last T of the S tokens, rotated.   keys, values: (B, H, S, D) for each group; keys rotated.
        prefix_q_BHTD: the same queries, not rotated.   backend: "flash" or "sdpa".
        documents: of rows that several are packed in (T = S then): a token sees none of another document.
    """
    if prefix_k_BHPD.shape[2] == 0:
        prefix_q_BHTD = prefix_q_BHTD[:, :, :0]  # met by nothing, so not to be kept for the backward pass
    packed = (documents.number_BT, documents.bounds_D) if documents else (None, None)
    prefix = (prefix_q_BHTD, prefix_k_BHPD, prefix_v_BHPD)
    return torch.ops.titans_scale.attention(q_BHTD, keys, values, *prefix, window, backend, *packed)[0]


def merge(
    parts: Sequence[tuple[Tensor, Tensor]], prefix_q_BHTD: Tensor, prefix_k_BHPD: Tensor, prefix_v_BHPD: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the prefix and all parts, from each part's output (B, H, T, D) and log-sum-exp (B, H, T)."""
    has_prefix = prefix_k_BHPD.shape[2] > 0
    if len(parts) == 1 and not has_prefix:
        return parts[0]
    sums = [lse for _, lse in parts]
    if has_prefix:
        scores = scaled_scores(prefix_q_BHTD, prefix_k_BHPD)
        sums.append(scores.logsumexp(-1))
    lse = torch.stack(sums).logsumexp(0)
    out = sum(part * (part_lse - lse).exp()[..., None] for part, part_lse in parts)
    assert isinstance(out, Tensor)
    if has_prefix:
        out = out + (scores - lse[..., None]).exp() @ prefix_v_BHPD.to(scores.dtype)
    return out.to(parts[0][0].dtype), lse


@torch.library.custom_op("titans_scale::attention", mutates_args=())
def _attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    prefix_q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    window: int,
    backend: str,
    number: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    forward, documents = (flash_forward, bounds) if backend == "flash" else (tiled_forward, number)
    parts = [forward(q, k, v, window, documents) for k, v in zip(keys, values, strict=True)]
    out, lse = merge(parts, prefix_q, prefix_k, prefix_v)
    return _like_tokens(out), lse.contiguous()


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_tokens(torch.empty_like(q)), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


def _like_tokens(x_BHTD: Tensor) -> Tensor:
    """With the heads of a token side by side in memory, as the projections have them; a new layout must be told to torch.compile."""
    return x_BHTD.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op("titans_scale::attention_group_backward", mutates_args=())
def _group_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    backend: str,
    number: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    backward, documents = (flash_backward, bounds) if backend == "flash" else (tiled_backward, number)
    dq, dk, dv = backward(grad, q, k, v, out, lse, window, documents)
    return _like_tokens(dq), _like_tokens(dk), _like_tokens(dv)


@_group_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like_tokens(torch.empty_like(q)), _like_tokens(torch.empty_like(k)), _like_tokens(torch.empty_like(v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, values, prefix_q, prefix_k, prefix_v, ctx.window, ctx.backend, *documents = inputs
    ctx.save_for_backward(q, prefix_q, prefix_k, prefix_v, *documents, *output, *keys, *values)


def _gradients(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """The log-sum-exp is for this function alone: nobody else sees it, so no gradient comes through it."""
    q, prefix_q, prefix_k, prefix_v, number, bounds, out, lse, *groups = ctx.saved_tensors
    keys, values = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    backward = torch.ops.titans_scale.attention_group_backward
    by_group = [backward(grad, q, k, v, out, lse, ctx.window, ctx.backend, number, bounds) for k, v in zip(keys, values, strict=True)]
    dqs, dks, dvs = ([group[place] for group in by_group] for place in range(3))
    of_prefix: tuple[Tensor | None, ...] = (None, None, None)
    if prefix_k.shape[2]:
        p = (scaled_scores(prefix_q, prefix_k) - lse[..., None]).exp()
        of_prefix = softmax_gradients(p, grad, prefix_q, prefix_k, prefix_v, out)
    return (sum(dqs[1:], start=dqs[0]), dks, dvs, *of_prefix, None, None, None, None)


_attention.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.titans_scale.attention)
def _forward_flops(q: Any, keys: Any, values: Any, prefix_q: Any, prefix_k: Any, prefix_v: Any, window: int, *_: Any, **__: Any) -> int:
    """Two products for the pairs that meet, those with the prefix too; what a kernel computes only to mask it is left out."""
    batch, heads, num_queries, dim = q
    pairs = num_queries * prefix_k[2] + sum(visible_pairs(num_queries, k[2], window) for k in keys)
    return 4 * batch * heads * dim * pairs


@register_flop_formula(torch.ops.titans_scale.attention_group_backward)
def _group_backward_flops(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, window: int, *_: Any, **__: Any) -> int:
    """Five products: the scores again, and two gradients of each product of the forward pass."""
    batch, heads, num_queries, dim = q
    return 10 * batch * heads * dim * visible_pairs(num_queries, k[2], window)

"""The memory over a whole sequence, a chunk at a time, without ever materialising a token's weights (the dual form).

Shape letters: B batch, H memory heads, T tokens, N chunks, C tokens of a chunk, D head dimension, O/I a layer's output and input width.
Source: Titans (arXiv 2501.00663) section 3.2 for one layer; docs/memory.md derives it for momentum and any depth.

The only sequential work is one step a chunk. titans_scale/memory/groups.py has the loop and its gradients, scan_op.py makes
one operator of torch of it.
"""

import math
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from titans_scale.memory.groups import Rule, Tokens
from titans_scale.memory.mlp import Activation, ResidualNorm
from titans_scale.memory.scan_op import scan_op
from titans_scale.memory.state import OpenChunk, ScanState, initial_weights
from titans_scale.memory.write_rule import WriteRule

WRITE_RULES = get_args(WriteRule)


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: list[Tensor],
    state: ScanState | None = None,
    chunk_size: int = 64,
    activation: Activation = "silu",
    backend: str = "auto",
    *,
    write_rule: WriteRule = "plain",
    norm: ResidualNorm | None = None,
    max_inner_grad_norm: float | None = None,
    passes: int = 1,
    curvature_margin: float | None = 4.0,
    state_interval: int | None = None,
    resets: Tensor | None = None,
    group: str = "",
) -> tuple[Tensor, ScanState]:
    """Write every token into its head's memory and read the memory as it stands right after (equations 13 to 16).

    Args:
        q, k, v: (B, H, T, D).   theta, eta, alpha: step size, momentum decay and forgetting, (B, H, T), see `chunk_coefficients`.
        weights: initial weights of the memory MLP, one (H, out, in) a layer; used when there is no state.
        state: what an earlier call returned; any cut of the tokens with the state handed on equals one pass.
        chunk_size: tokens whose surprise is taken at the same weights.   activation: between the layers, silu or gelu.
        backend: "torch", or "auto" for the fastest that runs here (torch is the only one so far).
        write_rule: plain, normalized (titans_scale/memory/write_rule.py) or online (titans_scale/memory/online.py).
        norm: the memory is x + LayerNorm(MLP(x)).   max_inner_grad_norm: clip of every token's surprise.
        passes, curvature_margin: of the online rule: how often a chunk is gone through, and the bound of a token's own step (None: none).
        state_interval: chunks between two states kept for the backward pass, those between being recomputed; None: about the
            square root of half the number of chunks, four at least; 1: keep all.
        resets: bool, (B, chunks, an open one included): chunks before which a row's memory goes back to the initial weights and no
            momentum, as at the start of a sequence. Without a state only.
        group: name of the process group over which the hidden width is split (depth 2): every rank then has its rows of the first
            weights and its columns of the second, here and in the state; all else is given alike on all ranks, and so is y. Gradients in
            what is alike are parts, whose sum over the ranks is the gradient; those in weights and state are whole.
    Returns:
        y (B, H, T, D) in q's dtype, and the state after the last token in float32 (float64 where an input is).
    Raises:
        ValueError: shapes that do not fit each other, no tokens, an unknown option, resets of a carried state, or a group where the depth
            is not 2.
    """
    _check(q, k, v, (theta, eta, alpha), weights, chunk_size, backend)
    if write_rule not in WRITE_RULES:
        raise ValueError(f"memory_scan has no write_rule {write_rule!r}; choose one of {', '.join(WRITE_RULES)}")
    if passes < 1:
        raise ValueError(f"passes is {passes}; the online rule needs at least one")
    if group and len(weights) != 2:
        raise ValueError(f"a memory of depth {len(weights)} has no one hidden width to split over a group; use depth 2, or no group")
    batch_size, _, length, _ = q.shape
    if resets is not None:
        _check_resets(resets, (batch_size, -(-length // chunk_size)), state)
    dtype = _compute_dtype(q, k, v, theta, eta, alpha, *weights)
    tokens = Tokens(*(x.to(dtype) for x in (q, k, v, theta, eta, alpha)))
    scales = [x.to(dtype) for x in norm or ()]
    rule = Rule(chunk_size, activation, write_rule, max_inner_grad_norm, passes, curvature_margin, group)
    if state is None:
        now = initial_weights(weights, batch_size, dtype)
        momentum = [torch.zeros_like(weight) for weight in now]
    else:
        now, momentum = state.chunk_weights, state.chunk_momentum
        tokens = _with_open_chunk(state.open_chunk, tokens)

    total = tokens.k.shape[2]
    states = [torch.cat(pair, dim=-2) for pair in zip(now, momentum, strict=True)]
    rest_length = total % chunk_size
    whole_chunks = total // chunk_size
    whole, rest = (Tokens(*pieces) for pieces in zip(*(x.split([total - rest_length, rest_length], dim=2) for x in tokens), strict=True))
    outputs = []
    initial = states
    if whole_chunks:
        interval = state_interval or default_interval(whole_chunks)
        y, states = _scan(whole, states, scales, rule, chunk_size, interval, None if resets is None else resets[:, :whole_chunks])
        outputs.append(y)
    start = states
    if rest_length:
        if resets is not None:
            anew_B = resets[:, -1, None, None, None]
            start = [torch.where(anew_B, first, now) for first, now in zip(initial, states, strict=True)]
        y, states = _scan(rest, start, scales, rule, rest_length, 1, None)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return y[:, :, total - length :].to(q.dtype), ScanState(*_apart(states), *_apart(start), OpenChunk(*rest[1:]))


def default_interval(num_chunks: int) -> int:
    """Chunks between two states kept, which are as many as there are groups; a chunk of the group at work takes the room of two.

    Four at least, since small groups cost time.
    """
    return max(4, round(math.sqrt(num_chunks / 2)))


def _scan(
    tokens: Tokens, states: list[Tensor], norm: list[Tensor], rule: Rule, length: int, interval: int, resets: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Tokens in chunks of `length`: y and the states after them."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*tokens, *states, *norm))
    y, *results = scan_op(*tokens, states, norm, *rule, length, interval, keep, resets)
    return y, results[: len(states)]


def _apart(states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momentum of each layer."""
    weights, momentum = zip(*(state.chunk(2, dim=-2) for state in states), strict=True)
    return list(weights), list(momentum)


def _with_open_chunk(earlier: OpenChunk, tokens: Tokens) -> Tokens:
    """The open chunk is computed again from its start, with the new tokens behind it; nobody reads at the old ones."""
    unread = torch.zeros_like(earlier.k_BHRD)
    return Tokens(*(torch.cat((old.to(new.dtype), new), dim=2) for old, new in zip((unread, *earlier), tokens, strict=True)))


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _check_resets(resets: Tensor, shape: tuple[int, int], state: ScanState | None) -> None:
    if state is not None:
        raise ValueError("resets go back to the initial weights, which a carried state is not; scan without a state, or without resets")
    if resets.shape != shape:
        raise ValueError(f"resets have shape {tuple(resets.shape)}; they must be (batch, chunks) = {shape}, a chunk at the end included")


def _check(
    q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, Tensor, Tensor], weights: list[Tensor], chunk_size: int, backend: str
) -> None:
    if backend not in ("auto", "torch"):
        raise ValueError(f"memory_scan has no backend {backend!r}; choose 'auto' or 'torch'")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    if q.dim() != 4 or q.shape[2] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (batch, heads, tokens, head_dim) with at least one token")
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must have one shape; they have {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    for name, gate in zip(("theta", "eta", "alpha"), gates, strict=True):
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name} has shape {tuple(gate.shape)}; it must be (batch, heads, tokens) = {tuple(q.shape[:3])}")
    heads, dim = q.shape[1], q.shape[3]
    if not weights or any(weight.dim() != 3 or weight.shape[0] != heads for weight in weights):
        raise ValueError(f"weights must be a list of (heads = {heads}, out, in), one a layer; got {[tuple(w.shape) for w in weights]}")
    widths = [weights[0].shape[2], *(weight.shape[1] for weight in weights)]
    chained = all(a.shape[1] == b.shape[2] for a, b in pairwise(weights))
    if widths[0] != dim or widths[-1] != dim or not chained:
        raise ValueError(f"weights {[tuple(w.shape) for w in weights]} do not map {dim} to {dim}; each layer is (heads, out, in)")

"""The memory over a whole sequence, a chunk at a time, without ever materialising a token's weights (the dual form).

Shape letters: B batch, H memory heads, T tokens, N chunks, C tokens of a chunk, D head dimension, O/I a layer's output and input width.
Source: Titans (arXiv 2501.00663) section 3.2 for one layer; docs/memory.md derives it for momentum and any depth.

Everything is plain matrix products under autograd, so it composes with activation checkpointing, torch.compile and FSDP2.
The only sequential work is one step a chunk.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titans_scale.memory.coefficients import ChunkCoefficients, chunk_coefficients
from titans_scale.memory.mlp import Activation, ResidualNorm, Surprise, activate, output_of, surprise
from titans_scale.memory.state import OpenChunk, ScanState, initial_weights
from titans_scale.memory.write_rule import WriteRule, effective_step, scale_surprise


class _Tokens(NamedTuple):
    """What the rule needs of each token: (B, H, ..., D) and (B, H, ...)."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    eta: Tensor
    alpha: Tensor

    def split(self, lengths: list[int]) -> list["_Tokens"]:
        """Consecutive pieces. One split, not many slices: the gradient of a slice is as long as the whole."""
        return [_Tokens(*pieces) for pieces in zip(*(x.split(lengths, dim=2) for x in self), strict=True)]

    def in_chunks(self, chunk_size: int) -> "_Tokens":
        return _Tokens(*(x.unflatten(2, (-1, chunk_size)) for x in self))


class _Rule(NamedTuple):
    activation: Activation
    write_rule: WriteRule
    chunk_size: int
    norm: ResidualNorm | None
    max_inner_grad_norm: float | None


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
    state_interval: int | None = None,
) -> tuple[Tensor, ScanState]:
    """Write every token into its head's memory and read the memory as it stands right after (equations 13 to 16).

    Args:
        q, k, v: (B, H, T, D).   theta, eta, alpha: step size, momentum decay and forgetting, (B, H, T), see `chunk_coefficients`.
        weights: initial weights of the memory MLP, one (H, out, in) a layer; used when there is no state.
        state: what an earlier call returned; any cut of the tokens with the state handed on equals one pass.
        chunk_size: tokens whose surprise is taken at the same weights.   activation: between the layers, silu or gelu.
        backend: "torch", or "auto" for the fastest that runs here (torch is the only one so far).
        write_rule: plain, or normalized (titans_scale/memory/write_rule.py).   norm: the memory is x + LayerNorm(MLP(x)).
        max_inner_grad_norm: clip of every token's surprise.
        state_interval: chunks between two states kept for the backward pass, those between being recomputed; None: about the
            square root of the number of chunks; 1: keep all.
    Returns:
        y (B, H, T, D) in q's dtype, and the state after the last token in float32 (float64 where an input is).
    Raises:
        ValueError: shapes that do not fit each other, no tokens, or an unknown option.
    """
    _check(q, k, v, (theta, eta, alpha), weights, chunk_size, backend)
    batch_size, _, length, _ = q.shape
    dtype = _compute_dtype(q, k, v, theta, eta, alpha, *weights)
    tokens = _Tokens(*(x.to(dtype) for x in (q, k, v, theta, eta, alpha)))
    rule = _Rule(activation, write_rule, chunk_size, norm and ResidualNorm(*(x.to(dtype) for x in norm)), max_inner_grad_norm)
    if state is None:
        now = initial_weights(weights, batch_size, dtype)
        momentum = [torch.zeros_like(weight) for weight in now]
    else:
        now, momentum = state.chunk_weights, state.chunk_momentum
        tokens = _with_open_chunk(state.open_chunk, tokens)

    total = tokens.k.shape[2]
    num_chunks, rest_length = divmod(total, chunk_size)
    interval = state_interval or max(1, round(math.sqrt(num_chunks)))
    group_lengths = [chunk_size * min(interval, num_chunks - first) for first in range(0, num_chunks, interval)]
    *groups, rest = tokens.split([*group_lengths, rest_length])
    outputs = []
    for group in (group.in_chunks(chunk_size) for group in groups):
        if group.k.shape[2] > 1 and torch.is_grad_enabled():
            y, now, momentum = checkpoint(_scan_chunks, group, now, momentum, rule, use_reentrant=False, preserve_rng_state=False)
        else:
            y, now, momentum = _scan_chunks(group, now, momentum, rule)
        outputs.append(y)
    start, start_momentum = now, momentum
    if rest_length:
        y, now, momentum = _scan_chunks(rest.in_chunks(rest_length), now, momentum, rule)
        outputs.append(y)
    y = torch.cat(outputs, dim=2)[:, :, total - length :]
    return y.to(q.dtype), ScanState(now, momentum, start, start_momentum, OpenChunk(*rest[1:]))


def _scan_chunks(tokens: _Tokens, weights: list[Tensor], momentum: list[Tensor], rule: _Rule) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Scan chunks (B, H, N, C, ...); return y (B, H, N * C, D) and the weights and momentum after the last one."""
    step = effective_step(tokens.theta, tokens.eta, rule.write_rule)
    coefficients = chunk_coefficients(step, tokens.eta, tokens.alpha)
    outputs = []
    for q, k, v, theta, *of_chunk in zip(*(x.unbind(2) for x in (*tokens[:4], *coefficients)), strict=True):
        chunk = ChunkCoefficients(*of_chunk)
        raw = surprise(k, v, weights, rule.activation, rule.norm)
        write = scale_surprise(raw, theta, rule=rule.write_rule, chunk_size=rule.chunk_size, max_norm=rule.max_inner_grad_norm)
        outputs.append(_read(q, weights, momentum, write, chunk, rule))
        weights, momentum = _advance(weights, momentum, write, chunk)
    return torch.cat(outputs, dim=2), weights, momentum


def _read(q_BHCD: Tensor, weights: list[Tensor], momentum: list[Tensor], write: Surprise, chunk: ChunkCoefficients, rule: _Rule) -> Tensor:
    """y_t = M_t(q_t): each layer is a product with the start state plus one masked product with the writes, as in linear attention."""
    start, carry = chunk.start_C.unsqueeze(-1), chunk.carry_C.unsqueeze(-1)
    z = q_BHCD
    layers = zip(weights, momentum, write.features, write.deltas, strict=True)
    for layer, (weight, velocity, feature, delta) in enumerate(layers):
        x = activate(z, rule.activation) if layer else z
        z = start * (x @ weight.mT) + carry * (x @ velocity.mT) - ((x @ feature.mT) * chunk.write_CC) @ delta
    return output_of(q_BHCD, z, rule.norm)


def _advance(weights: list[Tensor], momentum: list[Tensor], write: Surprise, chunk: ChunkCoefficients) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momentum after the chunk's last token."""
    keep, carry, decay = (x[..., None, None] for x in (chunk.start_C[..., -1], chunk.carry_C[..., -1], chunk.momentum_decay))
    into_weights, into_momentum = chunk.write_CC[..., -1, :].unsqueeze(-1), chunk.momentum_write_C.unsqueeze(-1)
    new_weights, new_momentum = [], []
    for weight, velocity, feature, delta in zip(weights, momentum, write.features, write.deltas, strict=True):
        new_weights.append(keep * weight + carry * velocity - (into_weights * delta).mT @ feature)
        new_momentum.append(decay * velocity - (into_momentum * delta).mT @ feature)
    return new_weights, new_momentum


def _with_open_chunk(earlier: OpenChunk, tokens: _Tokens) -> _Tokens:
    """The open chunk is computed again from its start, with the new tokens behind it; nobody reads at the old ones."""
    unread = torch.zeros_like(earlier.k_BHRD)
    return _Tokens(*(torch.cat((old.to(new.dtype), new), dim=2) for old, new in zip((unread, *earlier), tokens, strict=True)))


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


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

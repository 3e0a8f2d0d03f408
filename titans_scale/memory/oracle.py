"""The memory token by token: slow, and plain enough to be checked against the paper by eye. Every fast path is held to it.

Shape letters: B batch, H memory heads, T tokens, D head dimension.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from titans_scale.memory.mlp import LAYER_NORM_EPS, Activation, ResidualNorm
from titans_scale.memory.state import OpenChunk, ScanState
from titans_scale.memory.write_rule import WriteRule, curvature_factor


def memory_oracle(
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
    passes: int = 1,
    curvature_margin: float | None = 4.0,
    resets: Tensor | None = None,
) -> tuple[Tensor, ScanState]:
    """Same arguments and results as `memory_scan`; `backend`, `state_interval` and `passes` have nothing to choose here.

    But `resets` are (B, T), a bool a token: from one to the next a row is a sequence of its own.

    Equations 13 and 14 of the paper, with the surprise at the weights of the chunk's start (section 3.2), or, for the online rule,
    at those one token earlier:
    S_t = eta_t S_{t-1} - theta_t g_t ;  M_t = (1 - alpha_t) M_{t-1} + S_t ;  y_t = M_t(q_t).
    """
    if resets is not None:
        piece = partial(
            memory_oracle,
            weights=weights,
            chunk_size=chunk_size,
            activation=activation,
            write_rule=write_rule,
            norm=norm,
            max_inner_grad_norm=max_inner_grad_norm,
            curvature_margin=curvature_margin,
        )
        return _by_document(piece, (q, k, v, theta, eta, alpha), resets)
    batch_size = q.shape[0]
    past = 0
    if state is not None:
        past = state.open_chunk.length
        tokens = zip(state.open_chunk, (k, v, theta, eta, alpha), strict=True)
        k, v, theta, eta, alpha = (torch.cat(pair, dim=2) for pair in tokens)
        now, momentum = list(state.chunk_weights), list(state.chunk_momentum)
    else:
        now = [weight.expand(batch_size, *weight.shape) for weight in weights]
        momentum = [torch.zeros_like(weight) for weight in now]

    outputs = []
    start, start_momentum, begin = now, momentum, 0
    chunk: list[tuple[list[Tensor], Tensor, Tensor]] = []
    for t in range(k.shape[2]):
        if t - begin == chunk_size:
            start, start_momentum, begin, chunk = now, momentum, t, []
        raw, error = _surprise(k[:, :, t], v[:, :, t], now if write_rule == "online" else start, activation, norm)
        gradient = raw
        if max_inner_grad_norm is not None:
            length = torch.sqrt(_inner(raw, raw) + torch.finfo(k.dtype).tiny)
            gradient = _scaled(raw, (max_inner_grad_norm / length).clamp(max=1.0))
        step = theta[:, :, t]
        if write_rule == "normalized":
            chunk.append((gradient, error, step))
            gradient = _scaled(gradient, _normalizer(chunk, curvature_factor(chunk_size)))
            step = step * (1 - eta[:, :, t])
        elif write_rule == "online" and curvature_margin is not None:
            gradient = _scaled(gradient, _local_factor(raw, error, step, eta[:, :, t], curvature_margin))
        momentum = [eta[:, :, t, None, None] * s - step[..., None, None] * g for s, g in zip(momentum, gradient, strict=True)]
        now = [(1 - alpha[:, :, t, None, None]) * w + s for w, s in zip(now, momentum, strict=True)]
        if t >= past:
            outputs.append(_forward(q[:, :, t - past], now, activation, norm))
    if k.shape[2] - begin == chunk_size:
        start, start_momentum, begin = now, momentum, k.shape[2]
    rest = OpenChunk(*(x[:, :, begin:] for x in (k, v, theta, eta, alpha)))
    return torch.stack(outputs, dim=2), ScanState(now, momentum, start, start_momentum, rest)


def _by_document(scan: Callable[..., tuple[Tensor, ScanState]], tokens: tuple[Tensor, ...], resets_BT: Tensor) -> tuple[Tensor, ScanState]:
    """Every row cut at its resets, every piece by itself; the state is that of each row's last piece."""
    rows = []
    for row, resets_T in enumerate(resets_BT):
        bounds = [0, *(resets_T[1:].nonzero().flatten() + 1).tolist(), len(resets_T)]
        pieces = [scan(*(x[row : row + 1, :, begin:end] for x in tokens)) for begin, end in pairwise(bounds)]
        rows.append((torch.cat([y for y, _ in pieces], dim=2), pieces[-1][1]))
    y, states = zip(*rows, strict=True)
    return torch.cat(y), tree_map(lambda *xs: torch.cat(xs), *states)


def _forward(x_BHD: Tensor, weights: list[Tensor], activation: Activation, norm: ResidualNorm | None) -> Tensor:
    act = F.silu if activation == "silu" else F.gelu
    z = x_BHD
    for layer, weight in enumerate(weights):
        z = torch.einsum("bhoi,bhi->bho", weight, act(z) if layer else z)
    if norm is None:
        return z
    return x_BHD + F.layer_norm(z, z.shape[-1:], eps=LAYER_NORM_EPS) * norm.scale_HD + norm.shift_HD


def _surprise(
    k_BHD: Tensor, v_BHD: Tensor, weights: list[Tensor], activation: Activation, norm: ResidualNorm | None
) -> tuple[list[Tensor], Tensor]:
    """Gradient of |M(k) - v|^2 by autograd, and 2 (M(k) - v). Differentiable again where the inputs are."""
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [w if outer and w.requires_grad else w.detach().requires_grad_() for w in weights]
        difference = _forward(k_BHD, leaves, activation, norm) - v_BHD
        gradient = list(torch.autograd.grad(difference.square().sum(), leaves, create_graph=outer))
    return gradient, 2 * difference.detach()


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum((-1, -2)) for x, y in zip(a, b, strict=True)]).sum(0)


def _scaled(gradient: list[Tensor], factor_BH: Tensor) -> list[Tensor]:
    return [factor_BH[..., None, None] * g for g in gradient]


@torch.no_grad()
def _normalizer(chunk: list[tuple[list[Tensor], Tensor, Tensor]], factor: float) -> Tensor:
    """The factor of the chunk's newest token; see titans_scale.memory.write_rule."""
    newest, error, _ = chunk[-1]
    tiny = torch.finfo(error.dtype).tiny ** 0.5
    load = torch.zeros_like(error[..., 0])
    for gradient, other_error, step in chunk:
        load = load + step * _inner(newest, gradient).abs() / ((error.norm(dim=-1) + tiny) * (other_error.norm(dim=-1) + tiny))
    return 1 / (factor * load).clamp(min=1.0)


@torch.no_grad()
def _local_factor(gradient: list[Tensor], error: Tensor, step: Tensor, eta: Tensor, margin: float) -> Tensor:
    """1 / max(1, margin step / (1 - eta) |g|^2 / |e|^2): the step in the long run against the token's curvature. Finite at eta = 1."""
    finfo = torch.finfo(error.dtype)
    curvature = _inner(gradient, gradient) / (error.square().sum(-1) + finfo.tiny)
    return 1 / (margin * step / (1 - eta).clamp(min=finfo.eps) * curvature).clamp(min=1.0)

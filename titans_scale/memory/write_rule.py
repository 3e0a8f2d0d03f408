"""How a chunk's surprise becomes steps that cannot blow up.

All gradients of a chunk are taken at its start, so equal keys add up, and momentum multiplies what they add up to: the plain
rule diverges as soon as the step is large for the curvature (docs/stability.md). The factors here are causal: that of
token t depends on the chunk's tokens up to t alone.

Shape letters: B batch, H memory heads, C tokens of a chunk.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from titans_scale.memory.mlp import Surprise
from titans_scale.memory.ranks import sum_together

WriteRule = Literal["plain", "normalized", "online"]


def curvature_factor(chunk_size: int) -> float:
    """How far below the curvature's bound a step stays.

    Of b equal tokens, token t's share of the step is 1 / (factor * t), so together they take (1 + 1/2 + ... + 1/b) / factor of the
    way to the bound, which grows like log b. With a constant 4, which is enough at 16 tokens, a linear memory diverges on equal keys at a
    chunk of 64 and outputs pass 1e10 at 256 (tests/test_memory_stability.py); with this they stay below 200, at depth 1 and 2
    below 20, from chunk 1 to 256.
    """
    return 2 + math.log2(chunk_size)


def effective_step(theta: Tensor, eta: Tensor, rule: WriteRule) -> Tensor:
    """Step size that enters the recurrence. `normalized` divides out momentum's amplification 1 / (1 - eta)."""
    return theta * (1 - eta) if rule == "normalized" else theta


def effective_step_vjp(grad: Tensor, theta: Tensor, eta: Tensor, rule: WriteRule) -> tuple[Tensor, Tensor]:
    """Gradients of `effective_step` in theta and eta."""
    if rule == "normalized":
        return grad * (1 - eta), -grad * theta
    return grad, torch.zeros_like(grad)


class Scaling(NamedTuple):
    """How a surprise was scaled: every token's factor, and of it the clip's part where there is a clip. None: by nothing."""

    factor: Tensor | None
    clip: Tensor | None


def scale_surprise(
    raw: Surprise, theta_BHC: Tensor, *, rule: WriteRule, chunk_size: int, max_norm: float | None
) -> tuple[Surprise, Scaling]:
    """Surprise after the optional clip of each token's gradient norm and the rule's factor.

    Args:
        theta_BHC: the gate itself, before `effective_step`.
        chunk_size: of the rule; C may be smaller in a chunk that is still open.
        max_norm: clip of each token's gradient norm; None: no clip.
    """
    clip = None if max_norm is None else clip_factor(raw.squared_norm(), max_norm)
    scaled = raw if clip is None else raw.scaled(clip)
    if rule != "normalized":
        return scaled, Scaling(clip, clip)
    normalizer = _normalizer(scaled, theta_BHC, chunk_size)
    return scaled.scaled(normalizer), Scaling(normalizer if clip is None else normalizer * clip, clip)


def clip_factor(squared_norm: Tensor, max_norm: float) -> Tensor:
    """Of every token: 1, or what brings its gradient's norm down to max_norm."""
    return (max_norm / torch.sqrt(squared_norm + _tiny(squared_norm))).clamp(max=1.0)


def scale_surprise_vjp(grad_features: list[Tensor], grad_deltas: list[Tensor], raw: Surprise, scaling: Scaling) -> None:
    """From gradients in the scaled surprise to those in the raw one, in place."""
    if scaling.factor is None:
        return
    grad_scale = None
    if scaling.clip is not None:
        pairs = zip(grad_deltas, raw.deltas, strict=True)
        grad_scale = torch.stack([(grad * delta).sum(-1) for grad, delta in pairs]).sum(0)
    for grad in grad_deltas:
        grad.mul_(scaling.factor.unsqueeze(-1))
    if grad_scale is not None:
        scale_vjp(grad_scale, grad_features, grad_deltas, raw, scaling)


def scale_vjp(grad_scale: Tensor, grad_features: list[Tensor], grad_deltas: list[Tensor], raw: Surprise, scaling: Scaling) -> None:
    """Adds the gradients of the tokens' factors. The rule's part is a constant, the clip is not: clip = max_norm / |g| where below 1."""
    if scaling.clip is None or scaling.factor is None:
        return
    squared_norm, grad_scale = sum_together(raw.group, raw.own_squared_norm(), grad_scale)
    grad_norm_squared = torch.where(scaling.clip < 1, -0.5 * grad_scale * scaling.factor / (squared_norm + _tiny(squared_norm)), 0.0)
    for grad_feature, grad_delta, feature, delta in zip(grad_features, grad_deltas, raw.features, raw.deltas, strict=True):
        grad_delta.addcmul_(delta, (2 * grad_norm_squared * feature.square().sum(-1)).unsqueeze(-1))
        grad_feature.addcmul_(feature, (2 * grad_norm_squared * delta.square().sum(-1)).unsqueeze(-1))


@torch.no_grad()
def _normalizer(surprise: Surprise, theta_BHC: Tensor, chunk_size: int) -> Tensor:
    """r_t = 1 / max(1, factor * sum_{s<=t} theta_s |<g_t, g_s>| / (|e_t| |e_s|)): the step against the chunk's curvature so far.

    A constant to the outer gradient: it is a ratio of norms, whose derivative explodes as the error goes to zero.
    """
    error_BHC = surprise.error_BHTD.norm(dim=-1) + _tiny(theta_BHC) ** 0.5
    curvature_BHCC = surprise.gram().abs() / (error_BHC.unsqueeze(-1) * error_BHC.unsqueeze(-2))
    load_BHC = (curvature_BHCC.tril() @ theta_BHC.unsqueeze(-1)).squeeze(-1)
    return 1 / (curvature_factor(chunk_size) * load_BHC).clamp(min=1.0)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny

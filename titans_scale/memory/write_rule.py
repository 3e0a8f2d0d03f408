"""How a chunk's surprise becomes steps that cannot blow up.

All gradients of a chunk are taken at its start, so equal keys add up, and momentum multiplies what they add up to: the plain
rule diverges as soon as the step is large for the curvature (docs/memory.md, 'Stability'). The factors here are causal: that of
token t depends on the chunk's tokens up to t alone.

Shape letters: B batch, H memory heads, C tokens of a chunk.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from titans_scale.memory.mlp import Surprise

WriteRule = Literal["plain", "normalized"]


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
    return theta if rule == "plain" else theta * (1 - eta)


def scale_surprise(raw: Surprise, theta_BHC: Tensor, *, rule: WriteRule, chunk_size: int, max_norm: float | None) -> Surprise:
    """Surprise after the optional clip of each token's gradient norm and the rule's factor.

    Args:
        theta_BHC: the gate itself, before `effective_step`.
        chunk_size: of the rule; C may be smaller in a chunk that is still open.
        max_norm: clip of each token's gradient norm; None: no clip.
    """
    scaled = raw
    if max_norm is not None:
        norm_BHC = torch.sqrt(raw.squared_norm() + torch.finfo(theta_BHC.dtype).tiny)
        scaled = raw.scaled((max_norm / norm_BHC).clamp(max=1.0))
    if rule == "normalized":
        scaled = scaled.scaled(_normalizer(scaled, theta_BHC, chunk_size))
    return scaled


@torch.no_grad()
def _normalizer(surprise: Surprise, theta_BHC: Tensor, chunk_size: int) -> Tensor:
    """r_t = 1 / max(1, factor * sum_{s<=t} theta_s |<g_t, g_s>| / (|e_t| |e_s|)): the step against the chunk's curvature so far.

    A constant to the outer gradient: it is a ratio of norms, whose derivative explodes as the error goes to zero.
    """
    error_BHC = surprise.error_BHTD.norm(dim=-1) + torch.finfo(theta_BHC.dtype).tiny ** 0.5
    curvature_BHCC = surprise.gram().abs() / (error_BHC.unsqueeze(-1) * error_BHC.unsqueeze(-2))
    load_BHC = (curvature_BHCC.tril() @ theta_BHC.unsqueeze(-1)).squeeze(-1)
    return 1 / (curvature_factor(chunk_size) * load_BHC).clamp(min=1.0)

"""The `online` write rule over a chunk: every token's surprise at the weights one token earlier, a whole chunk at a time.

A token's weights hang on the surprises of the chunk's tokens before it: a triangular system of equations, not a linear one. It is solved
by passes over the chunk. After p of them the first p tokens are exact, and mostly a few do for all. What makes a pass go far: the last
layer's equations are linear in its deltas and are solved at once (one pass is exact for a linear memory), and each layer uses what this
pass has found already, so that only the deltas of the layers before the last come from the pass before.

Shape letters: M memories (batch times heads), C tokens of a chunk, D head dimension, I/O a layer's input and output width. A state is
weights on top of momentum, (M, 2O, I).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from titans_scale.memory.chunk import side_by_side, through_state
from titans_scale.memory.coefficients import ChunkCoefficients
from titans_scale.memory.mlp import (
    Activated,
    Activation,
    ResidualNorm,
    Surprise,
    activate_with_slope,
    error_and_delta,
    error_and_delta_vjp,
    squared_length,
)
from titans_scale.memory.ranks import sum_over, sum_together
from titans_scale.memory.write_rule import Scaling, clip_factor, scale_vjp


class OnlineChunk(NamedTuple):
    """What stays the same from pass to pass."""

    k: Tensor
    v: Tensor
    states: list[Tensor]
    earlier: ChunkCoefficients
    """One token earlier: what a token sees before its own write."""
    limit_C: Tensor | None
    """curvature_margin theta / (1 - eta), from `step_limit`; None: no local factor."""
    max_norm: float | None
    activation: Activation
    norm: ResidualNorm | None
    group: str
    """Over which the hidden width is split, see `Rule`."""

    @property
    def bounded(self) -> bool:
        """Whether anything holds a token's write down."""
        return self.limit_C is not None or self.max_norm is not None

    def from_state(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's output as far as it comes from the state at the chunk's start, and its products with weights and momentum."""
        return through_state(x, self.states[layer], self.earlier)

    def as_pair(self, delta: Tensor) -> Tensor:
        """A delta as it meets weights and momentum, (M, C, 2O)."""
        return side_by_side(delta, torch.stack((self.earlier.start_C, self.earlier.carry_C), dim=-1))


class Writes(NamedTuple):
    """The chunk's writes as one layer of a pass sees them."""

    scale: Tensor | None
    """Of every token: the pass before's, held to what this pass has found; or a guess."""
    write_CC: Tensor
    """The coefficients of the state one token earlier, with that scale."""


class Pass(NamedTuple):
    """What a pass finds, with what its gradients need."""

    surprise: Surprise
    """Not scaled."""
    scaling: Scaling
    """How much of each token's surprise is written, after the clip and the local factor."""
    forward: list[Writes]
    """Of every layer on the way to the output; in the first pass of the last layer alone."""
    backward: list[Writes]
    """Of every layer but the first on the way of the deltas."""
    feature_squares: list[Tensor]
    """|feature_t|^2, every layer, over the whole width where it is split; likewise the deltas'."""
    delta_squares: list[Tensor]
    hidden: list[Activated]
    both: list[Tensor]
    """Every layer's products with weights and momentum."""
    grams: list[Tensor]
    """<feature_t, feature_s>, every layer; in the first pass the last layer alone."""
    delta_grams: list[Tensor]
    """<delta_t, delta_s>, every layer but the first."""
    unsloped: list[Tensor]
    start: tuple[Tensor, Tensor, Tensor] | None
    """With a norm, in the first pass: z, error and delta of the last layer before its own writes."""
    z: Tensor


class OnlineGrads(NamedTuple):
    """What `online_surprise_vjp` adds to."""

    k: Tensor
    v: Tensor
    states: list[Tensor]
    earlier: ChunkCoefficients
    norm: ResidualNorm | None


@torch.no_grad()
def step_limit(theta: Tensor, eta: Tensor, margin: float | None) -> Tensor | None:
    """margin theta / (1 - eta): what a write comes to with all that momentum makes of it. At eta = 1, 1 - eta counts as epsilon."""
    return None if margin is None else margin * theta / (1 - eta).clamp(min=torch.finfo(eta.dtype).eps)


def online_surprise(chunk: OnlineChunk, passes: int) -> list[Pass]:
    """All passes; the last has the surprise to write and to read with, once scaled.

    The local factor is r_t = 1 / max(1, limit_t |g_t|^2 / |e_t|^2), g the gradient before the clip and e the error. It is a constant
    to the outer gradient: a ratio of norms, whose derivative explodes as the error goes to zero.
    """
    made: list[Pass] = []
    for _ in range(passes):
        made.append(_one_pass(chunk, made[-1] if made else None))
    return made


def online_surprise_vjp(
    grad_features: list[Tensor], grad_deltas: list[Tensor], chunk: OnlineChunk, passes: list[Pass], grads: OnlineGrads
) -> None:
    """Adds to `grads`, from gradients in the last pass's features and deltas, not scaled; both are overwritten."""
    for made, before in zip(reversed(passes), [*reversed(passes[:-1]), None], strict=True):
        grad_deltas, grad_scale = _one_pass_vjp(grad_features, grad_deltas, chunk, made, before, grads)
        if before is not None:
            grad_features = [torch.zeros_like(x) for x in before.surprise.features]
            scale_vjp(grad_scale, grad_features, grad_deltas, before.surprise, before.scaling)


def _one_pass(chunk: OnlineChunk, before: Pass | None) -> Pass:
    """One pass. The first goes without the chunk's own writes in all layers but the last: there is no guess of their deltas yet."""
    scale = before.scaling.factor if before else None
    last = len(chunk.states) - 1
    features, hidden, both = [chunk.k], [], []
    feature_squares = [squared_length(chunk.k)]
    grams: list[Tensor] = []
    forward: list[Writes] = []
    for layer in range(last + 1):
        z, products = chunk.from_state(features[layer], layer)
        both.append(products)
        if before or layer == last:
            grams.append(torch.bmm(features[layer], features[layer].mT))
        if layer < last:
            if before:
                size = feature_squares[layer] * before.delta_squares[layer]
                held = _held(scale, chunk, size, before.surprise.error_BHTD, before.feature_squares[last])
                forward.append(_writes(chunk, held))
                z.baddbmm_(grams[layer] * forward[layer].write_CC, before.surprise.deltas[layer], alpha=-1)
            hidden.append(activate_with_slope(z, chunk.activation))
            features.append(hidden[-1].value)
            feature_squares.append(squared_length(features[-1]))
    gains = [] if before else _gains(chunk, hidden)
    z, grams[-1], feature_squares[last], *gains = sum_together(chunk.group, z, grams[-1], feature_squares[last], *gains)
    if before is None:
        scale = _first_scale(chunk, feature_squares, gains, z)
    else:
        unknown = torch.zeros_like(z[..., 0])
        scale = _held(scale, chunk, unknown, z, feature_squares[last])
    forward.append(_writes(chunk, scale))
    seen_CC = grams[-1] * forward[-1].write_CC
    start = None
    if chunk.norm is None:
        error = delta = _solve(seen_CC, 2 * (z - chunk.v))
    else:
        start = (z, *error_and_delta(chunk.k, chunk.v, z, chunk.norm)) if before is None else None
        delta_before = start[2] if start else before.surprise.deltas[last]  # type: ignore[union-attr]
        z = torch.baddbmm(z, seen_CC, delta_before, alpha=-1)
        error, delta = error_and_delta(chunk.k, chunk.v, z, chunk.norm)
    deltas = [delta]
    unsloped: list[Tensor] = []
    delta_grams: list[Tensor] = []
    backward: list[Writes] = []
    delta_squares = [squared_length(delta)]
    size = feature_squares[last] * delta_squares[0]
    for layer in range(last, 0, -1):
        scale = _held(scale, chunk, size, error, feature_squares[last])
        backward.insert(0, _writes(chunk, scale))
        grad = torch.bmm(chunk.as_pair(deltas[0]), chunk.states[layer])
        delta_grams.insert(0, torch.bmm(deltas[0], deltas[0].mT))
        unsloped.insert(0, grad.baddbmm_(delta_grams[0] * backward[0].write_CC, features[layer], alpha=-1))
        deltas.insert(0, unsloped[0] * hidden[layer - 1].slope)
        delta_squares.insert(0, sum_over(squared_length(deltas[0]), chunk.group))
        size = size + feature_squares[layer - 1] * delta_squares[0]
    scaling = _scaling(chunk, size, error, feature_squares[last])
    made = Surprise(features, deltas, error, chunk.group)
    squares = (feature_squares, delta_squares)
    return Pass(made, scaling, forward, backward, *squares, hidden, both, grams, delta_grams, unsloped, start, z)


def _one_pass_vjp(
    grad_features: list[Tensor], grad_deltas: list[Tensor], chunk: OnlineChunk, made: Pass, before: Pass | None, grads: OnlineGrads
) -> tuple[list[Tensor], Tensor]:
    """Adds to `grads`; returns the gradients in the deltas and in the scale of the pass before."""
    last = len(chunk.states) - 1
    features, deltas, error, group = made.surprise
    grad_before = [torch.zeros_like(delta) for delta in deltas] if before else []
    guess = before.scaling.factor if before else None
    grad_scale = torch.zeros_like(error[..., 0])
    grad_slopes = []

    def seen_vjp(grad_seen: Tensor, gram: Tensor, writes: Writes) -> Tensor:
        """Of seen = gram * write: the gradient in the gram and that in its transpose, added up. `grad_seen` is overwritten."""
        grad_write = grad_seen * gram
        grads.earlier.write_CC.add_(_columns(grad_write, writes.scale))
        if guess is not None and writes.scale is not None:  # where a scale is held, it is a constant
            grad_scale.add_(torch.where(writes.scale == guess, (grad_write * chunk.earlier.write_CC).sum(-2), 0.0))
        grad_gram = grad_seen.mul_(writes.write_CC)
        return grad_gram + grad_gram.mT

    for layer in range(1, last + 1):  # the chain of deltas ran from the last layer down
        grad_slopes.append(grad_deltas[layer - 1] * made.unsloped[layer - 1])
        grad = grad_deltas[layer - 1].mul_(made.hidden[layer - 1].slope)
        _from_pair_vjp(grad, deltas[layer], layer, chunk, grads, grad_deltas[layer])
        gram, writes = made.delta_grams[layer - 1], made.backward[layer - 1]
        grad_features[layer].baddbmm_((gram * writes.write_CC).mT, grad, alpha=-1)
        grad_deltas[layer].baddbmm_(seen_vjp(torch.bmm(grad, features[layer].mT).neg_(), gram, writes), deltas[layer])

    seen_CC = made.grams[-1] * made.forward[-1].write_CC
    if chunk.norm is None or grads.norm is None:
        grad_right = _solve_transposed(seen_CC, grad_deltas[last])
        grads.v.sub_(grad_right, alpha=2)
        grad_z = 2 * grad_right
        grad_seen = torch.bmm(grad_right, error.mT).mul_(-2)
    else:
        grad_z = error_and_delta_vjp(grad_deltas[last], error, made.z, chunk.norm, grads.norm, grads.k, grads.v)
        delta_before = made.start[2] if made.start else before.surprise.deltas[last]  # type: ignore[union-attr]
        grad_seen = torch.bmm(grad_z, delta_before.mT).neg_()
        grad_delta_before = torch.bmm(seen_CC.mT, grad_z).neg_()
        if made.start:
            z, start_error, _ = made.start
            grad_z = grad_z + error_and_delta_vjp(grad_delta_before, start_error, z, chunk.norm, grads.norm, grads.k, grads.v)
        else:
            grad_before[last] = grad_delta_before
    grad_z, grad_gram = sum_together(group, grad_z, seen_vjp(grad_seen, made.grams[-1], made.forward[-1]))
    grad_features[last].baddbmm_(grad_gram, features[last])
    for layer in range(last, -1, -1):
        _from_state_vjp(grad_z, features[layer], made.both[layer], layer, chunk, grads, grad_features[layer])
        if layer == 0:
            break
        activated = made.hidden[layer - 1]
        grad_z = torch.addcmul(grad_features[layer].mul_(activated.slope), grad_slopes[layer - 1], activated.curvature())
        if before:
            gram, writes = made.grams[layer - 1], made.forward[layer - 1]
            grad_before[layer - 1] = torch.bmm((gram * writes.write_CC).mT, grad_z).neg_()
            grad_seen = torch.bmm(grad_z, before.surprise.deltas[layer - 1].mT).neg_()
            grad_features[layer - 1].baddbmm_(seen_vjp(grad_seen, gram, writes), features[layer - 1])
    grads.k.add_(grad_features[0])
    return grad_before, grad_scale


def _from_state_vjp(grad_z: Tensor, x: Tensor, both: Tensor, layer: int, chunk: OnlineChunk, grads: OnlineGrads, grad_x: Tensor) -> None:
    weights, momentum = both.chunk(2, dim=-1)
    grads.earlier.start_C.add_((grad_z * weights).sum(-1))
    grads.earlier.carry_C.add_((grad_z * momentum).sum(-1))
    pair = chunk.as_pair(grad_z)
    grad_x.baddbmm_(pair, chunk.states[layer])
    grads.states[layer].baddbmm_(pair.mT, x)


def _from_pair_vjp(grad: Tensor, delta: Tensor, layer: int, chunk: OnlineChunk, grads: OnlineGrads, grad_delta: Tensor) -> None:
    weights, momentum = torch.bmm(grad, chunk.states[layer].mT).chunk(2, dim=-1)
    grad_delta.addcmul_(weights, chunk.earlier.start_C.unsqueeze(-1)).addcmul_(momentum, chunk.earlier.carry_C.unsqueeze(-1))
    grads.earlier.start_C.add_((weights * delta).sum(-1))
    grads.earlier.carry_C.add_((momentum * delta).sum(-1))
    grads.states[layer].baddbmm_(chunk.as_pair(delta).mT, grad)


def _writes(chunk: OnlineChunk, scale: Tensor | None) -> Writes:
    return Writes(scale, _columns(chunk.earlier.write_CC, scale))


def _columns(matrix_CC: Tensor, scale_C: Tensor | None) -> Tensor:
    return matrix_CC if scale_C is None else matrix_CC * scale_C.unsqueeze(-2)


def _solve(seen_CC: Tensor, right: Tensor) -> Tensor:
    """x with x + 2 seen x = right, seen strictly lower triangular. The solver takes the diagonal as ones, whatever is there."""
    return torch.linalg.solve_triangular(2 * seen_CC, right, upper=False, unitriangular=True)


def _solve_transposed(seen_CC: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular((2 * seen_CC).mT, right, upper=True, unitriangular=True)


def _scaling(chunk: OnlineChunk, size: Tensor, error: Tensor, feature_square: Tensor) -> Scaling:
    """The clip, times the local factor. size is |g|^2, feature_square the last layer's |feature|^2."""
    clip = None if chunk.max_norm is None else clip_factor(size, chunk.max_norm)
    if chunk.limit_C is None:
        return Scaling(clip, clip)
    curvature = size / (squared_length(error) + torch.finfo(error.dtype).tiny)
    if chunk.norm is None:  # |g|^2 / |e|^2 >= |feature|^2, also where the squares of tiny errors are rounded to zero
        curvature = torch.maximum(curvature, feature_square)
    local = 1 / (chunk.limit_C * curvature).clamp(min=1.0)
    return Scaling(local if clip is None else local * clip, clip)


@torch.no_grad()
def _held(scale: Tensor | None, chunk: OnlineChunk, size: Tensor, error: Tensor, feature_square: Tensor) -> Tensor | None:
    """A scale that the writes got before their features and deltas were known, brought down to what those bear.

    Where they have grown meanwhile, each layer would make them grow further, to infinity in a few, and the solve from token to token.
    size is |g|^2 as far as it is known, never more than the whole: once the passes have converged nothing is held. A constant to the
    outer gradient.
    """
    bound = _scaling(chunk, size, error, feature_square).factor
    return scale if scale is None or bound is None else torch.minimum(scale, bound)


def _gains(chunk: OnlineChunk, hidden: list[Activated]) -> list[Tensor]:
    """By how much the squared length of a delta grows to that of the layer before, every hidden layer: its guess in the first pass.

    As for errors of no particular direction: a mean over the weights' columns in place of a product with them.
    """
    if not chunk.bounded:
        return []
    weights = [state.chunk(2, dim=-2)[0] for state in chunk.states[1:]]
    return [(x.slope.square() * w.square().mean(-2, keepdim=True)).sum(-1) for x, w in zip(hidden, weights, strict=True)]


def _first_scale(chunk: OnlineChunk, feature_squares: list[Tensor], gains: list[Tensor], z_last: Tensor) -> Tensor | None:
    """The first pass has no deltas yet: a guess from the errors before the chunk's own writes, a constant to the outer gradient.

    For a linear memory the local factor is exact: its curvature is |k|^2.
    """
    if not chunk.bounded:
        return None
    error, delta = error_and_delta(chunk.k, chunk.v, z_last, chunk.norm)
    delta_square = squared_length(delta)
    squared_norm = feature_squares[-1] * delta_square
    for feature_square, gain in zip(reversed(feature_squares[:-1]), reversed(gains), strict=True):
        delta_square = delta_square * gain
        squared_norm = squared_norm + feature_square * delta_square
    return _scaling(chunk, squared_norm, error, feature_squares[-1]).factor

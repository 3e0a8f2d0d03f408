"""The scan of whole chunks, a group of them at a time, and its gradients by hand.

The forward pass keeps the state before every group of chunks and, of the reads, the layers' outputs; the backward pass runs a group's
writes again from its state, then goes through its chunks in reverse.

Shape letters: B batch, H memory heads, T tokens, G chunks of a group, M memories (B * H), C tokens of a chunk, D head dimension, I/O a
layer's input and output width. A state is weights on top of momentum, (B, H, 2O, I).
"""

from collections.abc import Sequence
from itertools import pairwise, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from titans_scale.memory.chunk import advance, advance_vjp, read, read_vjp
from titans_scale.memory.coefficients import (
    ChunkCoefficients,
    CoefficientsTape,
    chunk_coefficients,
    coefficients_vjp,
    one_token_earlier,
    one_token_earlier_vjp,
)
from titans_scale.memory.mlp import Activation, ResidualNorm, Surprise, SurpriseTape, surprise, surprise_vjp
from titans_scale.memory.online import OnlineChunk, OnlineGrads, Pass, online_surprise, online_surprise_vjp, step_limit
from titans_scale.memory.write_rule import (
    Scaling,
    WriteRule,
    effective_step,
    effective_step_vjp,
    scale_surprise,
    scale_surprise_vjp,
)

READ_AT_ONCE = 4
"""Chunks whose reads are one batch: more would fall out of a CPU's cache, fewer leave a GPU waiting."""


class Rule(NamedTuple):
    """Options of the scan that are not tensors. The chunk size is the rule's; an open chunk is shorter."""

    chunk_size: int
    activation: Activation
    write_rule: WriteRule
    max_norm: float | None
    passes: int
    margin: float | None
    group: str = ""
    """Process group over which the hidden width is split; "": it is whole."""


class Tokens(NamedTuple):
    """What the rule needs of each token: (B, H, T, D) and (B, H, T); of a group by chunk (G, M, C, D) and (G, M, C)."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    eta: Tensor
    alpha: Tensor


class _Write(NamedTuple):
    """A chunk's write, with what its gradients need."""

    raw: Surprise
    tape: SurpriseTape | tuple[OnlineChunk, list[Pass]]
    scaling: Scaling


class _Resets(NamedTuple):
    """Which memories begin anew before a chunk, and from what."""

    initial: list[Tensor]
    """(M, 2O, I) a layer."""
    chosen: Tensor
    """Bool, (chunks, M, 1, 1)."""

    def of(self, first: int, last: int) -> "_Resets":
        return self._replace(chosen=self.chosen[first:last])

    def apply(self, chunk: int, states: list[Tensor]) -> None:
        """In place, to the states before a chunk."""
        for state, initial in zip(states, self.initial, strict=True):
            state.copy_(torch.where(self.chosen[chunk], initial, state))

    def apply_vjp(self, chunk: int, grad_states: list[Tensor], grad_initial: list[Tensor]) -> None:
        """What arrived at the states of memories that began anew belongs to the initial state."""
        for grad, to_initial in zip(grad_states, grad_initial, strict=True):
            to_initial.add_(grad.masked_fill(~self.chosen[chunk], 0))
            grad.masked_fill_(self.chosen[chunk], 0)


class _Group(NamedTuple):
    """Chunks whose writes have been run."""

    tokens: Tokens
    chunks: ChunkCoefficients
    tape: CoefficientsTape
    states: list[Tensor]
    """Before each chunk and after the last, (G + 1, M, 2O, I) a layer."""
    written: list[Surprise]
    """Of each chunk, scaled."""
    writes: list[_Write]
    """Of each chunk; in the forward pass none."""
    resets: _Resets | None

    def slices(self) -> list[tuple[int, int]]:
        """Chunks that are read at once: reads need no order."""
        total = len(self.written)
        return [(first, min(first + READ_AT_ONCE, total)) for first in range(0, total, READ_AT_ONCE)]

    def reads(self, first: int, last: int) -> "_Reads":
        """What the reads of chunks first..last need, all in one leading dimension."""
        written = [surprise[:2] for surprise in self.written[first:last]]
        features, deltas = ([torch.cat(xs) for xs in zip(*lists, strict=True)] for lists in zip(*written, strict=True))
        states = [x[first:last].flatten(0, 1) for x in self.states]
        return _Reads(self.tokens.q[first:last].flatten(0, 1), states, features, deltas, _flat(self.chunks, first, last))


class _Reads(NamedTuple):
    """See `_Group.reads`."""

    q: Tensor
    states: list[Tensor]
    features: list[Tensor]
    deltas: list[Tensor]
    chunks: ChunkCoefficients


def scan_chunks(
    tokens: Sequence[Tensor],
    states: list[Tensor],
    norm: ResidualNorm | None,
    rule: Rule,
    length: int,
    interval: int,
    keep: bool,
    resets_BN: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Scan T tokens in chunks of `length`, which divides T.

    Args:
        tokens: q, k, v (B, H, T, D), theta, eta, alpha (B, H, T).   states: before the first token.   keep: for a backward pass.
        resets_BN: chunks of a row that begin from `states` again, whatever came before them; None: no chunk does.
    Returns:
        y (B, H, T, D), the states after the last token, and what `scan_chunks_vjp` needs: the state of every layer before each
        group of `interval` chunks, (groups, M, 2O, I), and the layers' outputs while reading, (T / length, M, C, O).
    """
    q = tokens[0]
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    now = [state.flatten(0, 1) for state in states]
    kept = empty_kept(q, states, norm, length, interval) if keep else []
    before, outputs = kept[: len(states)], kept[len(states) :]
    norm, resets = _for_each_memory(norm, q), _resets(resets_BN, now, q)
    for number, (begin, end) in enumerate(_groups(q.shape[2], length, interval)):
        for whole, state in zip(before, now, strict=False):
            whole[number] = state
        of_tokens = Tokens(*(_loaded(x, begin, end, length) for x in tokens))
        group = _write_group(of_tokens, now, norm, rule, resets and resets.of(begin // length, end // length), differentiable=False)
        y_group = _by_chunk(y, begin, end, length)
        for first, last in group.slices():
            of_reads, layers = read(*group.reads(first, last), rule.activation, _repeated(norm, last - first), rule.group)
            y_group[first:last] = of_reads.unflatten(0, (last - first, *q.shape[:2]))
            for whole, layer in zip(outputs, layers, strict=False):
                whole[begin // length + first : begin // length + last] = layer.unflatten(0, (last - first, -1))
        now = [state[-1].clone() for state in group.states]
        del group, of_tokens, of_reads, layers  # before the next one is made
    return y, [state.unflatten(0, q.shape[:2]) for state in now], kept


def empty_kept(q: Tensor, states: list[Tensor], norm: ResidualNorm | None, length: int, interval: int) -> list[Tensor]:
    """Room for what the backward pass needs of the forward pass."""
    batch_size, heads, total, _ = q.shape
    chunks = total // length
    before = [state.new_empty(-(-chunks // interval), batch_size * heads, *state.shape[2:]) for state in states]
    widths = [state.shape[2] // 2 for state in states[: None if norm else -1]]
    return before + [q.new_empty(chunks, batch_size * heads, length, width) for width in widths]


def scan_chunks_vjp(
    grad_y: Tensor,
    grad_after: list[Tensor],
    tokens: Sequence[Tensor],
    kept: list[Tensor],
    norm: ResidualNorm | None,
    rule: Rule,
    length: int,
    interval: int,
    resets_BN: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of `scan_chunks` in the tokens, in the states before the first, and in the norm's scale and shift if there is one."""
    q = tokens[0]
    before, outputs = kept[: len(grad_after)], kept[len(grad_after) :]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tokens]
    grad_now = [grad.flatten(0, 1) for grad in grad_after]
    wide_norm = _for_each_memory(norm, q)
    resets = _resets(resets_BN, [state[0] for state in before], q)
    grad_initial = [torch.zeros_like(grad) for grad in grad_now] if resets else []
    grad_norm = wide_norm and ResidualNorm(*(torch.zeros_like(x) for x in wide_norm))
    for number, (begin, end) in reversed(list(enumerate(_groups(q.shape[2], length, interval)))):
        group = _write_group(
            Tokens(*(_loaded(x, begin, end, length) for x in tokens)),
            [state[number] for state in before],
            wide_norm,
            rule,
            resets and resets.of(begin // length, end // length),
            differentiable=True,
        )
        of_group = [x[begin // length : end // length] for x in outputs]
        of_y = _loaded(grad_y, begin, end, length)
        grad_tokens, grad_now = _group_vjp(of_y, grad_now, group, of_group, wide_norm, rule, grad_norm, grad_initial)
        grad_now = [grad.clone() for grad in grad_now]  # not as views of a larger tensor
        for whole, grad in zip(grads, grad_tokens, strict=True):
            _by_chunk(whole, begin, end, length).copy_(grad.unflatten(1, q.shape[:2]))
        del group, grad_tokens, of_y  # before the next one is made
    if resets:
        grad_now = [grad + to_initial for grad, to_initial in zip(grad_now, grad_initial, strict=True)]
    grad_states = [grad.unflatten(0, q.shape[:2]) for grad in grad_now]
    return grads, grad_states, [x.unflatten(0, q.shape[:2]).sum(0) for x in grad_norm or ()]


def _write_group(
    tokens: Tokens, states: list[Tensor], norm: ResidualNorm | None, rule: Rule, resets: _Resets | None, *, differentiable: bool
) -> _Group:
    """Run the writes: one step a chunk, the only sequential part. Keeps what their gradients need if `differentiable`."""
    step = effective_step(tokens.theta, tokens.eta, rule.write_rule)
    chunks, of_coefficients = chunk_coefficients(step, tokens.eta, tokens.alpha)
    along = [state.new_empty(len(tokens.k) + 1, *state.shape) for state in states]
    for whole, state in zip(along, states, strict=True):
        whole[0] = state
    earlier = _one_by_one(one_token_earlier(chunks)) if rule.write_rule == "online" else repeat(None)
    limits = step_limit(tokens.theta, tokens.eta, rule.margin) if rule.write_rule == "online" else None
    steps = zip(
        tokens.k.unbind(),
        tokens.v.unbind(),
        tokens.theta.unbind(),
        _one_by_one(chunks),
        earlier,
        repeat(None) if limits is None else limits.unbind(),
        pairwise(_layers(along)),
        strict=False,
    )
    written, writes = [], []
    tape: SurpriseTape | tuple[OnlineChunk, list[Pass]]
    for number, (k, v, theta, chunk, chunk_earlier, limit, (now, after)) in enumerate(steps):
        if resets:
            resets.apply(number, now)
        if chunk_earlier is None:
            raw, tape = surprise(k, v, _weights(now), rule.activation, norm, rule.group)
            scaled, scaling = scale_surprise(raw, theta, rule=rule.write_rule, chunk_size=rule.chunk_size, max_norm=rule.max_norm)
        else:
            online = OnlineChunk(k, v, now, chunk_earlier, limit, rule.max_norm, rule.activation, norm, rule.group)
            passes = online_surprise(online, rule.passes)
            raw, scaling = passes[-1].surprise, passes[-1].scaling
            scaled = raw if scaling.factor is None else raw.scaled(scaling.factor)
            tape = online, passes
        written.append(scaled)
        advance(now, scaled, chunk, after)
        if differentiable:
            writes.append(_Write(raw, tape, scaling))
    return _Group(tokens, chunks, of_coefficients, along, written, writes, resets)


def _group_vjp(
    grad_y: Tensor,
    grad_after: list[Tensor],
    group: _Group,
    outputs: list[Tensor],
    norm: ResidualNorm | None,
    rule: Rule,
    grad_norm: ResidualNorm | None,
    grad_initial: list[Tensor],
) -> tuple[Tokens, list[Tensor]]:
    """Gradients in the group's tokens and in the state before it."""
    tokens, chunks = group.tokens, _one_by_one(group.chunks)
    grad_coefficients = ChunkCoefficients(*(torch.zeros_like(x) for x in group.chunks))
    grad_chunks, grad_earlier = _one_by_one(grad_coefficients), []
    if rule.write_rule == "online":
        grad_of_earlier = ChunkCoefficients(*(torch.zeros_like(x) for x in group.chunks))
        grad_earlier = _one_by_one(grad_of_earlier)
    before = _layers(group.states)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in tokens[:3])
    for first, last in reversed(group.slices()):
        reads = group.reads(first, last)
        of_reads, *of_writes = read_vjp(
            grad_y[first:last].flatten(0, 1),
            reads.q,
            [x[first:last].flatten(0, 1) for x in outputs],
            *reads[1:],
            rule.activation,
            _repeated(norm, last - first),
            rule.group,
            _flat(grad_coefficients, first, last),
            grad_norm,
        )
        grad_q[first:last] = of_reads.unflatten(0, (last - first, -1))
        by_chunk = [_layers([x.unflatten(0, (last - first, -1)) for x in layers]) for layers in of_writes]
        for i in range(last - 1, first - 1, -1):
            grad_states, grad_features, grad_deltas = (x[i - first] for x in by_chunk)
            states, write = before[i], group.writes[i]
            advance_vjp(grad_after, states, group.written[i], chunks[i], grad_states, grad_features, grad_deltas, grad_chunks[i])
            scale_surprise_vjp(grad_features, grad_deltas, write.raw, write.scaling)
            if isinstance(write.tape, SurpriseTape):
                of_states = _weights(grad_states)
                surprise_vjp(
                    grad_features, grad_deltas, write.raw, write.tape, _weights(states), norm, of_states, grad_norm, grad_k[i], grad_v[i]
                )
            else:
                grads = OnlineGrads(grad_k[i], grad_v[i], grad_states, grad_earlier[i], grad_norm)
                online_surprise_vjp(grad_features, grad_deltas, *write.tape, grads)
            if group.resets:
                group.resets.apply_vjp(i, grad_states, grad_initial)
            grad_after = grad_states
    if rule.write_rule == "online":
        one_token_earlier_vjp(grad_of_earlier, grad_coefficients)
    grad_step, grad_eta, grad_alpha = coefficients_vjp(grad_coefficients, group.chunks, group.tape)
    grad_theta, of_step = effective_step_vjp(grad_step, tokens.theta, tokens.eta, rule.write_rule)
    return Tokens(grad_q, grad_k, grad_v, grad_theta, grad_eta + of_step, grad_alpha), grad_after


def _groups(total: int, length: int, interval: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + interval * length, total)) for begin in range(0, total, interval * length)]


def _by_chunk(x: Tensor, begin: int, end: int, length: int) -> Tensor:
    """A view of (B, H, T, ...) as (G, B, H, C, ...)."""
    return x[:, :, begin:end].unflatten(2, (-1, length)).movedim(2, 0)


def _loaded(x: Tensor, begin: int, end: int, length: int) -> Tensor:
    """A copy as (G, M, C, ...)."""
    return _by_chunk(x, begin, end, length).flatten(1, 2).contiguous()


def _one_by_one(chunks: ChunkCoefficients) -> list[ChunkCoefficients]:
    return [ChunkCoefficients(*of_chunk) for of_chunk in zip(*(x.unbind() for x in chunks), strict=True)]


def _layers(xs: list[Tensor]) -> list[list[Tensor]]:
    """Of every chunk, its layers."""
    return [list(layers) for layers in zip(*(x.unbind() for x in xs), strict=True)]


def _flat(chunks: ChunkCoefficients, first: int, last: int) -> ChunkCoefficients:
    return ChunkCoefficients(*(x[first:last].flatten(0, 1) for x in chunks))


def _weights(states: list[Tensor]) -> list[Tensor]:
    return [state[:, : state.shape[1] // 2] for state in states]


def _for_each_memory(norm: ResidualNorm | None, q: Tensor) -> ResidualNorm | None:
    return norm and ResidualNorm(*(x.repeat(q.shape[0], 1) for x in norm))


def _resets(resets_BN: Tensor | None, initial: list[Tensor], q: Tensor) -> _Resets | None:
    return None if resets_BN is None else _Resets(initial, resets_BN.T.repeat_interleave(q.shape[1], dim=1)[..., None, None])


def _repeated(norm: ResidualNorm | None, times: int) -> ResidualNorm | None:
    return norm and ResidualNorm(*(x.repeat(times, 1) for x in norm))

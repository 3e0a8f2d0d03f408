"""The scan of whole chunks as one operator of torch, and its gradients as another.

Operators, not a graph of small ones: torch.compile, activation checkpointing and FSDP2 see one node, however many chunks there are. What
they compute is in groups.py; here are their schemas, the shapes of their results, how autograd ties them together, and their FLOPs.

Shape letters: see groups.py.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from titans_scale.memory.flops import chunk_flops
from titans_scale.memory.groups import Rule, empty_kept, scan_chunks, scan_chunks_vjp
from titans_scale.memory.mlp import Activation, ResidualNorm
from titans_scale.memory.write_rule import WriteRule


@torch.library.custom_op("titans_scale::memory_scan", mutates_args=())
def scan_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    states: list[Tensor],
    norm: list[Tensor],
    chunk_size: int,
    activation: str,
    write_rule: str,
    max_norm: float | None,
    passes: int,
    margin: float | None,
    group: str,
    length: int,
    interval: int,
    keep: bool,
    resets: Tensor | None,
) -> list[Tensor]:
    """`scan_chunks` as an operator; norm is empty or [scale, shift]. Returns y, the states, then what is kept if `keep`."""
    rule = Rule(chunk_size, cast(Activation, activation), cast(WriteRule, write_rule), max_norm, passes, margin, group)
    y, after, kept = scan_chunks((q, k, v, theta, eta, alpha), states, _residual_norm(norm), rule, length, interval, keep, resets)
    return [y, *after, *kept]


@scan_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, states: list[Tensor], norm: list[Tensor], *options: Any
) -> list[Tensor]:
    length, interval, keep = options[7:10]
    kept = empty_kept(q, states, _residual_norm(norm), length, interval) if keep else []
    return [_new(q), *(_new(state) for state in states), *kept]


@torch.library.custom_op("titans_scale::memory_scan_vjp", mutates_args=())
def scan_vjp_op(
    grad_y: Tensor,
    grad_after: list[Tensor],
    tokens: list[Tensor],
    kept: list[Tensor],
    norm: list[Tensor],
    chunk_size: int,
    activation: str,
    write_rule: str,
    max_norm: float | None,
    passes: int,
    margin: float | None,
    group: str,
    length: int,
    interval: int,
    resets: Tensor | None,
) -> list[Tensor]:
    """`scan_chunks_vjp` as an operator. Returns the gradients of tokens, states and norm, in this order."""
    rule = Rule(chunk_size, cast(Activation, activation), cast(WriteRule, write_rule), max_norm, passes, margin, group)
    of_tokens, of_states, of_norm = scan_chunks_vjp(grad_y, grad_after, tokens, kept, _residual_norm(norm), rule, length, interval, resets)
    return [*of_tokens, *of_states, *of_norm]


@scan_vjp_op.register_fake
def _(
    grad_y: Tensor, grad_after: list[Tensor], tokens: list[Tensor], kept: list[Tensor], norm: list[Tensor], *options: Any
) -> list[Tensor]:
    return [_new(x) for x in (*tokens, *grad_after, *norm)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tokens, states, norm, chunk_size, activation, write_rule, max_norm, passes, margin, group, length, interval, _, resets = inputs
    ctx.options = (chunk_size, activation, write_rule, max_norm, passes, margin, group, length, interval)
    ctx.layers, ctx.norms = len(states), len(norm)
    ctx.state_shapes = [state.shape for state in states]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(resets, *tokens, *norm, *output[1 + len(states) :])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    resets, *saved = ctx.saved_tensors
    tokens, norm, kept = saved[:6], saved[6 : 6 + ctx.norms], saved[6 + ctx.norms :]
    grad_y, *grad_after = grads[: 1 + ctx.layers]
    of_states = [
        tokens[0].new_zeros(shape) if grad is None else grad.contiguous() for grad, shape in zip(grad_after, ctx.state_shapes, strict=True)
    ]
    grad_y = torch.zeros_like(tokens[0]) if grad_y is None else grad_y
    made = scan_vjp_op(grad_y, of_states, list(tokens), list(kept), list(norm), *ctx.options, resets)
    return (*made[:6], made[6 : 6 + ctx.layers], made[6 + ctx.layers :], *(None,) * 11)


scan_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.titans_scale.memory_scan)
def _scan_flops(q: Any, k: Any, v: Any, theta: Any, eta: Any, alpha: Any, states: Any, norm: Any, *options: Any, **_: Any) -> int:
    write_rule, passes, length = options[2], options[4], options[7]
    return _memories_and_chunks(q, length) * chunk_flops(_widths(states), length, write_rule, passes).forward


@register_flop_formula(torch.ops.titans_scale.memory_scan_vjp)
def _scan_vjp_flops(grad_y: Any, grad_after: Any, tokens: Any, kept: Any, norm: Any, *options: Any, **_: Any) -> int:
    write_rule, passes, length = options[2], options[4], options[7]
    return _memories_and_chunks(tokens[0], length) * chunk_flops(_widths(grad_after), length, write_rule, passes).backward


def _memories_and_chunks(q_shape: Sequence[int], length: int) -> int:
    batch_size, heads, total, _ = q_shape
    return batch_size * heads * (total // length)


def _widths(state_shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(shape[3], shape[2] // 2) for shape in state_shapes]


def _residual_norm(norm: list[Tensor]) -> ResidualNorm | None:
    return ResidualNorm(*norm) if norm else None


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

"""Sliding-window attention beside the masked square of all pairs, forward and backward: what `tools/bench_attention.py` prints.

Shape letters: B batch, H heads, T tokens, D head dimension.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from titans_scale.evaluation.benchmarks.measure import MIB, Prepare, Step
from titans_scale.evaluation.benchmarks.report import Report, Target, this_machine
from titans_scale.evaluation.benchmarks.sweep import Point, sweep
from titans_scale.models.attention import KeyValue, window_attention
from titans_scale.models.layers import rotate

HEAD_DIM, NUM_PERSISTENT, THETA = 64, 4, 10000.0
OURS, MASKED = "portable", "masked T x T"
FLAT_FROM = 8192
"""Below, what a process takes for anything at all weighs on the bytes of a token."""


def benchmark_attention(*, tokens: Sequence[int], window: int, heads: int, repeats: int, threads: int = 1) -> Report:
    """Measure and compare at every length; the masked form is left out, with a note, where it is too slow or too large.

    Args:
        window: tokens that a token sees.   heads: of width 64; the square takes T x T numbers whatever their number.
        repeats: at most so many of each step.
    """
    torch.set_num_threads(threads)
    report = Report(
        title=f"Attention over a window of {window}: {heads} head(s) of {HEAD_DIM}, float32, batch 1, forward and backward;"
        f" ours with {NUM_PERSISTENT} persistent tokens, the masked form with none.",
        machine=this_machine(threads=threads),
    )
    cases: dict[str, Prepare] = {OURS: partial(windowed_step, heads, window), MASKED: partial(masked_step, heads, window)}
    for prepare in cases.values():
        prepare(window)()
    points = list(sweep(cases, tokens, repeats=repeats, threads=threads, notes=report.notes))
    report.tables["Attention alone"] = [row for point in points for row in _rows(point)]
    both = [point for point in points if MASKED in point.timings]
    if both:
        claim = f"CPU time of the masked form, by ours, at {both[-1].tokens:,} tokens"
        report.targets.append(Target(claim=claim, value=_seconds(both[-1], MASKED) / _seconds(both[-1], OURS), at_least=10))
    long = [point for point in points if point.tokens >= FLAT_FROM]
    if len(long) > 1:
        first, last = (point.extra_bytes[OURS] / point.tokens for point in (long[0], long[-1]))
        claim = f"our extra memory a token at {long[-1].tokens:,} tokens, by that at {long[0].tokens:,}"
        report.targets.append(Target(claim=claim, value=last / first, at_most=1.1))
    return report


def windowed_step(heads: int, window: int, tokens: int) -> Step:
    q, k, v, grad = _tensors(heads, tokens)
    prefix = KeyValue(*_tensors(heads, NUM_PERSISTENT)[1:3])

    def step() -> None:
        y = window_attention(q, KeyValue(k, v), prefix, window=window, theta=THETA, backend="sdpa")
        torch.autograd.grad(y, (q, k, v, *prefix), grad)

    return step


def masked_step(heads: int, window: int, tokens: int) -> Step:
    """torch's attention over all pairs, with a mask that is made once, as a model would for all its layers."""
    q, k, v, grad = _tensors(heads, tokens)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril_().triu_(1 - window)

    def step() -> None:
        rotated_q, rotated_k = (rotate(x, start=0, theta=THETA) for x in (q, k))
        torch.autograd.grad(F.scaled_dot_product_attention(rotated_q, rotated_k, v, attn_mask=seen), (q, k, v), grad)

    return step


def _tensors(heads: int, tokens: int) -> list[torch.Tensor]:
    """Queries, keys, values, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, tokens, HEAD_DIM, generator=generator, requires_grad=place < 3) for place in range(4)]


def _rows(point: Point) -> list[dict[str, object]]:
    return [
        {
            "form": name,
            "tokens": point.tokens,
            "CPU s, best": timing.best,
            "wall s, best": min(timing.wall),
            "CPU µs a token": 1e6 * timing.best / point.tokens,
            "CPU, times ours": timing.best / _seconds(point, OURS),
            "extra memory, MiB": point.extra_bytes[name] / MIB if name in point.extra_bytes else None,
            "extra KiB a token": point.extra_bytes[name] / point.tokens / 1024 if name in point.extra_bytes else None,
        }
        for name, timing in point.timings.items()
    ]


def _seconds(point: Point, name: str) -> float:
    return point.timings[name].best

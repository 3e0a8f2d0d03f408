"""A plan as text for a terminal."""

from collections.abc import Callable
from typing import Any

from titans_scale.parallel.planning.plan import Plan

GIB = 2**30


def table(plan: Plan) -> str:
    """All of it."""
    result = plan.estimate
    how = "formulas" if plan.rehearsal is None else f"rank {plan.rehearsal.rank} rehearsed"
    lines = ["parameters"]
    lines += _rows(result.parameters, "total", lambda n: f"{n / 1e6:,.1f} M")
    lines += ["", "FLOPs of a token, forward"]
    lines += _rows(result.forward_flops_per_token, "total", lambda n: f"{n / 1e9:,.3f} G")
    lines += ["", "FLOPs of a token, forward and backward"]
    lines += _rows(result.training_flops_per_token, "total", lambda n: f"{n / 1e9:,.3f} G")
    lines += [
        "",
        f"memory of one GPU of {result.world_size} ({result.sizes}), estimated: {how}, {result.accumulation_steps} micro-batches a step",
    ]
    lines += _rows(plan.gpu_bytes, "peak", lambda n: f"{n / GIB:,.2f} GiB")
    if plan.traffic is not None and plan.time is not None:
        lines += ["", "collectives of a step, one rank: calls, whole tensors, sent by a ring", *_collectives(plan)]
        lines += ["", "time of a step, predicted", *_time(plan)]
    lines += [
        "",
        f"the whole run on {result.world_size} x {result.peak_tflops:g} TFLOP/s at {result.mfu:.0%} MFU, communication left out",
        f"  {'steps':28}{result.steps:>16,}",
        f"  {'tokens':28}{result.tokens / 1e9:>14,.3f} G",
        f"  {'tokens per second':28}{result.tokens_per_second:>16,.0f}",
        f"  {'time':28}{_duration(result.hours):>16}",
        f"  {'GPU-hours':28}{result.hours * result.world_size:>16,.1f}",
    ]
    return "\n".join(lines)


def _collectives(plan: Plan) -> list[str]:
    assert plan.traffic is not None
    rows = [
        f"  {f'{x.kind}, {x.dimension} ({len(x.ranks)})':28}{x.calls:>12,.0f} x{x.bytes / 1e9:>12,.3f} GB{x.wire_bytes / 1e9:>12,.3f} GB"
        for x in plan.traffic
    ]
    return rows or ["  none"]


def _time(plan: Plan) -> list[str]:
    time, result = plan.time, plan.estimate
    assert time is not None
    parts = {
        f"computing, at {result.mfu:.0%} MFU": time.compute,
        "waiting for earlier tokens": time.bubble,
        "communication in the way": time.in_the_way,
        "communication beside it": time.beside,
        "step": time.step,
    }
    seconds = [f"  {name:28}{value * 1e3:>13,.1f} ms{value / time.step:>8.1%}" for name, value in parts.items() if value]
    tokens = result.tokens / result.steps / time.step
    return [*seconds, f"  {'tokens per second':28}{tokens:>16,.0f}", f"  {'whole run':28}{_duration(result.steps * time.step / 3600):>16}"]


def _rows(parts: dict[str, Any], total: str, written: Callable[[Any], str]) -> list[str]:
    whole = sum(parts.values())
    rows = [f"  {name:28}{written(value):>16}{value / whole:>8.1%}" for name, value in parts.items() if value]
    return [*rows, f"  {total:28}{written(whole):>16}"]


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"

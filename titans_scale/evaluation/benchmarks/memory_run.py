"""The memory layer beside titans-pytorch's, and the scan by itself: what `tools/bench_memory.py` prints."""

from collections.abc import Sequence

import torch

from titans_scale.evaluation.benchmarks import memory_cases as cases
from titans_scale.evaluation.benchmarks.measure import MIB, WARM_UP_TOKENS, Step, matmul_peak, profile_of, progress, time_in_turns
from titans_scale.evaluation.benchmarks.report import INSTALL_PEERS, Report, Target, doublings, peers_installed, this_machine
from titans_scale.evaluation.benchmarks.sweep import BUDGET_SECONDS, Point, sweep

TITLE = "Memory layer: width 384, 4 heads of 64, depth 2, expansion 2, chunk 64, float32, batch 1, forward and backward."
MANY_TOKENS = 4096
"""From here on, memory has a target."""


def benchmark_memory(*, tokens: Sequence[int], longest: int, peers: bool, repeats: int) -> Report:
    """Measure and compare; takes minutes at the default sizes.

    Args:
        tokens: lengths of the side-by-side comparison.   longest: the scan's time is taken at 1K, 2K, 4K, ... up to here.
        peers: measure titans-pytorch too, where it is installed.   repeats: at most so many of each step.
    """
    torch.set_num_threads(1)
    peak = matmul_peak()
    report = Report(title=TITLE, machine=this_machine(threads=1) | {"float32 matmul peak, GFLOP/s": peak / 1e9})
    if peers and not peers_installed():
        report.notes.append(INSTALL_PEERS)
    layers = cases.layers(peers=peers and peers_installed())
    for prepare in layers.values():
        prepare(min(*tokens, WARM_UP_TOKENS))()
    report.tables["Whole layer"] = []
    for point in sweep(layers, tokens, repeats=repeats, threads=1, notes=report.notes):
        _compare_layers(report, point, peak)
    report.tables["Scan alone, by write rule"] = []
    for length in sorted(tokens):
        _compare_rules(report, length, repeats, peak)
    _check_linearity(report, longest, repeats)
    return report


def profile_memory(tokens: int) -> Report:
    """The operators that take most of one pass through our layer, and through its scan alone."""
    torch.set_num_threads(1)
    report = Report(title=f"{TITLE} Where the time goes at {tokens:,} tokens.", machine=this_machine(threads=1))
    report.tables["layer"] = profile_of(cases.layer_step(cases.OURS, tokens))
    report.tables["scan alone"] = profile_of(cases.scan_step("plain", tokens))
    return report


def _compare_layers(report: Report, point: Point, peak: float) -> None:
    if cases.OURS not in point.timings:
        return  # there is nothing to compare with, and a note that says so
    seconds = {name: timing.best for name, timing in point.timings.items()}
    ours, our_bytes = seconds[cases.OURS], point.extra_bytes[cases.OURS]
    share = cases.layer_flops(point.tokens) / ours / peak
    report.notes.append(f"Our layer at {point.tokens:,} tokens: {share:.0%} of the matmul peak, projections and all, by the FLOPs formula.")
    for name in seconds | point.extra_bytes:
        timed, extra = name in seconds, point.extra_bytes.get(name)
        report.tables["Whole layer"].append(
            {
                "layer": name,
                "tokens": point.tokens,
                "CPU s, best": seconds[name] if timed else None,
                "CPU s, median": point.timings[name].median if timed else None,
                "CPU, times ours": seconds[name] / ours if timed else None,
                "extra memory, MiB": None if extra is None else extra / MIB,
                "memory, times ours": None if extra is None else extra / our_bytes,
            }
        )
    for name, factor in ((cases.PER_TOKEN, 50), (cases.PER_CHUNK, 3)):
        if name in seconds:
            claim = f"CPU time of {name}, by ours, at {point.tokens:,} tokens"
            report.targets.append(Target(claim=claim, value=seconds[name] / ours, at_least=factor))
        if name in point.extra_bytes and point.tokens >= MANY_TOKENS:
            claim = f"our extra memory, by that of {name}, at {point.tokens:,} tokens"
            report.targets.append(Target(claim=claim, value=our_bytes / point.extra_bytes[name], at_most=0.2))


def _compare_rules(report: Report, length: int, repeats: int, peak: float) -> None:
    progress(f"write rules at {length:,} tokens")
    steps: dict[str, Step] = {rule: cases.scan_step(rule, length) for rule in cases.RULES}
    timings = time_in_turns(steps, repeats=repeats, budget_seconds=BUDGET_SECONDS)
    plain = timings["plain"].best
    for rule in cases.RULES:
        best, median = timings[rule].best, timings[rule].median
        row = {"write rule": rule, "tokens": length, "CPU ms, best": 1e3 * best, "CPU ms, median": 1e3 * median}
        report.tables["Scan alone, by write rule"].append(row | {"times plain": best / plain})
    share = cases.scan_flops(length) / plain / peak
    report.targets += [
        Target(claim=f"share of the matmul peak, plain scan at {length:,} tokens", value=share, at_least=0.5),
        Target(claim=f"CPU time of the online rule, by plain, at {length:,} tokens", value=timings["online"].best / plain, at_most=1.4),
    ]


def _check_linearity(report: Report, longest: int, repeats: int) -> None:
    lengths = doublings(longest)
    progress(f"the plain scan up to {longest:,} tokens")
    steps: dict[str, Step] = {f"{length}": cases.scan_step("plain", length) for length in lengths}
    timings = time_in_turns(steps, repeats=repeats, budget_seconds=BUDGET_SECONDS)
    per_token = {length: timings[f"{length}"].best / length for length in lengths}
    least = min(per_token.values())
    report.tables["Plain scan by length"] = [
        {"tokens": length, "CPU µs a token": 1e6 * seconds, "times the least": seconds / least} for length, seconds in per_token.items()
    ]
    claim = f"CPU time of the plain scan a token, most by least, {lengths[0]:,} to {lengths[-1]:,} tokens"
    report.targets.append(Target(claim=claim, value=max(per_token.values()) / least, at_most=1.1))

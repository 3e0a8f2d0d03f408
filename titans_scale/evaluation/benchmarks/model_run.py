"""A training step of whole small models beside titans-pytorch's MAC and a plain transformer: what `tools/bench_model.py` prints."""

from collections.abc import Sequence

import torch

from titans_scale.evaluation.benchmarks import model_cases as cases
from titans_scale.evaluation.benchmarks.measure import MIB, WARM_UP_TOKENS, Step, profile_of, progress, time_in_turns
from titans_scale.evaluation.benchmarks.report import INSTALL_PEERS, Report, Target, doublings, peers_installed, this_machine
from titans_scale.evaluation.benchmarks.sweep import BUDGET_SECONDS, Point, sweep

TITLE = "Models: 4 layers of width 384, vocabulary 4,096, float32, batch 1; a step is forward, backward and AdamW."


def benchmark_models(*, names: Sequence[str], tokens: Sequence[int], longest: int, repeats: int, threads: int = 1) -> Report:
    """Measure and compare; takes minutes at the default sizes.

    Args:
        names: models to measure, keys of `model_cases.models`.   tokens: lengths of the side-by-side comparison.
        longest: MAG is held against the transformer, where both are named, at 1K, 2K, 4K, ... tokens up to here.
        repeats: at most so many of each step.   threads: of torch.
    """
    torch.set_num_threads(threads)
    report = Report(title=TITLE, machine=this_machine(threads=threads))
    if not peers_installed():
        report.notes.append(INSTALL_PEERS)
    models = {name: prepare for name, prepare in cases.models().items() if name in names}
    for prepare in models.values():
        prepare(min(*tokens, WARM_UP_TOKENS))()
    report.tables["Training step"] = []
    for point in sweep(models, tokens, repeats=repeats, threads=threads, notes=report.notes):
        _compare_models(report, point)
    if "MAG" in models and cases.TRANSFORMER in models:
        _compare_with_transformer(report, longest, repeats)
    return report


def profile_models(names: Sequence[str], *, tokens: int, threads: int = 1) -> Report:
    """The operators that take most of one training step, a table for each model."""
    torch.set_num_threads(threads)
    report = Report(title=f"{TITLE} Where the time goes at {tokens:,} tokens.", machine=this_machine(threads=threads))
    for name in names:
        report.tables[name] = profile_of(cases.training_step(name, tokens))
    return report


def _compare_models(report: Report, point: Point) -> None:
    for name, extra in point.extra_bytes.items():
        timing = point.timings.get(name)
        report.tables["Training step"].append(
            {
                "model": name,
                "parameters, M": cases.num_parameters(name) / 1e6,
                "tokens": point.tokens,
                "CPU s, best": timing.best if timing else None,
                "tokens a CPU s": point.tokens / timing.best if timing else None,
                "tokens a wall s": point.tokens / min(timing.wall) if timing else None,
                "extra memory, MiB": extra / MIB,
            }
        )
    if {"MAC", cases.PEER_FINE} <= set(point.timings):
        claim = f"CPU time of {cases.PEER_FINE}, by our MAC, at {point.tokens:,} tokens"
        value = point.timings[cases.PEER_FINE].best / point.timings["MAC"].best
        report.targets.append(Target(claim=claim, value=value, at_least=10))


def _compare_with_transformer(report: Report, longest: int, repeats: int) -> None:
    rows = report.tables["MAG beside a transformer of as many parameters"] = []
    for length in doublings(longest):
        progress(f"MAG and the transformer at {length:,} tokens")
        steps: dict[str, Step] = {name: cases.training_step(name, length) for name in ("MAG", cases.TRANSFORMER)}
        timings = time_in_turns(steps, repeats=repeats, budget_seconds=BUDGET_SECONDS)
        mag, transformer = timings["MAG"].best, timings[cases.TRANSFORMER].best
        rows.append({"tokens": length, "MAG, CPU s": mag, "transformer, CPU s": transformer, "MAG by transformer": mag / transformer})
        claim = f"MAG's CPU time, by the transformer's, at {length:,} tokens"
        if length == 4096:
            report.targets.append(Target(claim=claim, value=mag / transformer, at_most=1.6))
        if length >= 8192:
            report.targets.append(Target(claim=claim, value=mag / transformer, at_most=1.0))

"""Several cases at growing lengths: time in one process, memory in one for each point, and a sentence for what was left out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from titans_scale.evaluation.benchmarks.measure import (
    Prepare,
    Timing,
    available_bytes,
    give_back_freed_pages,
    peak_extra_bytes,
    progress,
    time_in_turns,
)

LONGEST_STEP_SECONDS = 20.0
"""A step that can be expected to take longer is not timed."""
BUDGET_SECONDS = 20.0
"""CPU time after which a step is not repeated again."""
SHARE_OF_FREE_MEMORY = 0.8


class Point(NamedTuple):
    """What was measured at one length, by name of the case; a case that was left out is not in it."""

    tokens: int
    timings: dict[str, Timing]
    extra_bytes: dict[str, int]


def sweep(cases: Mapping[str, Prepare], lengths: Sequence[int], *, repeats: int, threads: int, notes: list[str]) -> Iterator[Point]:
    """Measure all cases at every length, the shortest first: what a point will take is judged by the one before.

    Args:
        notes: gets a sentence for each measurement that was left out.
    """
    seconds_a_token: dict[str, float] = {}
    bytes_a_token: dict[str, float] = {}
    for length in sorted(lengths):
        fitting, slow = [], []
        for name in cases:
            wanted, free = bytes_a_token.get(name, 0) * length, available_bytes()
            if wanted > SHARE_OF_FREE_MEMORY * free:
                notes.append(
                    f"{name} at {length:,} tokens: left out, as it would take {wanted / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free."
                )
            else:
                fitting.append(name)
                if seconds_a_token.get(name, 0) * length > LONGEST_STEP_SECONDS:
                    notes.append(f"{name} at {length:,} tokens: not timed, as it would take over {LONGEST_STEP_SECONDS:.0f} s a pass.")
                    slow.append(name)
        steps = {name: cases[name](length) for name in fitting if name not in slow}
        progress(f"time at {length:,} tokens: {', '.join(steps)}")
        timings = time_in_turns(steps, repeats=repeats, budget_seconds=BUDGET_SECONDS)
        steps.clear()
        give_back_freed_pages()
        progress(f"memory at {length:,} tokens: {', '.join(fitting)}")
        extra_bytes = {name: peak_extra_bytes(cases[name], length, threads=threads) for name in fitting}
        seconds_a_token |= {name: timing.best / length for name, timing in timings.items()}
        bytes_a_token |= {name: extra / length for name, extra in extra_bytes.items()}
        yield Point(length, timings, extra_bytes)

"""Time and memory of a step on a CPU, measured so that numbers stay comparable on a machine that has other work to do as well.

Time is CPU time (user and system, all threads of the process): it does not count what others take. Memory is that of a fresh
process, so that nobody inherits another's freed pages.
"""

import ctypes
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]
"""One forward and backward pass, or one training step; may be repeated."""
Prepare = Callable[[int], Step]
"""Builds what a step over so many tokens needs. Importable by its name (or a partial of such), for a process of its own."""

MATMUL_SIZES = (512, 1024, 2048)
WARM_UP_TOKENS = 256
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of every repeat."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The least CPU time: what the machine does when nothing is in the way."""
        return min(self.cpu)

    @property
    def median(self) -> float:
        return statistics.median(self.cpu)


def progress(text: str) -> None:
    """A line for who waits, beside the results on standard output."""
    print(f"measuring {text}", file=sys.stderr, flush=True)


def time_in_turns(steps: Mapping[str, Step], *, repeats: int, budget_seconds: float) -> dict[str, Timing]:
    """Time every step `repeats` times, in turn: what slows the machine down for a while then slows all of them.

    Args:
        budget_seconds: CPU time after which a step is not repeated again; each runs once at least.
    """
    timings = {name: Timing() for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            timing = timings[name]
            if sum(timing.cpu) >= budget_seconds:
                continue
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            timing.cpu.append(time.process_time() - cpu)
            timing.wall.append(time.perf_counter() - wall)
    return timings


def peak_extra_bytes(prepare: Prepare, tokens: int, *, threads: int) -> int:
    """Most memory that one step holds beyond what its process held before it, in a process that does nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_extra_bytes, prepare, tokens, threads).result()


def _peak_extra_bytes(prepare: Prepare, tokens: int, threads: int) -> int:
    torch.set_num_threads(threads)
    prepare(min(tokens, WARM_UP_TOKENS))()  # libraries are loaded and their buffers made by the first step
    step = prepare(tokens)
    give_back_freed_pages()
    before, _ = resident_bytes()
    step()
    return resident_bytes()[1] - before


def give_back_freed_pages() -> None:
    """To the system. glibc keeps them for later, where they hide as much of what a step takes, and are missing for others."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def resident_bytes() -> tuple[int, int]:
    """Memory of this process now, and at most so far. Without /proc (macOS) the second number stands for both."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    kib = {line.split(":")[0]: int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM"))}
    return 1024 * kib["VmRSS"], 1024 * kib["VmHWM"]


def available_bytes() -> float:
    """Memory that a new process could take without swapping; unlimited where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def matmul_peak(*, repeats: int = 5) -> float:
    """Floating-point operations in a second of CPU time, in the best large float32 matrix product."""
    best = 0.0
    for size in MATMUL_SIZES:
        a, b, out = (torch.ones(size, size) for _ in range(3))
        products = (MATMUL_SIZES[-1] // size) ** 3
        for _ in range(repeats):
            start = time.process_time()
            for _ in range(products):
                torch.mm(a, b, out=out)
            best = max(best, products * 2 * size**3 / (time.process_time() - start))
    return best


def profile_of(step: Step, *, rows: int = 15) -> list[dict[str, str | int | float]]:
    """Where the time of one step goes, by operator, the largest first: one row each."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operator": event.key,
            "calls": event.count,
            "own ms": event.self_cpu_time_total / 1000,
            "share %": 100 * event.self_cpu_time_total / total,
        }
        for event in events[:rows]
    ]

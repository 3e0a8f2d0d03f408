"""How fast a rank is: tokens and FLOPs a second, the share of the device's peak that makes (MFU), and memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from titans_scale.parallel.apply import Precision

GIB = 1024**3
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "MI300X": 1307.0,
}
"""Dense bfloat16 peak in TFLOP/s by a part of the device's name, the longer name first; from the vendors' data sheets."""
CPU_TRIAL_SIZE = 1024


def peak_flops(device: torch.device, precision: Precision, given_tflops: float | None) -> float | None:
    """What one device could do, in FLOP/s: as given; on a GPU from its name; on a CPU measured with a matrix product.

    None where it is not known: an unknown GPU, or float32 on a GPU (whose peak depends on whether TF32 is on).
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cpu":
        return _measured_peak()
    if precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def _measured_peak() -> float:
    """In float32 whatever the run's precision: many CPUs only emulate bfloat16."""
    a = torch.ones(CPU_TRIAL_SIZE, CPU_TRIAL_SIZE)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * CPU_TRIAL_SIZE**3 / min(seconds)


class Speedometer:
    """Counts this rank's tokens and time between two readings. Validation and checkpoints stand outside that time.

    Args:
        flops_per_token: of forward and backward.   peak: of the device, in FLOP/s; None: no MFU.
    """

    def __init__(self, device: torch.device, *, flops_per_token: int, peak: float | None) -> None:
        self._device = device
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._start()

    def count(self, *, tokens: int) -> None:
        """One step is done, in which this rank put so many tokens through the model."""
        self._steps += 1
        self._tokens += tokens

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Time spent in here is waiting for data."""
        start = time.perf_counter()
        yield
        self._loading += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is not training time."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Metrics of one rank since the last reading; times are means per step."""
        seconds = time.perf_counter() - self._since - self._paused
        tps = self._tokens / seconds
        flops = self._flops_per_token * tps
        metrics = {
            "throughput(tps)": tps,
            "tflops": flops / 1e12,
            "time_metrics/end_to_end(s)": seconds / self._steps,
            "time_metrics/data_loading(s)": self._loading / self._steps,
            "time_metrics/data_loading(%)": 100 * self._loading / seconds,
            "memory/max_reserved(GiB)": _memory_gib(self._device),
        }
        if self._peak:
            metrics["mfu(%)"] = 100 * flops / self._peak
        self._start()
        return metrics

    def _start(self) -> None:
        self._since = time.perf_counter()
        self._steps = self._tokens = 0
        self._loading = self._paused = 0.0


def _memory_gib(device: torch.device) -> float:
    """Most memory the allocator held since the last call (GPU); most the process ever held (CPU)."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device) / GIB
        torch.cuda.reset_peak_memory_stats(device)
        return reserved
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB

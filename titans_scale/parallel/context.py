"""The process group of a run: who we are, on which device, and the few sums and agreements that training needs from the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from titans_scale.config import CommConfig, ConfigError

FILES_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other around a checkpoint: a slow disk is no sign of a dead rank."""


class RunError(ValueError):
    """A failure that every rank knows of, told in one sentence; rank 0 says it for all."""


class DistributedContext:
    """Process group over all ranks: NCCL for GPU tensors, gloo for CPU tensors (on a GPU machine too: agreeing there costs no sync).

    Works with torchrun's environment and without (a world of one). A process group that exists already is used and left alone.

    Raises:
        ConfigError: a GPU asked for where there is none, or more ranks on this machine than GPUs.
    """

    def __init__(self, comm: CommConfig, *, device: Literal["auto", "cpu", "cuda"] = "auto") -> None:
        ranks_here, local_rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        self.device = choose_device(device, local_rank=local_rank, ranks_here=ranks_here)
        self._train_timeout = timedelta(seconds=comm.train_timeout_seconds)
        self._owns_group = not dist.is_initialized()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self._owns_group:
            _init_process_group(self.device, timedelta(seconds=comm.init_timeout_seconds))
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.files_group = dist.new_group(backend="gloo", timeout=FILES_TIMEOUT)

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor on the run's device over the data ranks (all ranks, as long as there is nothing but data parallelism)."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def max(self, value: Tensor) -> Tensor:
        """Elementwise maximum over all ranks."""
        largest = value.detach().clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def sum_on_host(self, *values: int) -> list[int]:
        """Sums of a few integers over all ranks, without touching the GPU: the host waits for the other hosts, not for kernels."""
        totals = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(totals)
        return [int(total) for total in totals]

    def gather(self, value: Any) -> list[Any]:
        """One small picklable object of every rank, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.files_group)
        return values

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if any has an error, so that none waits for one that is gone.

        Raises:
            RunError: the sentence of the lowest rank that has one.
        """
        sentences = self.gather(None if error is None else sentence_of(error))
        failed = [rank for rank, sentence in enumerate(sentences) if sentence is not None]
        if failed:
            where = "" if failed[0] == 0 else f"rank {failed[0]}: "
            raise RunError(where + sentences[failed[0]]) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """For work that can fail on one rank alone (files): every rank leaves the block, or every rank raises. No collectives inside."""
        error: Exception | None = None
        try:
            yield
        except (OSError, ValueError) as caught:
            error = caught
        self.raise_together(error)

    def expect_steady_pace(self) -> None:
        """After the first step nothing slow (compilation, first connections) is left: notice a dead rank sooner."""
        if self._owns_group:
            _set_pg_timeout(self._train_timeout)

    def destroy(self) -> None:
        """Leave the process group, if it is ours. Calling it twice does no harm."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(wanted: Literal["auto", "cpu", "cuda"], *, local_rank: int, ranks_here: int) -> torch.device:
    """cuda:local_rank where there is a GPU (or it is asked for), else cpu.

    Raises:
        ConfigError: no GPU where one is asked for, or more ranks on this machine than GPUs.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = "sees no GPU" if torch.version.cuda else "is a build without CUDA"
        raise ConfigError(
            f"training.device is cuda, but torch {torch.__version__} {build}; install a CUDA build, or set training.device to cpu"
        )
    gpus = torch.cuda.device_count()
    if ranks_here > gpus:
        raise ConfigError(
            f"there are {ranks_here} ranks on a machine with {gpus} GPU{'s' if gpus > 1 else ''}; start --nproc-per-node {gpus}"
        )
    return torch.device("cuda", local_rank)


def sentence_of(error: BaseException) -> str:
    """An error as one sentence without a traceback; for an OSError what happened and to which file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    text = str(error)
    if "Original Traceback" in text:  # from a DataLoader's worker: the sentence is the last line, after the error's type
        text = text.strip().rpartition("\n")[2].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)

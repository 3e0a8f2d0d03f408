"""The process group of a run: who we are, on which device, and the few sums and agreements that training needs from the others."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from titans_scale.config import CommConfig, ConfigError
from titans_scale.parallel.runtime.heartbeat import Heartbeat, Phase
from titans_scale.parallel.runtime.whereabouts import remove_beats, sentence_of_fault

FILES_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other around a checkpoint: a slow disk is no sign of a dead rank."""
SLOW_PHASES: tuple[Phase, ...] = ("loading", "checkpoint")
"""In which ranks wait for each other so long."""
MOST_NAMED = 3
"""Ranks in one sentence."""
GLOO_SAYS = ("/gloo/", "Connection closed by peer", "Connection reset by peer", "Application timeout caused pair closure", "Socket closed")
"""What is in the errors of gloo's collectives when a rank is gone or late; they have no class of their own."""


class RunError(ValueError):
    """A failure that every rank knows of, told in one sentence; rank 0 says it for all."""


class LostRank(RuntimeError):
    """A collective failed, because another rank is gone or stuck. Which, in one sentence.

    Args:
        speaks: whether this rank is the one to say it: the first of those that are not at fault.
    """

    def __init__(self, sentence: str, *, speaks: bool) -> None:
        super().__init__(sentence)
        self.speaks = speaks


class DistributedContext:
    """Process group over all ranks: NCCL for GPU tensors, gloo for CPU tensors (on a GPU machine too: agreeing there costs no sync).

    Works with torchrun's environment and without (a world of one). A process group that exists already is used and left alone.

    Raises:
        ConfigError: a GPU asked for where there is none, or more ranks on this machine than GPUs.
    """

    def __init__(self, comm: CommConfig, *, device: Literal["auto", "cpu", "cuda"] = "auto") -> None:
        ranks_here, local_rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        self.device = choose_device(device, local_rank=local_rank, ranks_here=ranks_here)
        self._init_timeout = timedelta(seconds=comm.init_timeout_seconds)
        self._train_timeout = timedelta(seconds=comm.train_timeout_seconds)
        self.timeout = self._init_timeout
        """How long ranks wait for each other in a collective now; in those of `files_group`, FILES_TIMEOUT."""
        self._heartbeat: Heartbeat | None = None
        self._owns_group = not dist.is_initialized()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self._owns_group:
            _init_process_group(self.device, self._init_timeout)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.files_group = dist.new_group(backend="gloo", timeout=FILES_TIMEOUT, group_desc="files")

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor on the run's device over all ranks."""
        total = value.detach().clone()
        dist.all_reduce(total)
        self._pass_milestone()
        return total

    def max(self, value: Tensor) -> Tensor:
        """Elementwise maximum over all ranks."""
        largest = value.detach().clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self._pass_milestone()
        return largest

    def sum_on_host(self, *values: int) -> list[int]:
        """Sums of a few integers over all ranks, without touching the GPU: the host waits for the other hosts, not for kernels."""
        totals = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(totals)
        self._pass_milestone()
        return [int(total) for total in totals]

    def gather(self, value: Any) -> list[Any]:
        """One small picklable object of every rank, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.files_group)
        self._pass_milestone()
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

    def expect_slow_start(self) -> None:
        """All groups are made: until the first step is done, none of them has less patience than the whole, nor more."""
        self._wait_at_most(self._init_timeout)

    def expect_steady_pace(self) -> None:
        """After the first step nothing slow (compilation, first connections) is left: notice a dead rank sooner."""
        self._wait_at_most(self._train_timeout)

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """For what comes seldom and may compile anew: in the block ranks wait for each other as long as in the first step."""
        before = self.timeout
        self._wait_at_most(max(before, self._init_timeout))
        yield
        self._wait_at_most(before)

    def start_heartbeat(self, run: Path) -> None:
        """From now on this rank says in the run's folder where it stands, and whether it stands too long. All ranks together."""
        with self.together():
            if self.is_main:
                remove_beats(run)
        self._run = run
        self._heartbeat = Heartbeat(
            run,
            rank=self.rank,
            world_size=self.world_size,
            patience=self._patience,
            shortest_patience=min(self._init_timeout, self._train_timeout).total_seconds(),
        )

    def enter(self, phase: Phase, step: int) -> None:
        """Say what begins, and in which step."""
        if self._heartbeat is not None:
            self._heartbeat.enter(phase, step)

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """For everything that has collectives inside: one that fails names the rank that is missing, as far as heartbeats tell.

        Raises:
            LostRank: in place of what gloo or NCCL say.
        """
        try:
            yield
        except Exception as error:
            if is_loss_of_contact(error):
                raise self._lost(error) from error
            if self._heartbeat is not None:
                self._heartbeat.fail(sentence_of(error))
            raise

    def destroy(self) -> None:
        """Leave the process group, if it is ours. Calling it twice does no harm."""
        if self._heartbeat is not None:
            self._heartbeat.close("finished")
            self._heartbeat = None
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _wait_at_most(self, timeout: timedelta) -> None:
        """The mesh makes groups of its own, with torch's default of ten minutes (NCCL) or thirty (gloo)."""
        self.timeout = timeout
        if self._owns_group:
            for group in list(_world.pg_map):
                if group is not self.files_group:
                    _set_pg_timeout(timeout, group)

    def _patience(self, phase: Phase) -> float | None:
        if self.world_size == 1:
            return None
        return (FILES_TIMEOUT if phase in SLOW_PHASES else self.timeout).total_seconds()

    def _pass_milestone(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.pass_milestone()

    def _lost(self, error: Exception) -> LostRank:
        said = sentence_of(error)
        if self._heartbeat is None:
            return LostRank(f"lost contact with the other ranks before the run began: {said}", speaks=True)
        found = self._heartbeat.lose_others(error)
        guilty = {beat.rank for beat, _ in found}
        speaks = self.rank == min(set(range(self.world_size)) - guilty, default=self.rank)
        if not found:
            where = f"by their heartbeats all ranks stand at the same place ({said})"
            return LostRank(f"lost contact; {where}; tools/hang_report.py {self._run} shows more", speaks=speaks)
        named = "; ".join(sentence_of_fault(beat, fault, self._run, time.time()) for beat, fault in found[:MOST_NAMED])
        more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        nccl = f" ({said})" if isinstance(error, dist.DistBackendError) else ""  # gloo's own words say nothing more
        return LostRank(f"{named}{more}{nccl}; tools/hang_report.py {self._run} shows all ranks", speaks=speaks)


def is_loss_of_contact(error: Exception) -> bool:
    """Whether an error is that of a collective that other ranks did not come to."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(part in str(error) for part in GLOO_SAYS))


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
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (dist.DistError, RuntimeError) as error:
            raise LostRank(
                f"{os.environ['WORLD_SIZE']} ranks did not find each other within comm.init_timeout_seconds {timeout.seconds} s:"
                f" {str(error).partition(chr(10))[0]}",
                speaks=True,
            ) from error
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)

"""Batches for the trainer, in an order that no number of ranks, workers or micro-batches changes.

Sample g of the endless global sequence is entry g % N of the order of epoch g // N, where N is the number of samples. Step s takes g in
[s*G, (s+1)*G); its micro-batch m on rank r takes the rows from s*G + (m*world_size + r) * micro_batch_size on. So where a run stands is one
number, the samples consumed, and it may go on with other ranks.

Shape letters: B sequences of a micro-batch, T tokens of a sequence.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from titans_scale.data.dataset import TokenDataset

IGNORED = -100
"""Target of a position that does not count, as torch's cross entropy knows it."""
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch."""

    inputs: Tensor
    """int64 (B, T)."""
    targets: Tensor
    """int64 (B, T): the token after each input, or IGNORED past the end of a sample."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        return Batch(inputs=self.inputs.to(device, non_blocking=non_blocking), targets=self.targets.to(device, non_blocking=non_blocking))


class SampleOrder:
    """The endless global sequence of samples: a pure function of (seed, epoch), the same with any version of any library."""

    def __init__(self, num_samples: int, *, shuffle: bool, seed: int) -> None:
        self._num_samples = num_samples
        self._shuffle = shuffle
        self._seed = seed
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def take(self, start: int, count: int) -> list[int]:
        """Samples number `start` to `start` + `count` of the sequence; over the end of an epoch it goes on into the next."""
        taken: list[int] = []
        while count > 0:
            epoch, position = divmod(start, self._num_samples)
            part = self.epoch(epoch)[position : position + count].tolist()
            taken += part
            start, count = start + len(part), count - len(part)
        return taken

    def epoch(self, epoch: int) -> np.ndarray:
        """All samples, each once, in the order of an epoch: int64 (N,)."""
        if self._cached[0] != epoch:
            samples = np.arange(self._num_samples, dtype=np.int64)
            self._cached = epoch, np.argsort(self._keys(epoch), kind="stable") if self._shuffle else samples
        return self._cached[1]

    def _keys(self, epoch: int) -> np.ndarray:
        """Random 64-bit numbers, no two alike: SplitMix64 (Steele et al. 2014), whose mixing is one to one."""
        start = hashlib.sha256(f"{self._seed} {epoch}".encode()).digest()[:8]
        z = np.arange(self._num_samples, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(start, dtype="<u8")
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class TokenStream:
    """Micro-batches of one rank, endlessly. Iterating goes on from where `state_dict` says; one iterator at a time.

    Args:
        micro_batch_size: sequences a rank gets at once.   global_batch_size: sequences of one step over all ranks.
        num_workers: processes that read ahead; 0 reads in this one.
    Raises:
        ValueError: the global batch does not come out even over the ranks' micro-batches.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among {world_size} ranks")
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"a global batch of {global_batch_size} sequences does not come out even in micro-batches of {micro_batch_size} on"
                f" {world_size} ranks; make it a multiple of {micro_batch_size * world_size}"
            )
        self.dataset = dataset
        self.samples_consumed = 0
        """Samples of the global sequence whose batch every rank has been given whole."""
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._rank = rank
        self._world_size = world_size
        self._shuffle = shuffle
        self._seed = seed
        self._num_workers = num_workers

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches a rank takes for one global batch."""
        return self._global_batch_size // (self._micro_batch_size * self._world_size)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.samples_consumed / len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=_MicroBatches(self, start=self.samples_consumed),
            num_workers=self._num_workers,
            collate_fn=collate,
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator(),  # or it would draw its workers' seed from torch's global generator, which belongs to the model
        )
        for number, batch in enumerate(_started(loader), start=1):
            if number % self.micro_batches_per_step == 0:
                self.samples_consumed += self._global_batch_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last whole global batch, and of which data; the same on every rank."""
        return {"samples_consumed": self.samples_consumed, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, also one of other ranks, workers or batch sizes. Takes effect at the next `iter`.

        Raises:
            ValueError: the state is of other data or another order (what differs).
        """
        changes = [f"{name} {state.get(name)!s:.12} -> {ours!s:.12}" for name, ours in self._identity().items() if state.get(name) != ours]
        if changes:
            raise ValueError(
                f"the checkpoint was trained on other data than {self.dataset.directory} ({', '.join(changes)});"
                " give the data it was trained on, or start anew in another training.output_dir"
            )
        self.samples_consumed = int(state["samples_consumed"])

    def _identity(self) -> dict[str, Any]:
        index = self.dataset.index
        return {
            "sequence_length": index.settings.sequence_length,
            "num_samples": index.samples,
            "tokenizer": index.settings.tokenizer_fingerprint,
            "fingerprint": index.fingerprint,
            "shuffle": self._shuffle,
            "seed": self._seed,
        }


class _MicroBatches:
    """Sample numbers of this rank's micro-batches, for a DataLoader to read (ahead, where it has workers)."""

    def __init__(self, stream: TokenStream, *, start: int) -> None:
        self._start = start
        self._size = stream._micro_batch_size
        self._rank = stream._rank
        self._world_size = stream._world_size
        self._order = SampleOrder(len(stream.dataset), shuffle=stream._shuffle, seed=stream._seed)

    def __iter__(self) -> Iterator[list[int]]:
        start = self._start + self._rank * self._size
        while True:  # a global batch is a whole number of these strides, so steps need not be told apart
            yield self._order.take(start, self._size)
            start += self._world_size * self._size


def validation_batches(
    dataset: TokenDataset, *, micro_batch_size: int, rank: int = 0, world_size: int = 1, max_batches: int = 0
) -> Iterator[Batch]:
    """A split once, in its own order. Every rank gets equally many batches; rows past the end are all padding.

    Args:
        max_batches: batches of a rank; where the split has more, an even selection of its samples. 0: all.
    """
    row_count = micro_batch_size * world_size
    num_batches = -(-len(dataset) // row_count)
    if 0 < max_batches < num_batches:
        num_batches = max_batches
    chosen = min(len(dataset), num_batches * row_count)
    for batch in range(num_batches):
        first = batch * row_count + rank * micro_batch_size
        numbers = range(first, min(first + micro_batch_size, chosen))
        rows = [dataset[number * len(dataset) // chosen] for number in numbers]
        padding = (torch.full((dataset.sequence_length + 1,), dataset.eos_id), 0)
        yield collate([*rows, *[padding] * (micro_batch_size - len(rows))])


def collate(samples: Sequence[tuple[Tensor, int]]) -> Batch:
    """Samples (T+1 tokens and how many are real) side by side."""
    tokens = torch.stack([sample for sample, _ in samples])
    counts = torch.tensor([count for _, count in samples])
    targets = tokens[:, 1:].masked_fill(torch.arange(1, tokens.shape[1]) >= counts[:, None], IGNORED)
    return Batch(inputs=tokens[:, :-1].contiguous(), targets=targets)


def _started(loader: DataLoader) -> Iterator[Batch]:
    """The loader's iterator. Its workers are born with the trainer's signals held back: none of them dies of one before it is set up."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach all processes of a group; a worker that died of one would take the last checkpoint with it.

    A worker obeys its trainer's SIGTERM alone. It must obey that one: a trainer that ends badly waits for the workers it terminates.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()  # not os.getppid(): under forkserver that is the server
    if hasattr(signal, "sigwaitinfo") and trainer is not None:
        threading.Thread(target=_end_when_the_trainer_says_so, args=(trainer.pid,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    else:  # macOS does not tell who sent a signal; torch's own handler there is the better half of it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _end_when_the_trainer_says_so(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)

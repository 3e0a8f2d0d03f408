"""The endless sequence in which a split's samples are read: a pure function of the seed, with no table of all samples anywhere.

Epoch e lays the shards end to end in an order of its own, cuts that row into windows, and shuffles inside each. So a window's samples come
from a few shards, which is kind to disks and caches, and any place of the sequence is found without walking there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class SampleOrder:
    """Entry g of the sequence is entry g % N of epoch g // N; an epoch holds each of the N samples once.

    Where the windows of an epoch begin is drawn for it, so that samples parted by a border in one epoch meet in another. Where one window
    has room for all samples, the epoch is one full shuffle.

    Args:
        shard_samples: samples of each shard, as written.   window: samples that are shuffled together.
        seed: two orders with one seed are alike; also a text, so that the sources of a mixture can have seeds of their own.
    """

    def __init__(self, shard_samples: Sequence[int], *, shuffle: bool, seed: int | str, window: int) -> None:
        self.num_samples = sum(shard_samples)
        self._counts = np.array(shard_samples, dtype=np.int64)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._shuffle = shuffle
        self._seed = seed
        self._size = window
        self._layout = self._lay_out(0)
        self._cached: tuple[tuple[int, int], np.ndarray] = (-1, -1), self._firsts

    def take(self, start: int, count: int) -> list[int]:
        """Samples number `start` to `start` + `count` of the sequence; over the end of an epoch it goes on into the next."""
        taken: list[int] = []
        while count > 0:
            epoch, place = divmod(start, self.num_samples)
            part = self._from(epoch, place)[:count].tolist() if self._shuffle else [*range(place, min(place + count, self.num_samples))]
            taken += part
            start, count = start + len(part), count - len(part)
        return taken

    def _from(self, epoch: int, place: int) -> np.ndarray:
        """The samples from a place of an epoch on, up to the end of its window: int64 (n,)."""
        if self._layout.epoch != epoch:
            self._layout = self._lay_out(epoch)
        number = (place + self._layout.phase) // self._size
        start = max(0, number * self._size - self._layout.phase)
        if self._cached[0] != (epoch, number):
            end = min((number + 1) * self._size - self._layout.phase, self.num_samples)
            self._cached = (epoch, number), self._window(start, end)
        return self._cached[1][place - start :]

    def _window(self, start: int, end: int) -> np.ndarray:
        """The samples of the laid out places `start` to `end`, shuffled: every place of an epoch has a random key to go by."""
        layout = self._layout
        places = start + np.argsort(random_keys(start, end, f"{self._seed} {layout.epoch}"), kind="stable")
        turns = np.searchsorted(layout.ends, places, side="right")
        shards = layout.shards[turns]
        return self._firsts[shards] + places - (layout.ends[turns] - self._counts[shards])

    def _lay_out(self, epoch: int) -> "_Layout":
        shards, phase = np.arange(len(self._counts)), 0
        if self.num_samples > self._size:
            shards = np.argsort(random_keys(0, len(shards), f"{self._seed} {epoch} shards"), kind="stable")
            phase = int(random_keys(0, 1, f"{self._seed} {epoch} phase")[0]) % self._size
        return _Layout(epoch=epoch, shards=shards, ends=np.cumsum(self._counts[shards]), phase=phase)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How the shards of one epoch lie end to end."""

    epoch: int
    shards: np.ndarray
    """int64 (S,): the shards in their order."""
    ends: np.ndarray
    """int64 (S,): place behind the last sample of each, in that order."""
    phase: int
    """By so many places the first window is shorter than the others."""


def random_keys(start: int, end: int, seed: str) -> np.ndarray:
    """Entries `start` to `end` of a seed's random sequence: uint64, no two of them alike, the same with any version of any library.

    SplitMix64 (Steele et al. 2014), whose mixing is one to one.
    """
    first = hashlib.sha256(seed.encode()).digest()[:8]
    z = np.arange(start, end, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(first, dtype="<u8")
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

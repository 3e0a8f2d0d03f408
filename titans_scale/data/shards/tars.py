"""The tars of a split: how samples lie in them, writing them, and seeing that all are there.

The documents become one stream of tokens, [eos] document [eos] document [eos] ... Sample i holds tokens i*L to (i+1)*L of it, both
included: L inputs and the L targets one further on. So every token of the stream but the first is a target exactly once.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titans_scale.data.files import atomic_write
from titans_scale.data.shards.index import Shard, ShardIndex

TAR_BLOCK = tarfile.BLOCKSIZE
SHARD_NAME = re.compile(r"\d{6,}\.tar")


def shard_name(number: int) -> str:
    """Of shard `number` of a split, from 0."""
    return f"{number:06d}.tar"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The bytes of a tar. Each entry is a header of the tar, one of numpy, the tokens; all entries of full samples have one size."""

    sequence_length: int
    dtype: np.dtype

    @classmethod
    def of(cls, *, sequence_length: int, vocab_size: int) -> "Layout":
        """With the smallest unsigned integers that hold the vocabulary."""
        return cls(sequence_length=sequence_length, dtype=np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4"))

    @property
    def first_offset(self) -> int:
        """Byte of a tar where the tokens of its first sample begin."""
        return TAR_BLOCK + len(self._full_npy()) - (self.sequence_length + 1) * self.dtype.itemsize

    @property
    def stride(self) -> int:
        """Bytes from one sample to the next."""
        return TAR_BLOCK + -(-len(self._full_npy()) // TAR_BLOCK) * TAR_BLOCK

    def tar(self, tokens: np.ndarray, *, first: int) -> memoryview:
        """A whole tar of samples `first`, `first` + 1, ... under nine-digit names; nothing in it tells when or by whom it was made.

        Args:
            tokens: all of its samples and the one before them, at least 2.
        """
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, start in enumerate(range(0, len(tokens) - 1, self.sequence_length), start=first):
                npy = _npy(tokens[start : start + self.sequence_length + 1])
                entry = tarfile.TarInfo(f"{number:09d}.npy")
                entry.size = len(npy)
                tar.addfile(entry, io.BytesIO(npy))
        return buffer.getbuffer()

    def _full_npy(self) -> bytes:
        return _npy(np.zeros(self.sequence_length + 1, self.dtype))


def write_tars(
    stream: Iterable[np.ndarray], directory: Path, *, layout: Layout, samples_per_shard: int, first_shard: int = 0
) -> Iterator[Shard]:
    """Write a stream of tokens as 000000.tar, 000001.tar, ... Each is given out once it lies there whole.

    Args:
        stream: arrays of any length, of the layout's dtype.
        first_shard: number of the first tar; the stream then begins with its first token.
    """
    blocks = _blocks(stream, size=samples_per_shard * layout.sequence_length)
    for number, tokens in enumerate(blocks, start=first_shard):
        data = layout.tar(tokens, first=number * samples_per_shard)
        file = directory / shard_name(number)
        with atomic_write(file) as tar:
            tar.write(data)
        yield Shard(
            name=file.name,
            samples=-(-(len(tokens) - 1) // layout.sequence_length),
            tokens=len(tokens) - 1,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )


def check_shards(directory: Path, index: ShardIndex) -> None:
    """See that every shard is there in its full size.

    Raises:
        ValueError: one is missing or has another size than the index says.
    """
    for shard in index.shards:
        if fault := fault_of_size(directory, shard):
            raise ValueError(f"{fault}; run tools/make_shards.py again with --overwrite")


def fault_of_size(directory: Path, shard: Shard) -> str | None:
    """What is wrong with a shard that is missing or of another size than the index says; None where it is neither."""
    file = directory / shard.name
    if not file.is_file():
        return f"shard {file} is missing"
    if (size := file.stat().st_size) != shard.bytes:
        return f"shard {file} has {size} bytes where its index says {shard.bytes}, so it was cut short or changed"
    return None


def _blocks(stream: Iterable[np.ndarray], *, size: int) -> Iterator[np.ndarray]:
    """The stream cut up: size + 1 tokens each, the last of a block the first of the next; the last block holds what is left."""
    held: list[np.ndarray] = []
    count = 0
    for array in stream:
        held.append(array)
        count += len(array)
        if count > size:
            tokens, start = np.concatenate(held), 0
            while len(tokens) - start > size:
                yield tokens[start : start + size + 1]
                start += size
            held, count = [tokens[start:].copy()], len(tokens) - start
    if count > 1:
        yield np.concatenate(held)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0))
    return buffer.getvalue()

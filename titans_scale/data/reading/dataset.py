"""A split as a map-style dataset: sample i is one read at a known byte of a shard, checked, and tried again where it fails."""

import bisect
import itertools
import logging
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans_scale.data.reading.faults import DamagedError, ReadError, ReadPolicy
from titans_scale.data.reading.shard_files import ShardFiles
from titans_scale.data.reading.store import RemoteSplit, is_remote
from titans_scale.data.shards.index import INDEX_NAME, ShardIndex, load_index
from titans_scale.data.shards.split_folder import load_tokenizer_of
from titans_scale.data.shards.tars import check_shards
from titans_scale.data.tokenizers.tokenizer import Tokenizer

NPY_PREFIX = 10
"""Bytes of a .npy file before the text that describes its array."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Samples side by side. B samples, T the sequence length."""

    tokens: Tensor
    """int64 (B, T + 1), padded with eos."""
    counts: Tensor
    """int64 (B,): tokens of each that are real, 2 at least; 0: it could not be read and is left out."""
    retries: int
    """Further attempts that were made since the rows before these."""
    skipped: int
    """Samples that are left out."""


class TokenDataset(Dataset[tuple[Tensor, int]]):
    """The samples of a split, in the order in which they were written. `open_split` makes it.

    Files are opened when first read, in each process by itself: the dataset may be forked and pickled to workers.

    Args:
        directory: where the shards lie, or will lie when they have been fetched.
        remote: what fetches those that are not there.
    """

    def __init__(self, directory: Path, index: ShardIndex, *, policy: ReadPolicy | None = None, remote: RemoteSplit | None = None) -> None:
        self.directory = directory
        self.index = index
        self._policy = policy or ReadPolicy()
        self._remote = remote
        self._dtype = np.dtype(index.dtype)
        self._full_header = self._header(self.sequence_length + 1)
        self._ids_may_be_unknown = index.vocab_size <= np.iinfo(self._dtype).max
        self._ends = list(itertools.accumulate(shard.samples for shard in index.shards))
        self._files = ShardFiles(directory, index.shards, self._policy, remote)
        self._warned: set[int] = set()

    def __len__(self) -> int:
        return self.index.samples

    @property
    def where(self) -> str:
        """The split's place, as told to the user."""
        return self._remote.address() if self._remote else str(self.directory)

    @property
    def sequence_length(self) -> int:
        """Inputs of a sample; it holds one token more."""
        return self.index.settings.sequence_length

    @property
    def vocab_size(self) -> int:
        return self.index.vocab_size

    @property
    def eos_id(self) -> int:
        return self.index.eos_id

    @property
    def fingerprint(self) -> str:
        """Of the samples; see ShardIndex."""
        return self.index.fingerprint

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that the shards were written with.

        Raises:
            ValueError: its model file is gone, or is another one.
        """
        spec: str | Path = self.index.tokenizer
        if spec != "byte":
            spec = self._remote.fetch_tokenizer(self.directory, str(spec)) if self._remote else self.directory / spec
        return load_tokenizer_of(self.index, spec, where=self.where)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Sample `index`: int64 tokens (sequence_length + 1,), padded with eos, and how many of them are real. Raises as `__getitems__`."""
        rows = self.__getitems__([index])
        return rows.tokens[0], int(rows.counts[0])

    def __getitems__(self, numbers: Sequence[int]) -> Rows:
        """The samples of these numbers, in the order asked for. What cannot be read is tried again, then raised or left out (the policy).

        Raises:
            IndexError: there is no such sample.
            ReadError: one cannot be read: its number, shard and place in it, and why; with on_error skip it is left out instead.
            OSError: the cache of remote shards cannot be written.
        """
        tokens = np.empty((len(numbers), self.sequence_length + 1), dtype=np.int64)
        counts = np.empty(len(numbers), dtype=np.int64)
        for row, number in enumerate(numbers):
            if not 0 <= number < len(self):
                raise IndexError(f"sample {number} of {len(self)}")
            shard = bisect.bisect_right(self._ends, number)
            try:
                counts[row] = self._read(shard, number, tokens[row])
            except ReadError as error:
                counts[row] = self._read_again(shard, number, tokens[row], error)
        skipped = int(np.count_nonzero(counts == 0))
        return Rows(tokens=torch.from_numpy(tokens), counts=torch.from_numpy(counts), retries=self.take_retries(), skipped=skipped)

    def take_retries(self) -> int:
        """Further attempts made in this process since this was last asked: what rows do not tell are those of `prefetch` beside workers."""
        retries, self._files.retries = self._files.retries, 0
        return retries

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Have the shards of samples that come up soon fetched in the background, in this order. At once back; nothing for a folder."""
        shards = np.searchsorted(self._ends, np.fromiter(numbers, dtype=np.int64), side="right")
        self._files.prefetch(list(dict.fromkeys(shards.tolist())))

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.close()

    def _read(self, shard: int, number: int, row: np.ndarray) -> int:
        """One sample into its row.

        Returns:
            How many of its tokens are real.
        Raises:
            ReadError: it cannot be read now.   DamagedError: what stands in its place is no such sample.
        """
        index = self.index
        position = number - self._ends[shard] + index.shards[shard].samples
        count = min(self.sequence_length, index.shards[shard].tokens - position * self.sequence_length) + 1
        size, offset = index.first_offset + count * self._dtype.itemsize, position * index.stride
        file = self._files.descriptor(shard)
        try:
            data = os.pread(file, size, offset)  # not a map: where a file gets shorter, reading a map is the end of the process
        except OSError as error:
            raise ReadError(f"shard {self._files.path(shard)}: {error.strerror}") from error
        damage = self._damage(data, number, count)
        if not damage:
            tokens = np.frombuffer(data, self._dtype, offset=index.first_offset)
            if not self._ids_may_be_unknown or (largest := tokens.max()) < index.vocab_size:
                row[:count] = tokens
                row[count:] = index.eos_id
                return count
            damage = f"has the token {largest} in sample {number}, of a vocabulary of {index.vocab_size}"
        raise DamagedError(f"shard {self._files.path(shard)} {damage} (member {number:09d}.npy, byte {offset})")

    def _damage(self, data: bytes, number: int, count: int) -> str:
        """What is wrong with a sample's entry in its tar as far as its tokens, or ""."""
        if len(data) != self.index.first_offset + count * self._dtype.itemsize:
            return f"ends inside sample {number}; it changed while in use"
        if not data.startswith(b"%09d.npy\0" % number):
            return f"has another member in the place of sample {number}"
        if not data.startswith(self._full_header if count > self.sequence_length else self._header(count), tarfile.BLOCKSIZE):
            return f"has no array of {count} tokens in the place of sample {number}"
        return ""

    def _header(self, count: int) -> bytes:
        """What a .npy member of so many tokens begins with; blanks follow up to the tokens."""
        described = repr({"descr": self._dtype.str, "fortran_order": False, "shape": (count,)}).removesuffix("}")
        return b"\x93NUMPY\1\0" + (self.index.first_offset - tarfile.BLOCKSIZE - NPY_PREFIX).to_bytes(2, "little") + described.encode()

    def _read_again(self, shard: int, number: int, row: np.ndarray, error: ReadError) -> int:
        """What `_read` has failed at: further attempts, each with the file opened anew, then what the policy says."""
        attempts = self._policy.retrying(self._files.count_retry)
        try:
            for attempt in attempts:
                with attempt:
                    if attempt.retry_state.attempt_number == 1:
                        raise error
                    self._files.release(shard, damaged=isinstance(error, DamagedError))
                    return self._read(shard, number, row)
        except ReadError as last:
            error = last
        if not isinstance(error, DamagedError):
            self._files.give_up(shard, str(error))
        tries = attempts.statistics["attempt_number"]
        sentence = f"sample {number} cannot be read: {error}" + (f" ({tries} attempts)" if tries > 1 else "")
        if self._policy.on_error == "raise":
            raise ReadError(f"{sentence}; mend or fetch the shard anew, or go on without such samples with data.on_error skip") from error
        if shard not in self._warned:
            self._warned.add(shard)
            log.warning("%s; left out, as others of this shard may be without further mention", sentence)
        row[:] = self.index.eos_id
        return 0


def open_split(path: str | Path, split: str, *, policy: ReadPolicy | None = None) -> TokenDataset:
    """Open a split of token shards.

    Args:
        path: the folder that tools/make_shards.py wrote, or where a copy of it lies: see `data.path`.
        split: "train" or "validation".
        policy: how faults are dealt with. That the shards are there in full size is seen to here, whatever it says.
    Raises:
        ValueError: the folder, the split, its index or a shard is missing, cut short, empty, or of a version that this code cannot read.
            Of a remote split the index alone is looked at.
    """
    policy = policy or ReadPolicy()
    if is_remote(path):
        remote = RemoteSplit(str(path), split, policy)
        directory, index = remote.fetch_index()
        return TokenDataset(directory, _sound(index, remote.address()), policy=policy, remote=remote)
    path = Path(path)
    make = f"tools/make_shards.py --corpus CORPUS --tokenizer TOKENIZER --output {path}"
    if not path.is_dir():
        raise ValueError(f"there are no token shards in {path}: the folder does not exist; make them with {make}")
    directory = path / split
    if not directory.is_dir():
        splits = sorted(index.parent.name for index in path.glob(f"*/{INDEX_NAME}"))
        there = f"it has {', '.join(splits)}" if splits else f"it has none; make them with {make}"
        raise ValueError(f"{path} has no split {split!r}: {there}")
    if not (directory / INDEX_NAME).is_file():
        raise ValueError(f"{directory} has no {INDEX_NAME}, so its shards were never finished; run {make} again")
    index = _sound(load_index(directory), str(directory))
    check_shards(directory, index)
    return TokenDataset(directory, index, policy=policy)


def _sound(index: ShardIndex, where: str) -> ShardIndex:
    if index.samples < 1:
        raise ValueError(f"{where} holds no samples; make shards of a corpus with text in that split")
    if empty := [shard.name for shard in index.shards if shard.samples < 1]:
        damage = f"its shard {empty[0]} is empty"
    elif index.samples != sum(shard.samples for shard in index.shards):
        damage = f"its shards hold other than the {index.samples} samples it speaks of"
    elif index.dtype not in ("<u2", "<u4") or not tarfile.BLOCKSIZE + NPY_PREFIX < index.first_offset < index.stride:
        damage = f"its samples cannot lie {index.stride} bytes apart as {index.dtype} from byte {index.first_offset} on"
    else:
        return index
    raise ValueError(f"{where}/{INDEX_NAME} is damaged: {damage}; run tools/make_shards.py again with --overwrite")

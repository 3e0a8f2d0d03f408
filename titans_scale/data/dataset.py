"""A split as a map-style dataset: sample i is one read at a known byte of a shard."""

import bisect
import itertools
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans_scale.data.index import INDEX_NAME, ShardIndex, load_index
from titans_scale.data.shards import check_shards
from titans_scale.data.tokenizer import Tokenizer, load_tokenizer

MAX_OPEN_FILES = 64


class TokenDataset(Dataset[tuple[Tensor, int]]):
    """The samples of a split, in the order in which they were written. `open_split` makes it.

    Files are opened when first read, in each process by itself: the dataset may be forked and pickled to workers.
    """

    def __init__(self, directory: Path, index: ShardIndex) -> None:
        self.directory = directory
        self.index = index
        self._ends = list(itertools.accumulate(shard.samples for shard in index.shards))
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self.index.samples

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
        spec = self.index.tokenizer
        tokenizer = load_tokenizer(spec if spec == "byte" else (self.directory / spec).resolve())
        if tokenizer.fingerprint != self.index.settings.tokenizer_fingerprint:
            raise ValueError(f"{tokenizer.spec} is not the tokenizer that the shards in {self.directory} were written with")
        return tokenizer

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Sample `index`: int64 tokens (sequence_length + 1,), padded with eos, and how many of them are real (2 at least).

        Raises:
            IndexError: there is no such sample.   ValueError: its shard ends too early.   OSError: it cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        position = index - (self._ends[shard] - self.index.shards[shard].samples)
        count = min(self.sequence_length, self.index.shards[shard].tokens - position * self.sequence_length) + 1
        dtype = np.dtype(self.index.dtype)
        data = os.pread(self._file(shard), count * dtype.itemsize, self.index.first_offset + position * self.index.stride)
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"shard {self.directory / self.index.shards[shard].name} ends inside sample {index}; it changed while in use")
        tokens = np.full(self.sequence_length + 1, self.eos_id, dtype=np.int64)
        tokens[:count] = np.frombuffer(data, dtype)
        return torch.from_numpy(tokens), count

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.directory / self.index.shards[shard].name, os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # a file descriptor means nothing in another process


def open_split(path: str | Path, split: str) -> TokenDataset:
    """Open a split of token shards.

    Args:
        path: the folder that tools/make_shards.py wrote.   split: "train" or "validation".
    Raises:
        ValueError: the folder, the split, its index or a shard is missing, cut short, empty, or of a version that this code cannot read.
    """
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
    index = load_index(directory)
    if index.samples < 1:
        raise ValueError(f"{directory} holds no samples; make shards of a corpus with text in that split")
    check_shards(directory, index)
    return TokenDataset(directory, index)

"""Whether the shards of a folder are whole and hold what their index says, and whether any of it is there twice."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from titans_scale.data.processes import map_in_order
from titans_scale.data.shards.index import INDEX_NAME, ShardIndex, fingerprint_of, load_index
from titans_scale.data.shards.info import split_folders
from titans_scale.data.shards.split_folder import load_tokenizer_of
from titans_scale.data.shards.tars import SHARD_NAME, Layout, fault_of_size, shard_name
from titans_scale.data.shards.verify_shard import ShardTask, look_at, member_name, some_members, tokens_at
from titans_scale.data.text.corpus import TRAIN
from titans_scale.data.tokenizers.tokenizer import Tokenizer


class Verifier:
    """Looks at splits one by one, and remembers what was in them to find it again in others.

    Args:
        quick: look at indexes and sizes of files alone, and read no shard.   workers: processes that read shards.
        on_bytes: called with the bytes of each shard that was read.
    """

    def __init__(self, *, quick: bool = False, workers: int = 1, on_bytes: Callable[[int], object] = lambda count: None) -> None:
        self._quick = quick
        self._workers = workers
        self._on_bytes = on_bytes
        self._files: dict[str, Path] = {}
        self._held_out = np.empty(0, np.uint64)

    def folders(self, folders: Iterable[str | Path]) -> Iterator[str]:
        """What is wrong with the splits of some folders: a sentence each, with file and member. None: all is well.

        Besides damage this finds two shards with one content, and samples of a split "train" that are in another split, which is then
        none to validate on.

        Raises:
            ValueError: a folder holds no split.
        """
        splits = [split for folder in folders for split in split_folders(folder)]
        for split in sorted(splits, key=lambda split: split.resolve().name == TRAIN):  # last, when the other samples are known
            yield from self._split(split)

    def _split(self, directory: Path) -> Iterator[str]:
        if not (directory / INDEX_NAME).exists():
            yield f"{directory} was never finished; the tools/make_shards.py command that began it goes on with it"
            return
        try:
            index = load_index(directory)
        except ValueError as error:
            yield str(error)
            return
        yield from _faults_of_index(directory, index)
        yield from _faults_of_tokenizer(directory, index)
        for shard in index.shards:
            if shard.sha256 in self._files:
                yield f"shard {directory / shard.name} has the content of {self._files[shard.sha256]}: one of the two is a copy"
            self._files.setdefault(shard.sha256, directory / shard.name)
        yield from filter(None, (fault_of_size(directory, shard) for shard in index.shards))
        if not self._quick:
            yield from self._contents(directory, index)

    def _contents(self, directory: Path, index: ShardIndex) -> Iterator[str]:
        held_out, documents, is_read = [], 0, True
        expected: int | None = index.eos_id
        with closing(map_in_order(look_at, _tasks(directory, index), workers=self._workers)) as reports:
            for task, report in reports:
                self._on_bytes(task.shard.bytes)
                yield from report.findings
                documents += report.documents
                is_read &= report.last_token is not None
                if expected is not None and report.first_token not in (expected, None):
                    yield f"shard {task.file} begins with token {report.first_token}, and what is before it ends with {expected}"
                expected = report.last_token
                leaks = np.flatnonzero(np.isin(report.hashes, self._held_out))
                if directory.resolve().name != TRAIN:
                    held_out.append(report.hashes)
                elif len(leaks):
                    yield f"shard {task.file} has {some_members(task.first + leaks)} in common with a split that is not for training"
        self._held_out = np.unique(np.concatenate([self._held_out, *held_out]))
        if expected not in (index.eos_id, None):
            yield f"the last shard of {directory} ends with token {expected}, not with the end of a document"
        if is_read and documents != index.documents:
            yield f"{directory} holds {documents:,} ends of documents where its index says {index.documents:,} documents"


def bytes_of_shards(folder: str | Path) -> int:
    """Of all shards that the indexes of a folder name, for a progress bar.

    Raises:
        ValueError: no split.
    """
    total = 0
    for split in split_folders(folder):
        with suppress(ValueError, OSError):  # what is wrong with an index is said when its split is looked at
            total += sum(shard.bytes for shard in load_index(split).shards)
    return total


def show_samples(folder: str | Path, count: int) -> Iterator[str]:
    """So many samples of each split of a folder as text, spread evenly over it, each under a line that says where it lies.

    Raises:
        ValueError: no split, or one without its tokenizer.   OSError: a shard cannot be read.
    """
    for directory in split_folders(folder):
        if not (directory / INDEX_NAME).exists():
            continue
        index = load_index(directory)
        tokenizer, tasks = _tokenizer_of(directory, index), list(_tasks(directory, index))
        for number in sorted({index.samples * part // count for part in range(min(count, index.samples))}):
            task = next(task for task in reversed(tasks) if task.first <= number)
            tokens = tokens_at(np.fromfile(task.file, np.uint8), task.layout, number - task.first, task.shard)
            yield f"--- {task.file}, {member_name(number)}: {len(tokens):,} tokens\n{tokenizer.decode(tokens.tolist())}"


def _tasks(directory: Path, index: ShardIndex) -> Iterator[ShardTask]:
    layout = Layout.of(sequence_length=index.settings.sequence_length, vocab_size=index.vocab_size)
    first = 0
    for shard in index.shards:
        yield ShardTask(
            file=directory / shard.name, shard=shard, first=first, layout=layout, vocab_size=index.vocab_size, eos_id=index.eos_id
        )
        first += shard.samples


def _faults_of_index(directory: Path, index: ShardIndex) -> Iterator[str]:
    """What is wrong with the numbers of an index by themselves, and with the names of the files beside it."""
    file, settings, shards = directory / INDEX_NAME, index.settings, index.shards
    layout = Layout.of(sequence_length=settings.sequence_length, vocab_size=index.vocab_size)
    full = settings.samples_per_shard
    must_be = {
        "dtype": layout.dtype.str,
        "first_offset": layout.first_offset,
        "stride": layout.stride,
        "samples": sum(shard.samples for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "fingerprint": fingerprint_of(settings, shards, vocab_size=index.vocab_size),
    }
    for name, wanted in must_be.items():
        if (found := getattr(index, name)) != wanted:
            yield f"{file} says {name} {found}, and by its other numbers it is {wanted}"
    for number, shard in enumerate(shards):
        is_last = number == len(shards) - 1
        samples = -(-shard.tokens // settings.sequence_length)
        whole = shard.samples == full and shard.tokens == full * settings.sequence_length
        if shard.name != shard_name(number) or not (whole or is_last) or shard.samples != samples or not 1 <= samples <= full:
            yield f"{file} says that shard {number} is {shard.name} with {shard.samples} samples of {shard.tokens} tokens, which cannot be"
    files = {file.name for file in directory.iterdir() if SHARD_NAME.fullmatch(file.name)}
    for extra in sorted(files - {shard.name for shard in shards}):
        yield f"shard {directory / extra} is in no index"


def _faults_of_tokenizer(directory: Path, index: ShardIndex) -> Iterator[str]:
    try:
        tokenizer = _tokenizer_of(directory, index)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    if (tokenizer.vocab_size, tokenizer.eos_id) != (index.vocab_size, index.eos_id):
        yield (
            f"{directory / INDEX_NAME} says vocabulary {index.vocab_size} and end of document {index.eos_id};"
            f" its tokenizer has {tokenizer.vocab_size} and {tokenizer.eos_id}"
        )


def _tokenizer_of(directory: Path, index: ShardIndex) -> Tokenizer:
    return load_tokenizer_of(index, "byte" if index.tokenizer == "byte" else directory / index.tokenizer, where=str(directory))

"""One shard looked at closely: each byte that is no token against what must stand there, the tokens against the vocabulary."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titans_scale.data.shards.index import Shard
from titans_scale.data.shards.tars import TAR_BLOCK, Layout, fault_of_size

MOST_OF_A_KIND = 3
"""Members of a shard that are named for one kind of damage; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard to look at."""

    file: Path
    shard: Shard
    first: int
    """Number of its first sample in the split."""
    layout: Layout
    vocab_size: int
    eos_id: int


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What was found in a shard."""

    findings: list[str]
    documents: int = 0
    """Ends of documents among its targets."""
    first_token: int | None = None
    last_token: int | None = None
    """None: it could not be read."""
    hashes: np.ndarray
    """(samples,) uint64, of the tokens of each full sample."""


def look_at(task: ShardTask) -> ShardReport:
    """Read a shard whole: its hash, each byte that is no token against what must stand there, the tokens' range."""
    no_hashes = np.empty(0, np.uint64)
    shard, layout = task.shard, task.layout
    if fault_of_size(task.file.parent, shard):
        return ShardReport(findings=[], hashes=no_hashes)  # said already
    try:
        data = np.fromfile(task.file, np.uint8)
    except OSError as error:
        return ShardReport(findings=[f"shard {task.file} cannot be read: {error.strerror}"], hashes=no_hashes)
    findings = []
    if (found := hashlib.sha256(data.data).hexdigest()) != shard.sha256:
        findings.append(f"shard {task.file} has SHA-256 {found[:16]} where its index says {shard.sha256[:16]}: its bytes were changed")
    samples = [tokens_at(data, layout, position, shard) for position in range(shard.samples)]
    if not samples or any(len(sample) < 2 for sample in samples):
        sentence = f"shard {task.file} does not hold the {shard.samples:,} samples of {shard.tokens:,} tokens that its index says"
        return ShardReport(findings=[*findings, sentence], hashes=no_hashes)
    stream = np.concatenate([samples[0][:1], *(sample[1:] for sample in samples)])
    findings += _differences(data, np.frombuffer(layout.tar(stream, first=task.first), np.uint8), task)
    if beyond := [number for number, sample in enumerate(samples, start=task.first) if sample.max() >= task.vocab_size]:
        highest = f"token ids up to {max(sample.max() for sample in samples):,} in {some_members(beyond)}"
        findings.append(f"shard {task.file} has {highest}; the vocabulary is {task.vocab_size:,}")
    full = [sample.tobytes() for sample in samples if len(sample) == layout.sequence_length + 1]
    return ShardReport(
        findings=findings,
        documents=int(np.count_nonzero(stream[1:] == task.eos_id)),
        first_token=int(stream[0]),
        last_token=int(stream[-1]),
        hashes=np.array([int.from_bytes(hashlib.blake2b(sample, digest_size=8).digest()) for sample in full], np.uint64),
    )


def tokens_at(data: np.ndarray, layout: Layout, position: int, shard: Shard) -> np.ndarray:
    """The tokens of a shard's sample, as many as there must be, fewer where the data ends before."""
    start = layout.first_offset + position * layout.stride
    count = min(layout.sequence_length, shard.tokens - position * layout.sequence_length) + 1
    held = data[start : start + count * layout.dtype.itemsize]
    return held[: len(held) // layout.dtype.itemsize * layout.dtype.itemsize].view(layout.dtype)


def _differences(data: np.ndarray, expected: np.ndarray, task: ShardTask) -> Iterator[str]:
    """What differs between a shard and a tar that is made of its tokens anew, by members and their parts."""
    length, layout = min(len(data), len(expected)), task.layout
    different = np.flatnonzero(data[:length] != expected[:length])
    members, at = np.divmod(different, layout.stride)
    tokens_end = layout.first_offset + (layout.sequence_length + 1) * layout.dtype.itemsize
    in_member = members < task.shard.samples
    parts = {
        "a tar header that is not what it must be": at < TAR_BLOCK,
        "a numpy header that is not what it must be": (at >= TAR_BLOCK) & (at < layout.first_offset),
        "a first token that is not the last of the sample before": (at >= layout.first_offset) & (at < tokens_end),
        "something other than zeros behind the tokens": at >= tokens_end,
    }
    for part, is_there in parts.items():
        if len(found := np.unique(members[is_there & in_member])):
            yield f"shard {task.file} has {part} in {some_members(task.first + found)}"
    if not in_member.all() or len(data) != len(expected):
        yield f"shard {task.file} does not end as a tar of {task.shard.samples:,} samples must"


def some_members(numbers: Sequence[int] | np.ndarray) -> str:
    """Members by their names, a few of them."""
    named = ", ".join(map(member_name, numbers[:MOST_OF_A_KIND]))
    return named if len(numbers) <= MOST_OF_A_KIND else f"{named} and {len(numbers) - MOST_OF_A_KIND:,} more"


def member_name(number: int) -> str:
    return f"{number:09d}.npy"

"""The index of a split: what its shards are, where in them each sample lies, and what they were made of."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_scale.data.files import atomic_write

FORMAT_VERSION = 2
INDEX_NAME = "index.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file."""

    name: str
    samples: int
    tokens: int
    """Tokens that are the target of one of its samples."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """All that decides the shards' bytes: the same settings give the same shards."""

    sequence_length: int
    samples_per_shard: int
    tokenizer_fingerprint: str
    source: str
    """SHA-256 over all documents as they were read, or "" where they came from a program and nothing is known of them."""
    text_key: str = "text"
    split_text_on: str | None = None
    validation_fraction: float = 0.0
    """Documents whose text's hash lies below it are those of the split "validation", the others of any other. 0: all are this split's."""
    on_bad_document: str = "raise"

    def __post_init__(self) -> None:
        if self.sequence_length < 1 or self.samples_per_shard < 1:
            raise ValueError(
                f"sequence_length is {self.sequence_length} and samples_per_shard is {self.samples_per_shard}; both must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class InputFiles:
    """The files that a split was made of, as they lay on the disk."""

    files: int
    bytes: int
    first: str
    """Name of the first."""
    stamp: str
    """SHA-256 over the names, sizes and times of change of all: the same stamp, the same content, and no need to read it."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The content of index.json.

    Sample i of a shard holds sequence_length + 1 tokens (the split's last sample: what is left, 2 at least), as little-endian
    integers of dtype, from byte first_offset + i * stride of the file on.
    """

    format_version: int
    settings: ShardSettings
    tokenizer: str
    """ "byte", or where the tokenizer's file or folder lies, from the index's folder."""
    dtype: str
    vocab_size: int
    eos_id: int
    first_offset: int
    stride: int
    samples: int
    tokens: int
    """Targets of all samples: every token of every document, and one end-of-document token for each."""
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents. Documents that were read as token ids have none."""
    skipped: int
    """Documents left out because they could not be read."""
    inputs: InputFiles | None
    """None: the documents came from a pipe or a program."""
    shards: tuple[Shard, ...]
    fingerprint: str
    """SHA-256 over all that decides the tokens: shards with one fingerprint hold the same samples."""

    def save(self, directory: Path) -> None:
        """Write index.json, whole or not at all."""
        with atomic_write(directory / INDEX_NAME) as file:
            file.write(json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n")


def fingerprint_of(settings: ShardSettings, shards: tuple[Shard, ...], *, vocab_size: int) -> str:
    """See ShardIndex.fingerprint."""
    parts = [FORMAT_VERSION, settings.sequence_length, settings.tokenizer_fingerprint, vocab_size, [shard.sha256 for shard in shards]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_index(directory: Path) -> ShardIndex:
    """Read index.json.

    Raises:
        ValueError: it is damaged, or of a version that this code does not know.   OSError: it cannot be read.
    """
    file = directory / INDEX_NAME
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        version = content["format_version"]
        if version == FORMAT_VERSION:
            shards = tuple(Shard(**shard) for shard in content.pop("shards"))
            settings = ShardSettings(**content.pop("settings"))
            inputs = content.pop("inputs")
            return ShardIndex(**content, shards=shards, settings=settings, inputs=inputs and InputFiles(**inputs))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); run tools/make_shards.py again with --overwrite") from error
    raise ValueError(
        f"{file} has format version {version!r}, this code reads version {FORMAT_VERSION}; run tools/make_shards.py again with --overwrite"
    )

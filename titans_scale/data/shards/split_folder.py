"""The folder of a split: what is in it already, beginning it, finishing it. Whatever cuts a writer off, no split is there by halves."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from titans_scale.data.shards.index import (
    FORMAT_VERSION,
    INDEX_NAME,
    InputFiles,
    Shard,
    ShardIndex,
    ShardSettings,
    fingerprint_of,
    load_index,
)
from titans_scale.data.shards.journal import JOURNAL_NAME
from titans_scale.data.shards.tars import SHARD_NAME, Layout, check_shards
from titans_scale.data.text.corpus import VALIDATION
from titans_scale.data.tokenizers.loading import load_tokenizer
from titans_scale.data.tokenizers.tokenizer import Tokenizer

OTHERWISE = "use --overwrite to replace them, or another --output"


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Keep every other writer out of a split's folder, until the end of the block or of this process.

    Raises:
        ValueError: another one is at it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.with_name(f".{directory.name}.lock"), timeout=0)  # it stays: to delete it would let two in
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"another process is writing shards into {directory}; wait for it, or use another --output") from error
    try:
        yield
    finally:
        lock.release()


def finished_split(directory: Path, settings: ShardSettings) -> ShardIndex | None:
    """The index of a split that is there with all its shards, made with these settings, of whatever source; None where there is no index.

    Raises:
        ValueError: there is a split, and it was made in another way (which), or lacks a shard.
    """
    if not (directory / INDEX_NAME).exists():
        return None
    index = load_index(directory)
    require_same(index.settings, settings, directory)
    check_shards(directory, index)
    return index


def require_same(theirs: ShardSettings, ours: ShardSettings, directory: Path) -> None:
    """See that shards that are there were made with our settings; their source is another matter.

    Raises:
        ValueError: they were not; says what differs.
    """
    for field in dataclasses.fields(ShardSettings):
        was, wanted = getattr(theirs, field.name), getattr(ours, field.name)
        if field.name != "source" and was != wanted:
            how = "another tokenizer" if field.name == "tokenizer_fingerprint" else f"{field.name} {was!r}, not {wanted!r}"
            raise ValueError(f"{directory} holds shards made with {how}; {OTHERWISE}")


def require_apart(directory: Path, *, validation_fraction: float) -> None:
    """See that no document can be in this split and in the validation split, or in another if this is that one.

    Raises:
        ValueError: the one beside it was parted from the rest by another fraction.
    """
    for other in splits_beside(directory):
        theirs = load_index(other).settings.validation_fraction
        if VALIDATION in (directory.name, other.name) and theirs != validation_fraction:
            raise ValueError(
                f"{other} was made with validation_fraction {theirs} and this split would be with {validation_fraction}, so documents"
                f" could be in both; give {theirs}, or delete {other}"
            )


def splits_beside(directory: Path) -> list[Path]:
    """The folders of the other finished splits of a dataset."""
    return [index.parent for index in sorted(directory.parent.glob(f"*/{INDEX_NAME}")) if index.parent != directory]


def load_tokenizer_of(index: ShardIndex, spec: str | Path, *, where: str) -> Tokenizer:
    """The tokenizer that shards were written with.

    Args:
        spec: "byte", or where its copy lies.   where: the shards' place, as told to the user.
    Raises:
        ValueError: its file is gone, or is another one.
    """
    tokenizer = load_tokenizer(spec if spec == "byte" else Path(spec).resolve())
    if tokenizer.fingerprint != index.settings.tokenizer_fingerprint:
        raise ValueError(f"{tokenizer.spec} is not the tokenizer that the shards in {where} were written with")
    return tokenizer


def begin(directory: Path, tokenizer: Tokenizer, *, overwrite: bool, keep: Collection[str] = ()) -> str:
    """Make a folder ready for a split: nothing in it but the files to keep and those that are not ours, the tokenizer beside it.

    The index goes first: whatever cuts this off, what is left is no split.

    Returns:
        where the tokenizer lies, for the index.
    Raises:
        ValueError: another split lies beside it with another tokenizer, and overwrite is false.
    """
    for other in splits_beside(directory):
        if not overwrite and load_index(other).settings.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"the split {other.name!r} beside {directory} was written with another tokenizer than {tokenizer.spec};"
                " use --overwrite to replace both, or another --output"
            )
    directory.mkdir(parents=True, exist_ok=True)
    for name in (INDEX_NAME, JOURNAL_NAME):
        if name not in keep:
            (directory / name).unlink(missing_ok=True)
    ours = re.compile(rf"{SHARD_NAME.pattern}|\.({SHARD_NAME.pattern}|{re.escape(INDEX_NAME)}|{re.escape(JOURNAL_NAME)})\.unfinished")
    for file in directory.iterdir():
        if file.name not in keep and ours.fullmatch(file.name):
            file.unlink()
    spec = tokenizer.save(directory.parent)
    return spec if spec == "byte" else f"../{spec}"


def finish(
    directory: Path,
    *,
    settings: ShardSettings,
    tokenizer: Tokenizer,
    tokenizer_at: str,
    layout: Layout,
    shards: Sequence[Shard],
    documents: int,
    text_bytes: int,
    skipped: int = 0,
    inputs: InputFiles | None = None,
) -> ShardIndex:
    """Write the index: from then on the split is there. The journal of its making goes.

    Raises:
        ValueError: there is nothing in it.
    """
    if not documents:
        raise ValueError(f"there is no document to write into {directory}")
    index = ShardIndex(
        format_version=FORMAT_VERSION,
        settings=settings,
        tokenizer=tokenizer_at,
        dtype=layout.dtype.str,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        first_offset=layout.first_offset,
        stride=layout.stride,
        samples=sum(shard.samples for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        documents=documents,
        text_bytes=text_bytes,
        skipped=skipped,
        inputs=inputs,
        shards=tuple(shards),
        fingerprint=fingerprint_of(settings, tuple(shards), vocab_size=tokenizer.vocab_size),
    )
    index.save(directory)
    (directory / JOURNAL_NAME).unlink(missing_ok=True)
    return index

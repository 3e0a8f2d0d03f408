"""A file from elsewhere: fetched whole in as many attempts as it takes, checked while it arrives, in its place only when it is right."""

import hashlib
import shlex
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlsplit

from titans_scale.data.files import atomic_write
from titans_scale.data.reading.faults import LostError, ReadError, ReadPolicy
from titans_scale.data.reading.transfer import Blocks, http_blocks, pipe_blocks
from titans_scale.data.shards.index import Shard

PIPE = "pipe:"


def location_of(path: str, folder: str) -> str:
    """Where a file lies, by its path in a folder: an URL's query, if any, goes behind it, and a command has it in the place of {}."""
    if folder.startswith(PIPE):
        return folder.replace("{}", shlex.quote(path))
    url = urlsplit(folder)
    return url._replace(path=f"{url.path.rstrip('/')}/{quote(path)}").geturl()


def without_query(location: str) -> str:
    """A location as it may be told to the user and kept: what follows a URL's ? may be a secret, and another one tomorrow."""
    return location if location.startswith(PIPE) else location.partition("?")[0].rstrip("/")


def fetch(location: str, target: Path, policy: ReadPolicy, *, shard: Shard | None = None, on_retry: Callable[[], None]) -> None:
    """Fetch a file. One process at a time may fetch to one target.

    Args:
        location: of http(s):// or pipe:.   shard: what it must be.   on_retry: called before each further attempt.
    Raises:
        LostError: all attempts failed.   OSError: the target cannot be written.
    """
    attempts = policy.retrying(on_retry)
    with atomic_write(target) as file:
        try:
            attempts(_attempt, location, _Arriving(file, shard), policy.timeout_seconds)
        except ReadError as error:
            count = attempts.statistics["attempt_number"]
            tried = f"{count} attempts" if count > 1 else "one attempt"
            raise LostError(f"{without_query(location)} cannot be fetched: {error} ({tried})") from error


def _attempt(location: str, arriving: "_Arriving", timeout: float) -> None:
    with closing(_blocks(location, start=arriving.size, timeout=timeout)) as blocks:
        for offset, block in blocks:
            arriving.put(offset, block)
    arriving.check()


def _blocks(location: str, *, start: int, timeout: float) -> Blocks:
    if location.startswith(PIPE):
        return pipe_blocks(location.removeprefix(PIPE), timeout=timeout)
    return http_blocks(location, start=start, timeout=timeout)


class _Arriving:
    """A file as it arrives, over as many attempts as it takes; a shard is checked against its index."""

    def __init__(self, file: BinaryIO, shard: Shard | None) -> None:
        self.size = 0
        self._file = file
        self._shard = shard
        self._hash = hashlib.sha256()

    def put(self, offset: int, block: bytes) -> None:
        """Add what follows; another offset than the size so far is one that begins anew."""
        if offset != self.size:
            self._begin_anew()
        self._file.write(block)
        self._hash.update(block)
        self.size += len(block)
        if self._shard is not None and self.size > self._shard.bytes:
            self._begin_anew()
            raise ReadError(f"it is longer than the {self._shard.bytes} bytes that its index says")

    def check(self) -> None:
        """What has arrived must be the shard.

        Raises:
            ReadError: it is not, and the next attempt begins anew.
        """
        if self._shard is None:
            return
        size, digest = self.size, self._hash.hexdigest()
        if (size, digest) != (self._shard.bytes, self._shard.sha256):
            self._begin_anew()
            raise ReadError(
                f"{size} bytes with SHA-256 {digest[:12]} arrived where its index says {self._shard.bytes} with {self._shard.sha256[:12]}"
            )

    def _begin_anew(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._hash = hashlib.sha256()
        self.size = 0

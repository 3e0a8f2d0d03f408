"""The shards of a split as files to read from: fetched, checked and opened when they are first needed."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from titans_scale.data.files import sha256_of_file
from titans_scale.data.reading.faults import LostError, ReadError, ReadPolicy
from titans_scale.data.reading.store import RemoteSplit
from titans_scale.data.shards.index import Shard

MAX_OPEN_FILES = 64
LOST_SECONDS = 600
"""How long a shard that is out of reach is left alone: with the waits between attempts, each of its samples would stop training."""


class ShardFiles:
    """Open files by the number of a shard. Each process opens its own: it may be forked, and pickled without them.

    Args:
        directory: where the shards lie, or will lie when they have been fetched.
        remote: what fetches those that are not there; None: nothing does.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard], policy: ReadPolicy, remote: RemoteSplit | None) -> None:
        self._directory = directory
        self._shards = shards
        self._policy = policy
        self._remote = remote
        self._open: OrderedDict[int, int] = OrderedDict()
        self._checked: set[int] = set()
        self._lost: dict[int, tuple[str, float]] = {}
        self._prefetching: threading.Thread | None = None
        self.retries = 0
        """Further attempts since the reader last set it to 0."""

    def path(self, shard: int) -> Path:
        """Where it lies on this machine."""
        return self._directory / self._shards[shard].name

    def descriptor(self, shard: int) -> int:
        """The open file of a shard.

        Raises:
            ReadError: it cannot be opened now.   LostError: it could not be fetched, or is not the one of the index.
            OSError: the cache cannot be written.
        """
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = self._opened(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def release(self, shard: int, *, damaged: bool) -> None:
        """Close a shard's file, so that it is opened anew; a damaged copy in the cache is deleted, unless this process has checked it."""
        if (file := self._open.pop(shard, None)) is not None:
            os.close(file)
        if damaged and self._remote is not None and shard not in self._checked:
            self.path(shard).unlink(missing_ok=True)

    def give_up(self, shard: int, reason: str) -> None:
        """Leave a shard alone for a while."""
        self._lost.setdefault(shard, (reason, time.monotonic() + LOST_SECONDS))

    def count_retry(self) -> None:
        """One more attempt."""
        self.retries += 1

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch what is missing of these in the background, in this order. Ignored while the call before is still being worked off."""
        if self._remote is None or (self._prefetching is not None and self._prefetching.is_alive()):
            return
        if missing := [shard for shard in shards if not self.path(shard).exists()]:
            self._prefetching = threading.Thread(target=self._fetch_all, args=(self._remote, missing), daemon=True)
            self._prefetching.start()

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _opened(self, shard: int) -> int:
        if shard in self._lost:
            reason, until = self._lost[shard]
            if time.monotonic() < until:
                raise LostError(reason)
            del self._lost[shard]
        self._fetch(shard)
        try:
            if self._policy.verify == "hash" and shard not in self._checked:
                self._check(shard)
            file = os.open(self.path(shard), os.O_RDONLY)
            if self._remote is not None:
                os.utime(file)  # the cache lets go of what was not opened for longest
        except OSError as error:
            raise ReadError(f"shard {self.path(shard)} cannot be opened: {error.strerror}") from error
        return file

    def _check(self, shard: int) -> None:
        """Compare with the SHA-256 of the index; a cached copy that differs is fetched anew."""
        found, wanted = sha256_of_file(self.path(shard)), self._shards[shard].sha256
        if found != wanted and self._remote is None:
            reason = f"shard {self.path(shard)} has SHA-256 {found[:12]} where its index says {wanted[:12]}; see tools/verify_shards.py"
            self._lost[shard] = reason, float("inf")
            raise LostError(reason)
        if found != wanted:
            self.release(shard, damaged=True)
            self._fetch(shard)
        self._checked.add(shard)

    def _fetch(self, shard: int) -> None:
        if self._remote is not None and not self.path(shard).exists():
            self._remote.fetch_shard(self._directory, self._shards[shard], on_retry=self.count_retry)
            self._checked.add(shard)

    def _fetch_all(self, remote: RemoteSplit, shards: Sequence[int]) -> None:
        for shard in shards:
            with suppress(ReadError, OSError):  # the read that needs the shard meets the same error, and says it
                remote.fetch_shard(self._directory, self._shards[shard], on_retry=self.count_retry, wait=False)

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        # a file descriptor and a thread mean nothing in another process, and what was counted here is told here
        return {**self.__dict__, "_open": OrderedDict(), "_prefetching": None, "retries": 0}

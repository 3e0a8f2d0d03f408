"""Shards that lie elsewhere: fetched whole into a cache of this machine, checked while they arrive, then read like any others.

    CACHE/remote/HASH OF LOCATION/SPLIT/index.json             fetched anew whenever the split is opened
    CACHE/remote/HASH OF LOCATION/SPLIT/FINGERPRINT/000000.tar

A file has its name there only when it is whole and has the SHA-256 of its index, so shards of one fingerprint never get old.
"""

import hashlib
import os
import posixpath
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from titans_scale.data.reading.faults import ReadPolicy
from titans_scale.data.reading.fetching import PIPE, fetch, location_of, without_query
from titans_scale.data.shards.index import INDEX_NAME, Shard, ShardIndex, load_index
from titans_scale.data.tokenizers.huggingface import CONFIG_NAME, MODEL_NAME

COMPRESSIONS = {b"": "", b"\x1f\x8b": ".gz", b"\x28\xb5": ".zst"}
"""By the first two bytes."""


def is_remote(path: str | Path) -> bool:
    """Whether a dataset's path is no folder of this machine."""
    return str(path).startswith((PIPE, "http://", "https://"))


def cache_folder(cache_dir: str | None) -> Path:
    """data.cache_dir, or its default: titans_scale in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "titans_scale"


class RemoteSplit:
    """A split behind http(s):// or pipe:, and the cache of its files. Picklable; safe to use from several processes and threads at once.

    Args:
        location: https://HOST/FOLDER, whose query, if any, goes behind each file's name; or pipe:COMMAND with {} for the name.
    Raises:
        ValueError: the location cannot work.
    """

    def __init__(self, location: str, split: str, policy: ReadPolicy) -> None:
        if location.startswith(PIPE) and "{}" not in location:
            raise ValueError(f"the path {location!r} has no {{}}, where the name of a file goes; for example pipe:cat /mnt/tokens/{{}}")
        if not location.startswith(PIPE) and "@" in urlsplit(location).netloc:
            raise ValueError(f"the path of {urlsplit(location).hostname} holds a user's name; use pipe:curl with --netrc or the like")
        self._location = location
        self._split = split
        self._policy = policy
        self._cache = cache_folder(policy.cache_dir) / "remote"
        self._folder = self._cache / _short_hash(without_query(location)) / split

    def address(self, name: str = "") -> str:
        """Where a file of the split lies, as told to the user."""
        return without_query(location_of(self._path(name), self._location))

    def fetch_index(self) -> tuple[Path, ShardIndex]:
        """The folder that the split's shards go to, and its index, fetched anew.

        Raises:
            ReadError: it cannot be fetched.   ValueError: it is damaged, or names files that are none of the split's.
        """
        self._fetch(INDEX_NAME, self._folder / INDEX_NAME, on_retry=_nothing)
        try:
            index = load_index(self._folder)
        except ValueError as error:
            raise ValueError(f"what {self.address(INDEX_NAME)} gave cannot be used: {error}") from error
        strange = [name for name in (index.fingerprint, *(shard.name for shard in index.shards)) if not re.fullmatch(r"\w[\w.-]*", name)]
        if strange:
            raise ValueError(f"{self.address(INDEX_NAME)} is damaged: it names the shard {strange[0]!r}")
        return self._folder / index.fingerprint[:16], index

    def fetch_shard(self, directory: Path, shard: Shard, *, on_retry: Callable[[], None], wait: bool = True) -> None:
        """See that a shard is in the cache, whole and with its hash. One process of the machine fetches it, the others wait for that one.

        Args:
            directory: from `fetch_index`.   on_retry: called before each further attempt.   wait: False: leave it to whoever fetches it.
        Raises:
            LostError: all attempts failed.   OSError: the cache cannot be written.
        """
        with suppress(Timeout):
            self._fetch(shard.name, directory / shard.name, shard=shard, on_retry=on_retry, wait=wait)

    def fetch_tokenizer(self, directory: Path, name: str) -> Path:
        """The tokenizer's file, by the name that the index has for it, fetched anew with what belongs to it.

        Raises:
            ReadError: it cannot be fetched.   ValueError: its name leads out of the dataset's folder.
        """
        folder, file = posixpath.split(name)
        for needed in (MODEL_NAME, CONFIG_NAME) if file == MODEL_NAME else (file,):
            self._fetch(posixpath.join(folder, needed), directory / needed, on_retry=_nothing)
        return directory / file

    def _path(self, name: str) -> str:
        path = posixpath.normpath(posixpath.join(self._split, name))
        if path.startswith(("../", "/")):
            raise ValueError(f"the index of {self._split!r} names the file {name!r}, which lies outside the dataset's folder")
        return path

    def _fetch(self, name: str, target: Path, *, shard: Shard | None = None, on_retry: Callable[[], None], wait: bool = True) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_fetcher(target, wait=wait):
            if shard is None or not target.exists():
                self._make_room(shard.bytes if shard else 0)
                fetch(location_of(self._path(name), self._location), target, self._policy, shard=shard, on_retry=on_retry)

    def _make_room(self, size: int) -> None:
        """Delete the shards that were not opened for longest. A process that has one open keeps it until it closes it."""
        if self._policy.cache_gib is None:
            return
        states = []
        for file in self._cache.glob("**/*.tar"):
            with suppress(FileNotFoundError):  # another process makes room too
                states.append((file.stat().st_mtime, file.stat().st_size, file))
        room = self._policy.cache_gib * 2**30 - sum(held for _, held, _ in states) - size
        for _, held, file in sorted(states):
            if room >= 0:
                return
            file.unlink(missing_ok=True)
            room += held


def fetch_file(location: str, folder: Path, policy: ReadPolicy) -> Path:
    """A file of others, kept in a folder once it has been fetched: where it is there, nobody asks whether it has changed meanwhile.

    Its name ends as that in the location, but for .gz or .zst, which its content decides: a command may have undone either.

    Args:
        location: https://HOST/FILE, or pipe: and a command that writes it.
    Raises:
        LostError: all attempts failed.   OSError: the folder cannot be written.
    """
    known = without_query(location)
    names = re.findall(r"[\w.-]*\w\.\w+", known)
    name = re.sub(r"\.(gz|zst)$", "", names[-1].replace(".tgz", ".tar")) if names else "file"
    target = folder / f"{_short_hash(known)}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    with _only_fetcher(target):
        for ending in COMPRESSIONS.values():
            if (there := target.with_name(target.name + ending)).exists():
                return there
        arrived = target.with_name(f".{target.name}.arrived")
        fetch(location, arrived, policy, on_retry=_nothing)
        with arrived.open("rb") as file:
            ending = COMPRESSIONS.get(file.read(2), "")
        return arrived.replace(target.with_name(target.name + ending))


def _only_fetcher(target: Path, *, wait: bool = True) -> FileLock:
    return FileLock(target.with_name(f".{target.name}.lock"), timeout=-1 if wait else 0)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _nothing() -> None:
    pass

"""Files that are whole or not there."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name when the block ends well; when it does not, nothing is left.

    Raises:
        OSError: as open and write do, with the file named (a full disk says no name by itself).
    """
    with unfinished_file(path) as file:
        yield file
    temporary_name(path).replace(path)


@contextmanager
def unfinished_file(path: str | Path) -> Iterator[BinaryIO]:
    """The first half of `atomic_write`: the file stays under its temporary name, for the caller to rename."""
    unfinished = temporary_name(path)
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def temporary_name(path: str | Path) -> Path:
    """Where a file is written before it is whole: hidden, in the same folder, found and replaced by the next attempt."""
    return Path(path).with_name(f".{Path(path).name}.unfinished")


def hash_key(content: bytes) -> int:
    """A number from 0 to 2**64 - 1 that the content decides alone and evenly: to select by, the same everywhere."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8])


def sha256_of_file(path: str | Path) -> str:
    """Of the content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

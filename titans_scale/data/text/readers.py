"""Raw documents out of files: streams that decompress and count, separators in text, members of tars, columns of Parquet."""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OnRead = Callable[[int], object]
BLOCK = 1 << 20
"""Bytes read at once."""
BOM = b"\xef\xbb\xbf"
BLANK = BOM + b" \t\r\n"
"""What may stand before the first character that counts."""
COMPRESSIONS = (".gz", ".zst")


class NoSuchColumn(ValueError):
    """A Parquet file lacks the column of the texts."""


def without_compression(path: str) -> tuple[str, str]:
    """A name without the ending of its compression, and that ending: (data.jsonl, .gz); the ending is empty for a plain file."""
    name, ending = os.path.splitext(path)
    if ending.lower() == ".tgz":
        return f"{name}.tar", ".gz"
    return (name, ending.lower()) if ending.lower() in COMPRESSIONS else (path, "")


@contextmanager
def open_stream(path: str, *, on_read: OnRead | None = None) -> Iterator[io.BufferedReader]:
    """A file decompressed, "-" being standard input; on_read gets the bytes that are read of the file itself.

    Raises:
        ValueError: a compressed file without a byte in it.   OSError: it cannot be opened.
    """
    with open(0 if path == "-" else path, "rb", buffering=0, closefd=path != "-") as file:
        stream: Any = io.BufferedReader(_Filled(file, on_read), BLOCK)
        compression = without_compression(path)[1]
        if compression and not stream.peek(1):
            raise ValueError(f"{path} is damaged or cut short: it is empty")
        if compression == ".gz":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), BLOCK)
        elif compression == ".zst":
            stream = io.BufferedReader(_Filled(_Zstandard(stream)), BLOCK)
        yield stream


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """What the formats' readers raise on a damaged file, as one sentence with the file's name.

    Raises:
        ValueError: the file is damaged or ends too early.   OSError: it cannot be read, with the file named.
    """
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} is damaged or cut short: {' '.join(str(error).split())}") from error
    except OSError as error:
        error.filename = error.filename or path
        raise


def skip_bom(stream: io.BufferedReader) -> None:
    """Leave out a byte order mark at the beginning."""
    if stream.peek(len(BOM)).startswith(BOM):
        stream.read(len(BOM))


def split(stream: io.BufferedReader, separator: bytes) -> Iterator[bytes]:
    """What stands between the separators, as bytes.split gives it of the whole; what is after the last one only if it is not empty."""
    rest = bytearray()
    while block := stream.read(BLOCK):
        unsearched = max(0, len(rest) - len(separator) + 1)
        rest += block
        if rest.find(separator, unsearched) >= 0:
            *whole, rest = rest.split(separator)
            yield from map(bytes, whole)
    if rest:
        yield bytes(rest)


def tar_members(stream: io.BufferedReader) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of a tar, in order.

    Raises:
        tarfile.TarError: the archive is damaged or does not end as it must.
    """
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
        for member in tar:
            if content := tar.extractfile(member) if member.isfile() else None:
                yield member.name, content.read()
            tar.members = []  # type: ignore[attr-defined]  # it would hold the header of every member so far


def parquet_texts(path: str, column: str, *, on_read: OnRead | None = None) -> Iterator[bytes]:
    """The texts of a column, row by row, a null as an empty one; of other columns nothing is read.

    Raises:
        NoSuchColumn: it is not there, or holds no text.   ValueError: a damaged file.
    """
    import pyarrow
    import pyarrow.parquet

    size = os.stat(path).st_size
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _require_text_column(file.schema_arrow, column, path)
            groups = file.metadata.num_row_groups
            for group in range(groups):
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[column]):
                    texts = batch.column(0).cast(pyarrow.large_binary())
                    yield from (text or b"" for text in texts.to_numpy(zero_copy_only=False).tolist())
                if on_read:
                    on_read(size * (group + 1) // groups - size * group // groups)
            if on_read and not groups:
                on_read(size)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or no Parquet file: {' '.join(str(error).split())}") from error


def _require_text_column(schema: Any, column: str, path: str) -> None:
    import pyarrow

    if column not in schema.names:
        raise NoSuchColumn(f"{path} has no column {column!r}; its columns are {', '.join(schema.names)}: name the one to read as text_key")
    kind = schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    text_types = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary, types.is_null)
    if not any(is_text(kind) for is_text in text_types):
        raise NoSuchColumn(f"column {column!r} of {path} holds {kind}, not text; name the one to read as text_key")


class _Filled(io.RawIOBase):
    """A stream whose reads fill the buffer up to the stream's end, also where a pipe gives less at a time."""

    def __init__(self, stream: io.RawIOBase, on_read: OnRead | None = None) -> None:
        self._stream = stream
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view, filled = memoryview(buffer), 0
        while filled < len(view) and (count := self._stream.readinto(view[filled:])):
            filled += count
        if self._on_read and filled:
            self._on_read(filled)
        return filled


class _Zstandard(io.RawIOBase):
    """Frames of Zstandard decompressed. The package's own reader takes a file that was cut short for whole."""

    def __init__(self, compressed: io.BufferedReader) -> None:
        self._compressed = compressed
        self._frame: Any = None
        self._given = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._given:
            given = self._next()
            if given is None:
                return 0
            self._given = memoryview(given)
        count = min(len(buffer), len(self._given))
        buffer[:count] = self._given[:count]
        self._given = self._given[count:]
        return count

    def _next(self) -> bytes | None:
        """Some more of the content, perhaps none; None at the end."""
        import zstandard

        block = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        block = block or self._compressed.read(1 << 16)  # small, as a block of zeros may be thousands of times as much
        if not block:
            if self._frame is None or self._frame.eof:
                return None
            raise EOFError("it ends within a Zstandard frame")
        if self._frame is None or self._frame.eof:
            self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            return self._frame.decompress(block)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error


class _Header(tarfile.TarInfo):
    """A tar's header; one that is damaged or missing is an error, where tarfile takes it for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the archive's end, said by the exception that this raises
            return super().frombuf(buf, encoding, errors)
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a member or the archive's end must be") from error

"""What the data tools read: text, JSON lines, Parquet and WebDataset tars, plain or compressed, from files, folders or standard input.

Reading and parsing are apart: `read_records` gives documents raw, as fast as the disk does, and `document_of` parses one, in any process.
"""

import glob
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from titans_scale.data.files import sha256_of_file
from titans_scale.data.text import readers

Format = Literal["auto", "text", "jsonl", "parquet", "webdataset"]
FORMATS: tuple[Format, ...] = ("auto", "text", "jsonl", "parquet", "webdataset")
STDIN = "-"
_FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_MEMBER_KINDS: dict[str, Literal["text", "json", "npy"]] = {".txt": "text", ".json": "json", ".npy": "npy"}


class Record(NamedTuple):
    """One document, still raw; cheap to hand to another process."""

    kind: Literal["text", "json", "npy"]
    """Of data: UTF-8 text, a JSON object, or an .npy file of token ids."""
    data: bytes
    file: str
    number: int
    """Line, row, member or text in the file, from 1."""
    unit: str = "document"
    """What the number counts, for messages."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file and how it is read."""

    path: str
    """"-" is standard input."""
    format: Format
    """auto stands for standard input alone: JSON lines if its first character is {, else text."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What to read and how. Equal inputs give the same documents in the same order, as long as the files stay as they are."""

    files: tuple[InputFile, ...]
    text_key: str = "text"
    """Of a JSON object or a Parquet column."""
    split_text_on: str | None = None
    """What parts the documents of a text file. None: a file is one document."""


def find_inputs(
    paths: Iterable[str | Path], *, format: Format = "auto", text_key: str = "text", split_text_on: str | None = None
) -> Inputs:
    """The files of some paths, each a file, a folder (all below it but hidden ones, sorted by path), a glob, or "-" for standard input.

    Args:
        format: of all files; auto: by each name, what has no known ending being text. A further .gz or .zst is a compressed file.
    Raises:
        ValueError: a path that matches nothing, a file that comes twice, an unknown format, a package that is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if split_text_on == "":
        raise ValueError("split_text_on is empty; give the text that parts two documents, or leave it out")
    found = [path for given in paths for path in _files_of(str(given))]
    seen: set[str] = set()
    for path in found:
        if (real := path if path == STDIN else os.path.realpath(path)) in seen:
            raise ValueError(f"{path} comes twice in the inputs; name it once")
        seen.add(real)
    files = tuple(input_file(path, format=format) for path in found)
    if not files:
        raise ValueError("there is no input; name files, folders, or - for standard input")
    return Inputs(files=files, text_key=text_key, split_text_on=split_text_on)


def input_file(path: str | Path, *, format: Format = "auto") -> InputFile:
    """A file with its format, by its name if that is "auto".

    Raises:
        ValueError: a package that reading it takes is not installed; Parquet from standard input.
    """
    name, compression = readers.without_compression(str(path))
    if format == "auto" and path != STDIN:
        format = _FORMAT_OF_SUFFIX.get(os.path.splitext(name)[1].lower(), "text")
    if format == "parquet" and (path == STDIN or compression):
        raise ValueError(f"{path} cannot be read as Parquet, which takes a file that is not compressed as a whole")
    for needed, package in ((format == "parquet", "pyarrow"), (compression == ".zst", "zstandard")):
        if needed and find_spec(package) is None:
            raise ValueError(f'reading {path} takes {package}, which is not installed: pip install "titans-scale[data]"')
    return InputFile(path=str(path), format=format)


def read_records(
    inputs: Inputs, *, on_read: Callable[[int], object] | None = None, on_skip: Callable[[str], object] | None = None
) -> Iterator[Record]:
    """The documents of the inputs in order, raw. Holds one document (of Parquet, one row group's texts) in memory.

    Args:
        on_read: called with the bytes read from disk, as they are there, now and then; all of them add up to `total_bytes`.
        on_skip: called with a sentence for each member of a tar that is no document.
    Raises:
        ValueError: a file that is damaged or cut short, or has no such column.   OSError: a file that cannot be opened or read.
    """
    for file in inputs.files:
        if file.format == "parquet":
            texts = readers.parquet_texts(file.path, inputs.text_key, on_read=on_read)
            for number, text in enumerate(texts, start=1):
                yield Record("text", text, file.path, number, "row")
            continue
        with readers.open_stream(file.path, on_read=on_read) as stream, readers.damage_named(file.path):
            yield from _records_of(file, stream, inputs, on_skip)


def document_of(record: Record, *, text_key: str = "text") -> str | np.ndarray:
    """A record parsed: its text, or the token ids of an .npy, shape (tokens,). A null is an empty text, half a surrogate pair is U+FFFD.

    Raises:
        ValueError: not UTF-8, no JSON object, no such key, not a string, not integers; names the place.
    """
    if record.kind == "npy":
        return _token_ids(record)
    try:
        text = record.data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{_place(record)} is not UTF-8 text: byte {error.start} is {record.data[error.start]:#04x}") from error
    return text if record.kind == "text" else _text_of_json(text, record, text_key)


def read_texts(inputs: Inputs, *, on_read: Callable[[int], object] | None = None) -> Iterator[str]:
    """The texts of the inputs in order, for who needs no other process.

    Raises:
        ValueError: as `read_records` and `document_of`, or a document that is token ids already.
    """
    for record in read_records(inputs, on_read=on_read):
        document = document_of(record, text_key=inputs.text_key)
        if not isinstance(document, str):
            raise ValueError(f"{_place(record)} is token ids, not text")
        yield document


def total_bytes(inputs: Inputs) -> int | None:
    """Of all files, as they are on disk; None where standard input is among them."""
    if any(file.path == STDIN for file in inputs.files):
        return None
    return sum(os.stat(file.path).st_size for file in inputs.files)


def inputs_fingerprint(inputs: Inputs) -> str:
    """SHA-256 of all that decides the documents, the files' contents among it and their folders not.

    Raises:
        ValueError: standard input, which can be read but once.
    """
    if total_bytes(inputs) is None:
        raise ValueError("standard input has no fingerprint")
    files = [(os.path.basename(file.path), file.format, sha256_of_file(file.path)) for file in inputs.files]
    return hashlib.sha256(json.dumps([files, inputs.text_key, inputs.split_text_on]).encode()).hexdigest()


def files_below(
    folder: Path, *, enter: Callable[[Path], bool] = lambda folder: True, on_error: Callable[[OSError], object] | None = None
) -> list[Path]:
    """All files of a folder and those in it, sorted by path; hidden ones and __pycache__ left out."""
    files: list[Path] = []
    for where, folders, names in os.walk(folder, onerror=on_error):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__" and enter(Path(where, name))]
        files += [file for name in names if not name.startswith(".") and (file := Path(where, name)).is_file()]
    return sorted(files, key=lambda file: os.fsencode(file.relative_to(folder)))


def separator(option: str) -> str:
    r"""A separator as typed in a shell: \n and \t stand for a newline and a tab."""
    return option.replace(r"\n", "\n").replace(r"\t", "\t")


def _files_of(path: str) -> Iterator[str]:
    if path == STDIN or os.path.isfile(path):
        yield path
    elif os.path.isdir(path):
        files = files_below(Path(path), on_error=_raise)
        if not files:
            raise ValueError(f"the folder {path} has no files in it")
        yield from map(str, files)
    elif matches := sorted(glob.glob(path, recursive=True), key=os.fsencode):
        for match in matches:
            if not os.path.isdir(match) or "**" not in path:  # ** matches the files in a folder as well as the folder
                yield from _files_of(match)
    elif os.path.lexists(path):
        yield path  # a named pipe, or what cannot be opened and then says why
    else:
        raise ValueError(f"no file matches {path}" if glob.has_magic(path) else f"{path} does not exist")


def _raise(error: OSError) -> None:
    raise error


def _records_of(file: InputFile, stream: io.BufferedReader, inputs: Inputs, on_skip: Callable[[str], object] | None) -> Iterator[Record]:
    path, format = file.path, file.format
    if format == "auto":
        format = "jsonl" if stream.peek().lstrip(readers.BLANK).startswith(b"{") else "text"
    if format == "webdataset":
        for number, (name, data) in enumerate(readers.tar_members(stream), start=1):
            if kind := _MEMBER_KINDS.get(os.path.splitext(name)[1].lower()):
                yield Record(kind, data.removeprefix(readers.BOM), path, number, f"member {name}, number")
            elif on_skip:
                on_skip(f"member {name}, number {number} of {path}, is no .txt, .json or .npy")
        return
    readers.skip_bom(stream)
    if format == "jsonl":
        for number, line in enumerate(stream, start=1):
            if not line.isspace():
                yield Record("json", line, path, number, "line")
    elif inputs.split_text_on is None:
        yield Record("text", stream.read(), path, 1, "")
    else:
        for number, text in enumerate(readers.split(stream, inputs.split_text_on.encode()), start=1):
            yield Record("text", text, path, number)


def _text_of_json(line: str, record: Record, text_key: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_place(record)} is not JSON: {error}") from error
    if not isinstance(value, dict) or text_key not in value:
        has = (
            f"its keys are {', '.join(value) or 'none'}: name the one to read as text_key" if isinstance(value, dict) else "it is no object"
        )
        raise ValueError(f'{_place(record)} is not a JSON object with a "{text_key}"; {has}')
    text = value[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f'the "{text_key}" of {_place(record)} is {type(text).__name__}, not a string')
    return without_surrogates(text) if "\\u" in line else text


def without_surrogates(text: str) -> str:
    """The text with each half of a surrogate pair, which UTF-8 cannot write, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _token_ids(record: Record) -> np.ndarray:
    try:
        ids = np.lib.format.read_array(io.BytesIO(record.data), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise ValueError(f"{_place(record)} is not an .npy file of token ids: {error}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{_place(record)} is an array of {ids.dtype}, shape {ids.shape}; token ids are integers in one dimension")
    return ids


def _place(record: Record) -> str:
    return f"{record.unit} {record.number} of {record.file}" if record.unit else record.file

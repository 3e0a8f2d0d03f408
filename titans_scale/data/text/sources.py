"""Where a corpus comes from: text files on this machine, read one document at a time."""

import dataclasses
import fnmatch
import hashlib
import io
import os
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titans_scale.data.text.inputs import InputFile, Inputs, Record, document_of, files_below, input_file, read_records, without_surrogates
from titans_scale.data.text.readers import NoSuchColumn

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
NOT_TEXT_TO_LEARN = frozenset({"site-packages", "dist-packages", "encodings"})
"""Not the library's own, and its character tables: a tenth of the bytes, and nothing in them to learn but the Unicode names."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and where it was read."""

    text: str
    source: str


class TextFiles:
    """The documents of some files under one folder; may be read again and again, and always comes in the same order.

    The order is that of a hash of each file's path: the first part of it is a fair sample of the whole. A plain text file is one document
    unless a separator parts it; of JSON lines, Parquet and tars, each line, row and member is one. What is not UTF-8 text is skipped and
    counted.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        root: Path,
        label: str,
        text_key: str = "text",
        split_text_on: str | None = None,
        unreadable_folders: int = 0,
    ) -> None:
        in_order = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file.relative_to(root))).digest())
        self._inputs = Inputs(files=tuple(map(input_file, in_order)), text_key=text_key, split_text_on=split_text_on)
        self._root = root
        self._label = label
        self._unreadable_folders = unreadable_folders
        self.skipped: Counter[str] = Counter()
        """What the last reading left out, and how often."""

    def __iter__(self) -> Iterator[Document]:
        self.skipped = Counter({"unreadable": self._unreadable_folders} if self._unreadable_folders else {})
        for file in self._inputs.files:
            try:
                yield from self._documents(file)
            except NoSuchColumn:
                raise
            except (OSError, ValueError):
                self.skipped["unreadable"] += 1

    def _documents(self, file: InputFile) -> Iterator[Document]:
        name = os.fsencode(Path(self._label) / Path(file.path).relative_to(self._root)).decode(errors="replace")
        for record in read_records(dataclasses.replace(self._inputs, files=(file,)), on_skip=self._skip_member):
            text = self._text(record)
            if text is None:
                self.skipped[f'lines without a "{self._inputs.text_key}"' if record.kind == "json" else "not text"] += 1
            elif not text.strip():
                self.skipped["empty"] += 1
            else:
                yield Document(text=text, source=f"{name}:{record.number}" if record.unit else name)

    def _text(self, record: Record) -> str | None:
        try:
            if record.kind == "text" and record.file.endswith(".py"):
                return _python_source(record.data)
            text = document_of(record, text_key=self._inputs.text_key)
        except (ValueError, SyntaxError, LookupError):  # the last two: a Python file that declares an encoding there is not
            return None
        return text if isinstance(text, str) and not (record.kind == "text" and "\0" in text) else None

    def _skip_member(self, _: str) -> None:
        self.skipped["members of tars that are no text"] += 1


def _python_source(data: bytes) -> str:
    """In the encoding that it declares, as Python reads it."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return without_surrogates(io.TextIOWrapper(io.BytesIO(data), encoding).read())


def standard_library(*, include_tests: bool = False) -> TextFiles:
    """The sources of Python's standard library, which every machine with Python has: about 11 MB, twice as much with its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = NOT_TEXT_TO_LEARN if include_tests else NOT_TEXT_TO_LEARN | TEST_FOLDERS
    return text_files(
        root, include=("*.py",), enter=lambda folder: folder.name not in left_out, label=f"python{sysconfig.get_python_version()}"
    )


def text_files(
    path: str | Path,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    enter: Callable[[Path], bool] = lambda folder: True,
    label: str | None = None,
    text_key: str = "text",
    split_text_on: str | None = None,
) -> TextFiles:
    """The text files of a folder and all folders in it, or one file. Hidden ones and __pycache__ are left out.

    Args:
        text_key, split_text_on: as of `find_inputs`.
        include, exclude: globs, held against a file's name and against its path in the folder.
        enter: whether to look into a folder.   label: what the documents' sources start with; None: the folder's name.
    Raises:
        ValueError: the path does not exist.
    """
    path = Path(path).absolute()
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder; give a text file, or a folder with text files in it")

    def chosen(file: Path) -> bool:
        names = (file.name, file.relative_to(path).as_posix())
        return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in include) and not any(
            fnmatch.fnmatchcase(name, glob) for name in names for glob in exclude
        )

    unreadable: list[OSError] = []
    root = path if path.is_dir() else path.parent
    return TextFiles(
        [path] if path.is_file() else [file for file in files_below(path, enter=enter, on_error=unreadable.append) if chosen(file)],
        root=root,
        label=label or root.name,
        text_key=text_key,
        split_text_on=split_text_on,
        unreadable_folders=len(unreadable),
    )

"""Where a corpus comes from: text files on this machine, read one document at a time."""

import fnmatch
import hashlib
import json
import os
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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

    The order is that of a hash of each file's path: the first part of it is a fair sample of the whole. A file is one document; of a
    .jsonl file, each line's "text". What is not UTF-8 text is skipped and counted.
    """

    def __init__(self, files: Sequence[Path], *, root: Path, label: str, unreadable_folders: int = 0) -> None:
        self._files = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file.relative_to(root))).digest())
        self._root = root
        self._label = label
        self._unreadable_folders = unreadable_folders
        self.skipped: Counter[str] = Counter()
        """What the last reading left out, and how often."""

    def __iter__(self) -> Iterator[Document]:
        self.skipped = Counter({"unreadable": self._unreadable_folders} if self._unreadable_folders else {})
        for file in self._files:
            name = os.fsencode(Path(self._label) / file.relative_to(self._root)).decode(errors="replace")
            read = self._lines if file.suffix == ".jsonl" else self._whole
            try:
                yield from (document for document in read(file, name) if self._has_text(document))
            except OSError:
                self.skipped["unreadable"] += 1
            except (UnicodeError, SyntaxError, LookupError):  # the last two: a Python file that declares an encoding there is not
                self.skipped["not text"] += 1

    def _whole(self, file: Path, name: str) -> Iterator[Document]:
        if file.suffix == ".py":
            with tokenize.open(file) as stream:
                text = _without_surrogates(stream.read())
        else:
            text = file.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            self.skipped["not text"] += 1
        else:
            yield Document(text=text, source=name)

    def _lines(self, file: Path, name: str) -> Iterator[Document]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = text_of_line(line)
                if text is not None:
                    yield Document(text=_without_surrogates(text), source=f"{name}:{number}")
                else:
                    self.skipped['lines without a "text"'] += 1

    def _has_text(self, document: Document) -> bool:
        if document.text.strip():
            return True
        self.skipped["empty"] += 1
        return False


def text_of_line(line: bytes) -> str | None:
    """The "text" of a line of a .jsonl file; None where the line is no JSON object with one."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError):
        return None
    return text if isinstance(text, str) else None


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
) -> TextFiles:
    """The text files of a folder and all folders in it, or one file. Hidden ones and __pycache__ are left out.

    Args:
        include, exclude: globs, held against a file's name and against its path in the folder.
        enter: whether to look into a folder.   label: what the documents' sources start with; None: the folder's name.
    Raises:
        ValueError: the path does not exist.
    """
    path = Path(path).absolute()
    if path.is_file():
        return TextFiles([path], root=path.parent, label=label or path.parent.name)
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder; give a text file, or a folder with text files in it")

    def chosen(file: Path) -> bool:
        names = (file.name, file.relative_to(path).as_posix())
        return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in include) and not any(
            fnmatch.fnmatchcase(name, glob) for name in names for glob in exclude
        )

    files: list[Path] = []
    unreadable: list[OSError] = []
    for where, folders, names in os.walk(path, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__" and enter(Path(where, name))]
        files += [file for name in names if not name.startswith(".") and (file := Path(where, name)).is_file() and chosen(file)]
    return TextFiles(files, root=path, label=label or path.name, unreadable_folders=len(unreadable))


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

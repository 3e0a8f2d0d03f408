"""The text to evaluate on."""

from collections.abc import Iterator
from pathlib import Path

from titans_scale.data import text_files
from titans_scale.data.text.inputs import find_inputs, read_texts


def read_documents(path: str | Path) -> Iterator[str]:
    """The documents of a file of any kind that `data.inputs` reads, or of all such files in a folder; blank ones are left out.

    Raises:
        ValueError: nothing there, or something in the file is no text.
    """
    if Path(path).is_dir():
        return (document.text for document in text_files(path))
    return (text for text in read_texts(find_inputs([path])) if text.strip())


def first_bytes(documents: Iterator[str], max_bytes: int | None) -> list[str]:
    """The first documents up to max_bytes UTF-8 bytes in all (None: all), the last one cut between two characters."""
    return list(documents) if max_bytes is None else list(_cut(documents, max_bytes))


def _cut(documents: Iterator[str], left: int) -> Iterator[str]:
    for document in documents:
        data = document.encode()
        if piece := data[:left].decode(errors="ignore"):
            yield piece
        left -= len(data)
        if left <= 0:
            return

"""The text to evaluate on."""

from collections.abc import Iterator
from pathlib import Path

from titans_scale.data import read_corpus, text_files


def read_documents(path: str | Path) -> Iterator[str]:
    """The documents of a corpus (.jsonl), of a text file, or of all text files in a folder.

    Raises:
        ValueError: nothing there, or a line of the corpus has no text.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return read_corpus(path)
    return (document.text for document in text_files(path))


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

"""A corpus: train.jsonl and validation.jsonl, one {"text": ..., "source": ...} a line, split so that no text is on both sides."""

import filecmp
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from titans_scale.data.files import hash_key, temporary_name, unfinished_file
from titans_scale.data.text.inputs import find_inputs, read_texts
from titans_scale.data.text.sources import Document

VALIDATION = "validation"
"""The split that is held out."""
TRAIN = "train"
SPLITS: tuple[str, str] = (TRAIN, VALIDATION)


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """What was written."""

    documents: dict[str, int]
    """Of each split."""
    text_bytes: dict[str, int]
    """UTF-8 bytes of text, of each split."""
    split_by: Literal["hash", "position"]
    """position: there was one document alone, and its last part became the validation split."""
    unchanged: bool
    """The files were there already, byte for byte."""


def write_corpus(
    documents: Iterable[Document],
    directory: str | Path,
    *,
    max_bytes: int | None = None,
    validation_fraction: float = 0.03,
    overwrite: bool = False,
) -> CorpusReport:
    """Write a corpus into a folder; the same documents give the same files.

    A document's side is decided by a hash of its text, so copies of one text are on one side. Both sides get a document at least: where
    the hash leaves one empty, the document nearest to it moves over; a corpus of one document is cut in two.

    Args:
        documents: read once, or twice where the hash leaves a side empty; must give the same each time.
        max_bytes: UTF-8 bytes of text in all; the last document is cut to fit. None: all there is.
        validation_fraction: share of the documents that is held out; of the one document, share of its text.
    Raises:
        ValueError: no text; a fraction or size that cannot be; another corpus in the folder and overwrite false.
    """
    directory = Path(directory)
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1, both left out")
    if max_bytes is not None and max_bytes < 2:
        raise ValueError(f"max_bytes is {max_bytes}; a corpus takes at least 2, one for each split")
    with ExitStack() as unfinished:
        for split in SPLITS:
            unfinished.callback(temporary_name(directory / f"{split}.jsonl").unlink, missing_ok=True)
        report = _write_both(lambda: _capped(documents, max_bytes), directory, validation_fraction)
        return _put_in_place(report, directory, overwrite=overwrite)


def corpus_file(file: str | Path) -> Path:
    """The path of a split's .jsonl file.

    Raises:
        ValueError: the file is missing.
    """
    if not Path(file).is_file():
        raise ValueError(f"{file} does not exist; make a corpus with tools/make_corpus.py --output {Path(file).parent}")
    return Path(file)


def read_corpus(file: str | Path) -> Iterator[str]:
    """The texts of a .jsonl file, in order.

    Raises:
        ValueError: the file is missing, or a line is no JSON object with a "text".
    """
    return read_texts(find_inputs([corpus_file(file)], format="jsonl"))


def _write_both(documents: Callable[[], Iterator[Document]], directory: Path, fraction: float) -> CorpusReport:
    threshold = int(fraction * 2**64)
    report, lowest, highest = _write_by_hash(documents(), directory, threshold)
    if lowest == highest:
        return _write_by_position(next(documents()), directory, fraction)
    if lowest >= threshold:
        report, _, _ = _write_by_hash(documents(), directory, lowest + 1)
    elif highest < threshold:
        report, _, _ = _write_by_hash(documents(), directory, highest)
    return report


def _write_by_hash(documents: Iterator[Document], directory: Path, threshold: int) -> tuple[CorpusReport, int, int]:
    """Also the lowest and the highest hash that came by; documents with a hash below the threshold are held out."""
    lowest, highest = 2**64, -1

    def sides() -> Iterator[tuple[str, Document]]:
        nonlocal lowest, highest
        for document in documents:
            key = hash_key(document.text.encode())
            lowest, highest = min(lowest, key), max(highest, key)
            yield "validation" if key < threshold else "train", document

    report = _write_sides(sides(), directory, split_by="hash")
    if highest < 0:
        raise ValueError("found no text to make a corpus of: every file was empty, unreadable or not UTF-8, or there was none")
    return report, lowest, highest


def _write_by_position(document: Document, directory: Path, fraction: float) -> CorpusReport:
    text = document.text
    if len(text) < 2:
        raise ValueError(f"the corpus is one document of {len(text)} character; it takes at least 2 to hold some text out")
    wanted = min(max(1, round(len(text) * (1 - fraction))), len(text) - 1)
    after_newline = text.rfind("\n", len(text) // 2, wanted) + 1
    middle = after_newline or wanted
    halves = (("train", text[:middle]), ("validation", text[middle:]))
    sides = ((split, Document(text=half, source=document.source)) for split, half in halves)
    return _write_sides(sides, directory, split_by="position")


def _write_sides(sides: Iterator[tuple[str, Document]], directory: Path, *, split_by: Literal["hash", "position"]) -> CorpusReport:
    documents, text_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        files = {split: stack.enter_context(unfinished_file(directory / f"{split}.jsonl")) for split in SPLITS}
        for split, document in sides:
            line = json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False)
            files[split].write(line.encode() + b"\n")
            documents[split] += 1
            text_bytes[split] += len(document.text.encode())
    return CorpusReport(documents=documents, text_bytes=text_bytes, split_by=split_by, unchanged=False)


def _put_in_place(report: CorpusReport, directory: Path, *, overwrite: bool) -> CorpusReport:
    final = {split: directory / f"{split}.jsonl" for split in SPLITS}
    there = [file for file in final.values() if file.exists()]
    if len(there) == 2 and all(filecmp.cmp(file, temporary_name(file), shallow=False) for file in there):
        return CorpusReport(documents=report.documents, text_bytes=report.text_bytes, split_by=report.split_by, unchanged=True)
    if final["train"].exists() and not overwrite:
        raise ValueError(f"{directory} holds another corpus already; use --overwrite to replace it, or another --output")
    # train.jsonl goes first and comes last: wherever this is cut off, no corpus is there rather than a mixed one
    final["train"].unlink(missing_ok=True)
    for split in reversed(SPLITS):
        temporary_name(final[split]).replace(final[split])
    return report


def _capped(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    left = max_bytes
    for document in documents:
        if left is None:
            yield document
            continue
        data = document.text.encode()
        if len(data) > left:
            text = data[:left].decode(errors="ignore")
            document = Document(text=text[: text.rfind("\n") + 1] or text, source=document.source)
        if document.text.strip():
            yield document
        left -= len(data)
        if left <= 0:
            return

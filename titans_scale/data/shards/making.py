"""Making a split of token shards: from documents in memory, or from files, over many processes, and on from where a run was cut off."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from titans_scale.data.processes import map_in_order
from titans_scale.data.shards.index import InputFiles, ShardIndex, ShardSettings
from titans_scale.data.shards.journal import JOURNAL_NAME, Journal, Position
from titans_scale.data.shards.split_folder import OTHERWISE, begin, finish, finished_split, only_writer, require_apart, require_same
from titans_scale.data.shards.tars import Layout, write_tars
from titans_scale.data.shards.tokenizing import Batch, RecordBatches, Tokenized, Tokenizing, token_arrays
from titans_scale.data.text.corpus import SPLITS, VALIDATION
from titans_scale.data.text.inputs import STDIN, Format, Inputs, find_inputs, read_records
from titans_scale.data.tokenizers.tokenizer import Tokenizer

BEGINNING = Position(records=0, source=hashlib.sha256().hexdigest(), tokens=0, documents=0, text_bytes=0, skipped=0)


class NoDocumentLeft(ValueError):
    """All documents are another split's."""


def write_shards(
    documents: Iterable[str],
    directory: str | Path,
    *,
    tokenizer: Tokenizer,
    sequence_length: int,
    samples_per_shard: int = 8192,
    source: str = "",
    overwrite: bool = False,
) -> ShardIndex:
    """Write a split of documents in memory: 000000.tar, 000001.tar, ..., then index.json, and the tokenizer beside the split's folder.

    Without an index.json there is no split: leftovers of a run that was cut off are deleted and written anew. Where the split is there
    already and was made from the same source with the same settings, nothing is done and `documents` is not touched.

    Args:
        directory: folder of the split, for example data/tokens/train.
        source: fingerprint of where the documents come from; "": unknown, and then never the same.
        overwrite: replace a split that is there.
    Raises:
        ValueError: no document; a length below 1; a split that is there, or beside it, and is unlike this.
    """
    directory = Path(directory)
    settings = ShardSettings(
        sequence_length=sequence_length,
        samples_per_shard=samples_per_shard,
        tokenizer_fingerprint=tokenizer.fingerprint,
        source=source,
    )
    if not overwrite and (index := finished_split(directory, settings)):
        _require_source(index, source, directory)
        return index
    tokenizer_at = begin(directory, tokenizer, overwrite=overwrite)
    layout = Layout.of(sequence_length=sequence_length, vocab_size=tokenizer.vocab_size)
    count = text_bytes = 0

    def counted() -> Iterator[str]:
        nonlocal count, text_bytes
        for document in documents:
            count += 1
            text_bytes += len(document.encode(errors="replace"))  # what cannot be encoded the tokenizer refuses, with a reason
            yield document

    stream = chain([_eos(tokenizer, layout)], token_arrays(counted(), tokenizer, dtype=layout.dtype))
    shards = list(write_tars(stream, directory, layout=layout, samples_per_shard=samples_per_shard))
    return finish(
        directory,
        settings=settings,
        tokenizer=tokenizer,
        tokenizer_at=tokenizer_at,
        layout=layout,
        shards=shards,
        documents=count,
        text_bytes=text_bytes,
    )


def make_split(
    inputs: Inputs,
    directory: str | Path,
    *,
    tokenizer: Tokenizer,
    sequence_length: int,
    samples_per_shard: int = 8192,
    validation_fraction: float = 0.0,
    on_bad_document: Literal["raise", "skip"] = "raise",
    workers: int = 1,
    overwrite: bool = False,
    on_read: Callable[[int], object] | None = None,
    on_tokens: Callable[[int], object] | None = None,
    on_left_out: Callable[[str], object] | None = None,
) -> ShardIndex:
    """Write a split of the documents in some files; as `write_shards`, and on from where an earlier call was cut off, by a kill as well.

    The result depends on the documents and the settings alone: not on the number of processes, nor on how often it was cut off.
    Documents without any text are left out.

    Args:
        directory: folder of the split; its name is the split's.
        validation_fraction: share of the documents, by a hash of their texts, that the split "validation" takes and any other leaves.
            0: all are this split's.
        on_bad_document: what to do with one that cannot be read. skip: leave it out and count it.
        workers: processes that tokenize; 1: this one does it.
        overwrite: begin anew, whatever is there.
        on_read: called with bytes read from the files.   on_tokens: with the number of tokens just made.
        on_left_out: with a sentence for each member of a tar that is no document.
    Raises:
        ValueError: an input that cannot be read, or is not what it was when the shards so far were made; no document; a length below 1;
            a split that is there, or beside it, and is unlike this; another process that writes it.
        ChildProcessError: a process that tokenizes was killed.
    """
    directory = Path(directory)
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be at least 0 and below 1")
    settings = ShardSettings(
        sequence_length=sequence_length,
        samples_per_shard=samples_per_shard,
        tokenizer_fingerprint=tokenizer.fingerprint,
        source="",  # known once all is read
        text_key=inputs.text_key,
        split_text_on=inputs.split_text_on,
        validation_fraction=validation_fraction,
        on_bad_document=on_bad_document,
    )
    files = stamp(inputs)  # before they are read: what changes later is seen the next time
    records = RecordBatches(read_records(inputs, on_read=on_read, on_skip=on_left_out))
    if not overwrite and (index := finished_split(directory, settings)):
        return _same_input(index, records, files, directory)
    require_apart(directory, validation_fraction=validation_fraction)
    with only_writer(directory):
        journal = None if overwrite else Journal.read(directory)
        if journal and journal.shards:
            require_same(journal.settings, settings, directory)
            tokenizer_at = begin(directory, tokenizer, overwrite=False, keep={JOURNAL_NAME, *(shard.name for shard in journal.shards)})
        else:
            tokenizer_at = begin(directory, tokenizer, overwrite=overwrite)
            journal = Journal(directory=directory, settings=settings)
        start, shards = journal.position or BEGINNING, list(journal.shards)
        _go_on_from(start, records, directory)
        layout = Layout.of(sequence_length=sequence_length, vocab_size=tokenizer.vocab_size)
        tokenizing = Tokenizing(tokenizer=tokenizer, dtype=layout.dtype, split=directory.name, settings=settings)
        full = samples_per_shard * sequence_length
        with contextlib.closing(map_in_order(tokenizing, records, workers=workers)) as batches:
            stream = _Stream(batches, start, first_token=len(shards) * full, eos=_eos(tokenizer, layout), on_tokens=on_tokens)
            for shard in write_tars(stream, directory, layout=layout, samples_per_shard=samples_per_shard, first_shard=len(shards)):
                shards.append(shard)
                if shard.tokens == full:  # one that is not is the last, but only as long as nothing is added to the input
                    journal.add(shard, stream.last)  # the next shard begins with this one's last token, which is of that batch
        if validation_fraction and records.read and not stream.end.documents:
            raise NoDocumentLeft(
                f"none of the {records.read} documents is left for the split {directory.name!r} with validation_fraction"
                f" {validation_fraction}; choose another, or 0 for no split {VALIDATION!r}"
            )
        return finish(
            directory,
            settings=dataclasses.replace(settings, source=records.source),
            tokenizer=tokenizer,
            tokenizer_at=tokenizer_at,
            layout=layout,
            shards=shards,
            documents=stream.end.documents,
            text_bytes=stream.end.text_bytes,
            skipped=stream.end.skipped,
            inputs=files,
        )


def plan_splits(
    paths: Sequence[str],
    *,
    corpus: Path | None,
    format: Format,
    text_key: str,
    split_text_on: str | None,
    split: str,
    validation_fraction: float,
) -> tuple[dict[str, Inputs], float]:
    """The inputs of each split, and the fraction of them for validation: 0 where the splits were parted before.

    Args:
        paths: as of `find_inputs`; none: the two files of a corpus.   corpus: its folder; None: data/corpus.
    Raises:
        ValueError: both of them, or neither is there; a split that cannot be a folder's name; standard input, which can be read but
            once, for two splits.
    """
    if not paths:
        files = {name: (corpus or Path("data/corpus")) / f"{name}.jsonl" for name in SPLITS}
        if not files[SPLITS[0]].exists():
            raise ValueError(f"{files[SPLITS[0]]} does not exist; make a corpus with tools/make_corpus.py, or name files to read")
        there = {name: find_inputs([file], text_key=text_key) for name, file in files.items() if file.exists()}
        return there, 0.0
    if corpus is not None:
        raise ValueError(f"--corpus {corpus} and other inputs cannot go together; give one of the two")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise ValueError(f"--split is {split!r}; use letters, digits, - and _ only, as a folder is named after it")
    inputs = find_inputs(paths, format=format, text_key=text_key, split_text_on=split_text_on)
    if validation_fraction == 0:
        return {split: inputs}, 0.0
    if split == VALIDATION or any(file.path == STDIN for file in inputs.files):
        why = "all documents are for validation" if split == VALIDATION else "standard input can be read but once, for one split"
        raise ValueError(f"--validation_fraction is {validation_fraction} and {why}; give --validation_fraction 0")
    # validation first, as the smaller: that no document is left for it is said before hours of work
    return {VALIDATION: inputs, split: inputs}, validation_fraction


class _Stream:
    """The stream of tokens from a position in the input on, less those before `first_token`."""

    def __init__(
        self,
        batches: Iterable[tuple[Batch, Tokenized]],
        start: Position,
        *,
        first_token: int,
        eos: np.ndarray,
        on_tokens: Callable[[int], object] | None,
    ) -> None:
        self.last = start
        """Where the batch begins that was given out last."""
        self.end = start
        """What all that was given out comes to; its records and their hash are those of `last`."""
        self._batches = batches
        self._left_out = first_token - start.tokens
        self._eos = eos
        self._on_tokens = on_tokens

    def __iter__(self) -> Iterator[np.ndarray]:
        if self.end.tokens == 0:
            self.end = dataclasses.replace(self.end, tokens=1)
            yield self._eos
        for batch, made in self._batches:
            self.last = dataclasses.replace(self.end, records=batch.before, source=batch.source)
            self.end = dataclasses.replace(
                self.last,
                tokens=self.last.tokens + len(made.tokens),
                documents=self.last.documents + made.documents,
                text_bytes=self.last.text_bytes + made.text_bytes,
                skipped=self.last.skipped + made.skipped,
            )
            if self._on_tokens:
                self._on_tokens(len(made.tokens))
            left_out, self._left_out = self._left_out, max(0, self._left_out - len(made.tokens))
            yield made.tokens[left_out:]


def _eos(tokenizer: Tokenizer, layout: Layout) -> np.ndarray:
    return np.array([tokenizer.eos_id], layout.dtype)


def stamp(inputs: Inputs) -> InputFiles | None:
    """What tells without reading that files are as they were; None for standard input."""
    paths = [file.path for file in inputs.files]
    if STDIN in paths:
        return None
    stats = [os.stat(path) for path in paths]
    names = [os.path.basename(path) for path in paths]
    marks = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)]
    digest = hashlib.sha256(json.dumps(marks).encode()).hexdigest()
    return InputFiles(files=len(paths), bytes=sum(stat.st_size for stat in stats), first=names[0], stamp=digest)


def _require_source(index: ShardIndex, source: str, directory: Path) -> None:
    if source == "" or index.settings.source != source:  # nothing is known of the source "", so it may be another each time
        raise ValueError(f"{directory} holds shards made of another corpus; {OTHERWISE}")


def _same_input(index: ShardIndex, records: RecordBatches, files: InputFiles | None, directory: Path) -> ShardIndex:
    """The index of a finished split, if the input is what it was made of; read only where the files' stamp does not tell."""
    if (directory / JOURNAL_NAME).exists():  # a kill came between the index and the end
        with only_writer(directory):
            (directory / JOURNAL_NAME).unlink(missing_ok=True)
    if files is None or files != index.inputs:
        records.skip()
        _require_source(index, records.source, directory)
        index = dataclasses.replace(index, inputs=files)
        with contextlib.suppress(OSError):  # a folder that may only be read: the next time takes as long
            index.save(directory)
    return index


def _go_on_from(start: Position, records: RecordBatches, directory: Path) -> None:
    records.skip(start.records)
    if (records.read, records.source) != (start.records, start.source):
        raise ValueError(
            f"the input is not what the finished shards in {directory} were made of: its first {start.records:,} documents differ;"
            f" {OTHERWISE}"
        )

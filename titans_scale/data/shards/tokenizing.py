"""Documents into tokens: raw records in batches, and what becomes of a batch."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from titans_scale.data.files import hash_key
from titans_scale.data.shards.index import ShardSettings
from titans_scale.data.text.corpus import VALIDATION
from titans_scale.data.text.inputs import Record, document_of
from titans_scale.data.tokenizers.tokenizer import Tokenizer

ENCODE_CHARACTERS = 1 << 20
"""Text that is encoded at once: a tokenizer's own result takes many times the memory of the tokens that are kept of it."""
BATCH_BYTES = 1 << 20
"""Raw documents that are handed to a process at once."""


class Batch(NamedTuple):
    """Some records, and where in the input they begin."""

    records: list[Record]
    before: int
    """Records before these."""
    source: str
    """SHA-256 over those."""


class RecordBatches:
    """Records in batches, and a hash over all that were read. The hash does not depend on where a batch ends."""

    def __init__(self, records: Iterator[Record]) -> None:
        self._records = records
        self._hash = hashlib.sha256()
        self.read = 0

    @property
    def source(self) -> str:
        """SHA-256 over the records read so far."""
        return self._hash.hexdigest()

    def skip(self, records: int | None = None) -> None:
        """Read on over so many records, or to the end."""
        left = records
        while (left is None or left > 0) and (taken := self._take(left)):
            left = left and left - len(taken)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            before, source = self.read, self.source
            if not (records := self._take(None)):
                return
            yield Batch(records, before, source)

    def _take(self, most: int | None) -> list[Record]:
        taken, size = [], 0
        hashed = []
        for record in self._records:
            taken.append(record)
            size += len(record.data)
            hashed += [f"{record.kind}{len(record.data)}:".encode(), record.data]
            if size >= BATCH_BYTES or len(taken) == most:
                break
        self._hash.update(b"".join(hashed))
        self.read += len(taken)
        return taken


class Tokenized(NamedTuple):
    """What became of a batch."""

    tokens: np.ndarray
    """(n,), each document with an eos behind it."""
    documents: int
    text_bytes: int
    skipped: int
    """Records that could not be read."""


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """How a split's records become tokens. Picklable: each process is given one."""

    tokenizer: Tokenizer
    dtype: np.dtype
    split: str
    settings: ShardSettings

    def __call__(self, batch: Batch) -> Tokenized:
        """The tokens of those records that are this split's. A document without any text is none.

        Raises:
            ValueError: a record cannot be read, and on_bad_document is "raise".
        """
        documents: list[str | np.ndarray] = []
        text_bytes = skipped = 0
        for record in batch.records:
            try:
                document, content = self._read(record)
            except ValueError:
                if self.settings.on_bad_document == "raise":
                    raise
                skipped += self._is_ours(record.data)  # by the raw bytes, as there is no text: each counts in one split alone
                continue
            if content and self._is_ours(content):
                documents.append(document)
                text_bytes += len(content) if isinstance(document, str) else 0
        arrays = [np.empty(0, self.dtype), *token_arrays(documents, self.tokenizer, dtype=self.dtype)]
        tokens = np.concatenate(arrays)
        return Tokenized(tokens, int(np.count_nonzero(tokens == self.tokenizer.eos_id)), text_bytes, skipped)

    def _read(self, record: Record) -> tuple[str | np.ndarray, bytes]:
        """A document and its bytes; none where there is nothing to learn in it."""
        document = document_of(record, text_key=self.settings.text_key)
        if isinstance(document, str):
            return document, b"" if not document or document.isspace() else document.encode()
        if len(document) and not 0 <= document.min() <= document.max() < self.tokenizer.vocab_size:
            raise ValueError(
                f"{record.unit} {record.number} of {record.file} holds token ids from {document.min()} to {document.max()};"
                f" those of the tokenizer {self.tokenizer.spec} are 0 to {self.tokenizer.vocab_size - 1}"
            )
        inner = np.flatnonzero(document != self.tokenizer.eos_id)  # eos at either end marks what is marked here anyway
        document = document[inner[0] : inner[-1] + 1] if len(inner) else document[:0]
        return document, document.astype("<i8").tobytes()

    def _is_ours(self, content: bytes) -> bool:
        fraction = self.settings.validation_fraction
        if fraction == 0:
            return True
        return (hash_key(content) < fraction * 2**64) == (self.split == VALIDATION)


def token_arrays(documents: Iterable[str | np.ndarray], tokenizer: Tokenizer, *, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Documents as arrays of tokens, an eos behind each document; an array may begin and end anywhere in them.

    Args:
        documents: texts, or token ids (n,).
    Raises:
        ValueError: a text holds a lone surrogate.
    """
    eos = np.array([tokenizer.eos_id], dtype)
    pieces: list[str] = []
    ends: list[bool] = []
    characters = 0

    def encoded() -> np.ndarray:
        nonlocal characters
        arrays = []
        for tokens, is_end in zip(tokenizer.encode_pieces(pieces), ends, strict=True):
            arrays += [tokens, eos] if is_end else [tokens]
        pieces.clear()
        ends.clear()
        characters = 0
        return np.concatenate(arrays, dtype=dtype, casting="unsafe")

    for document in documents:
        if not isinstance(document, str):
            if pieces:
                yield encoded()
            yield np.concatenate([document, eos], dtype=dtype, casting="unsafe")
            continue
        for piece in tokenizer.pieces(document):
            if characters >= ENCODE_CHARACTERS:
                yield encoded()
            pieces.append(piece)
            ends.append(False)
            characters += len(piece)
        ends[-1] = True
    if pieces:
        yield encoded()

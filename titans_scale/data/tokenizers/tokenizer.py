"""Text to token ids and back: what a tokenizer is, and the two simplest, bytes and a SentencePiece model.

A tokenizer trained here is lossless: decode(encode(text)) == text for any text that UTF-8 can write. One made elsewhere may not be.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titans_scale.data.files import atomic_write

PIECE_CHARACTERS = 1 << 16
"""Longer texts are encoded in pieces of about this size: SentencePiece slows to half and takes 100 bytes a character on longer ones."""
SPACE_MARK = "\u2581"
"""SentencePiece writes a blank as this character, so it cannot tell the character itself from a blank."""


class Tokenizer(ABC):
    """What data and evaluation need of a tokenizer."""

    spec: str
    """"byte", or the path of a model: what `load_tokenizer` takes."""
    vocab_size: int
    eos_id: int
    """Stands before the first document and after every one. Never the result of encoding a text."""
    fingerprint: str
    """SHA-256 of all that decides the ids, in hexadecimal."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any end-of-document token.

        Raises:
            ValueError: the text holds a lone surrogate, which no file in UTF-8 can.
        """
        return [token for piece in self.encode_pieces(list(self.pieces(text))) for token in piece.tolist()]

    def pieces(self, text: str) -> Iterator[str]:
        """The text cut up; the tokens of the whole are those of its pieces, end to end."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of a text is the lone surrogate {text[error.start]!a}, which UTF-8 cannot write; replace it"
            ) from error
        yield from self.cut(text)

    def cut(self, text: str) -> Iterator[str]:
        """`pieces` of a text that UTF-8 can write."""
        return cut(text)

    @abstractmethod
    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each piece that `pieces` gave, as a read-only int array each."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. End-of-document is nothing; bytes that are no UTF-8 and ids past the vocabulary are U+FFFD."""
        text, run = [], []
        for token in map(int, ids):
            if 0 <= token < self.vocab_size:
                run.append(token)
            else:
                text += [self.decode_known(run), "\ufffd"]
                run = []
        return "".join([*text, self.decode_known(run)])

    @abstractmethod
    def decode_known(self, ids: list[int]) -> str:
        """`decode` of ids that are all in the vocabulary."""

    @abstractmethod
    def save(self, folder: str | Path) -> str:
        """Copy the model into a folder, each file whole or not at all; gives the copy's spec from there ("byte" has no file)."""


class ByteTokenizer(Tokenizer):
    """256 bytes and an end-of-document token. Needs no training and no file."""

    spec = "byte"
    vocab_size = 257
    eos_id = 256
    fingerprint = hashlib.sha256(b"titans_scale byte tokenizer: ids 0-255 are bytes, 256 is end of document").hexdigest()

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(piece.encode(), dtype=np.uint8) for piece in pieces]

    def decode_known(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token != self.eos_id).decode(errors="replace")

    def save(self, folder: str | Path) -> str:
        return self.spec


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file.

    Raises:
        ValueError: the file is missing, is no SentencePiece model, or has no end-of-sentence piece.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self.spec = str(path)
        self.model = Path(path).read_bytes()
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model; make one with tools/train_tokenizer.py") from error
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        self.fingerprint = hashlib.sha256(self.model).hexdigest()
        if self.eos_id < 0:
            raise ValueError(f"{path} has no end-of-sentence piece, which must part the documents; train it with an eos_id")
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        first = self._processor.encode("a")[:1]
        adds_a_blank = bool(first) and self._processor.id_to_piece(first[0]).startswith(SPACE_MARK)
        self._can_be_cut = not adds_a_blank and all(map(self._processor.is_byte, self._mark_ids))

    def cut(self, text: str) -> Iterator[str]:
        """As of any tokenizer, and each run of U+2581 by itself. A model that puts a blank before every text gets it in one piece."""
        if not self._can_be_cut:
            yield text
            return
        for piece in super().cut(text):
            yield from (part for part in re.split(f"({SPACE_MARK}+)", piece) if part) if SPACE_MARK in piece else (piece,)

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        # one thread: left to itself it takes all cores, in every process that tokenizes
        tokens = self._processor.encode(list(pieces), out_type="numpy", num_threads=1) if pieces else []
        for position, piece in enumerate(pieces):
            if self._can_be_cut and piece.startswith(SPACE_MARK):
                tokens[position] = np.array(self._mark_ids * len(piece), dtype=np.int32)
        return tokens

    def decode_known(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def save(self, folder: str | Path) -> str:
        write_if_other(Path(folder) / "tokenizer.model", self.model)
        return "tokenizer.model"


def write_if_other(path: Path, content: bytes) -> None:
    """Write a file unless it is there with this content already."""
    if not path.is_file() or path.read_bytes() != content:
        with atomic_write(path) as file:
            file.write(content)


def cut(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """The text in pieces of at most `size` characters, cut after a newline where there is one. An empty text is one empty piece."""
    start = 0
    while len(text) - start > size:
        newline = text.rfind("\n", start, start + size)
        end = newline + 1 if newline >= 0 else start + size
        yield text[start:end]
        start = end
    yield text[start:]

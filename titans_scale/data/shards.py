"""Writer of token shards: documents in, WebDataset tars and an index out.

The documents become one stream of tokens, [eos] document [eos] document [eos] ... Sample i holds tokens i*L to (i+1)*L of it, both
included: L inputs and the L targets one further on. So every token of the stream but the first is a target exactly once.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from titans_scale.data.files import atomic_write, sha256_of_file
from titans_scale.data.index import FORMAT_VERSION, INDEX_NAME, Shard, ShardIndex, ShardSettings, fingerprint_of, load_index
from titans_scale.data.tokenizer import SentencePieceTokenizer, Tokenizer

TOKENIZER_NAME = "tokenizer.model"
TAR_BLOCK = 512
ENCODE_CHARACTERS = 1 << 20
"""Text that is encoded at once, shared out over the threads."""


def write_shards(
    documents: Iterable[str],
    directory: str | Path,
    *,
    tokenizer: Tokenizer,
    sequence_length: int,
    samples_per_shard: int = 8192,
    source: str = "",
    overwrite: bool = False,
    num_threads: int = 1,
    on_tokens: Callable[[int], object] | None = None,
) -> ShardIndex:
    """Write a split: 000000.tar, 000001.tar, ..., then index.json, and the tokenizer's model beside the split's folder.

    Without an index.json there is no split: leftovers of a run that was cut off are deleted and written anew. Where the split is there
    already and was made from the same source with the same settings, nothing is done and `documents` is not touched.

    Args:
        directory: folder of the split, for example data/tokens/train.
        source: fingerprint of where the documents come from; "": unknown, and then never the same.
        overwrite: replace a split that is there.
        on_tokens: called with the number of tokens just made, for a progress bar.
    Raises:
        ValueError: no document; a length below 1; a finished split, or a tokenizer of one, that is unlike this.
    """
    directory = Path(directory)
    settings = ShardSettings(
        sequence_length=sequence_length,
        samples_per_shard=samples_per_shard,
        tokenizer_fingerprint=tokenizer.fingerprint,
        source=source,
    )
    if sequence_length < 1 or samples_per_shard < 1:
        raise ValueError(f"sequence_length is {sequence_length} and samples_per_shard is {samples_per_shard}; both must be at least 1")
    if not overwrite and (index := finished_split(directory, settings)):
        return index
    _copy_tokenizer(tokenizer, directory, overwrite=overwrite)
    _clear(directory)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    shards: list[Shard] = []
    stream = _TokenArrays(documents, tokenizer, num_threads=num_threads)
    arrays = _reporting(stream, on_tokens) if on_tokens else stream
    for tokens in _blocks(arrays, size=samples_per_shard * sequence_length, dtype=dtype):
        name = f"{len(shards):06d}.tar"
        shards.append(_write_shard(directory / name, tokens, first=len(shards) * samples_per_shard, sequence_length=sequence_length))
    if stream.documents == 0:
        raise ValueError(f"there is no document to write into {directory}")
    full = len(_npy(np.zeros(sequence_length + 1, dtype)))
    header = full - (sequence_length + 1) * dtype.itemsize
    index = ShardIndex(
        format_version=FORMAT_VERSION,
        settings=settings,
        tokenizer=f"../{TOKENIZER_NAME}" if isinstance(tokenizer, SentencePieceTokenizer) else tokenizer.spec,
        dtype=dtype.str,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        first_offset=TAR_BLOCK + header,
        stride=TAR_BLOCK + -(-full // TAR_BLOCK) * TAR_BLOCK,
        samples=sum(shard.samples for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        documents=stream.documents,
        text_bytes=stream.text_bytes,
        shards=tuple(shards),
        fingerprint=fingerprint_of(settings, tuple(shards), vocab_size=tokenizer.vocab_size),
    )
    index.save(directory)
    return index


def finished_split(directory: str | Path, settings: ShardSettings) -> ShardIndex | None:
    """The index of a split that is there, made with these settings and with all its shards; None where there is no index.

    Raises:
        ValueError: there is a split, and it was made in another way (which), or lacks a shard.
    """
    directory = Path(directory)
    if not (directory / INDEX_NAME).exists():
        return None
    index = load_index(directory)
    for name, ours in vars(settings).items():
        theirs = getattr(index.settings, name)
        if ours != theirs or ours == "":  # nothing is known of the source "", so it may be another each time
            how = {"source": "of another corpus", "tokenizer_fingerprint": "with another tokenizer"}
            what = how.get(name, f"with {name} {theirs}, not {ours}")
            raise ValueError(f"{directory} holds shards made {what}; use --overwrite to replace them, or another --output")
    check_shards(directory, index)
    return index


def check_shards(directory: Path, index: ShardIndex) -> None:
    """See that every shard is there in its full size.

    Raises:
        ValueError: one is missing or has another size than the index says.
    """
    for shard in index.shards:
        file = directory / shard.name
        if not file.is_file():
            raise ValueError(f"shard {file} is missing; run tools/make_shards.py again with --overwrite")
        if (size := file.stat().st_size) != shard.bytes:
            raise ValueError(
                f"shard {file} has {size} bytes where its index says {shard.bytes}, so it was cut short or changed;"
                " run tools/make_shards.py again with --overwrite"
            )


def _reporting(arrays: Iterable[np.ndarray], on_tokens: Callable[[int], object]) -> Iterator[np.ndarray]:
    for array in arrays:
        on_tokens(len(array))
        yield array


class _TokenArrays:
    """The stream of tokens in arrays of any length, and a count of what went into it."""

    def __init__(self, documents: Iterable[str], tokenizer: Tokenizer, *, num_threads: int) -> None:
        self._documents = documents
        self._tokenizer = tokenizer
        self._num_threads = num_threads
        self._eos = np.array([tokenizer.eos_id])
        self.documents = 0
        self.text_bytes = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self._eos
        pieces, documents_end, characters = [], [], 0
        for piece, ends_document in self._pieces():
            pieces.append(piece)
            documents_end.append(ends_document)
            characters += len(piece)
            if characters >= ENCODE_CHARACTERS:
                yield self._encoded(pieces, documents_end)
                pieces, documents_end, characters = [], [], 0
        if pieces:
            yield self._encoded(pieces, documents_end)

    def _pieces(self) -> Iterator[tuple[str, bool]]:
        """Pieces of the documents, and whether a document ends with it."""
        for document in self._documents:
            self.documents += 1
            self.text_bytes += len(document.encode(errors="replace"))  # what cannot be encoded is refused by the tokenizer, with a reason
            before, *others = self._tokenizer.pieces(document)
            for piece in others:
                yield before, False
                before = piece
            yield before, True

    def _encoded(self, pieces: list[str], documents_end: list[bool]) -> np.ndarray:
        arrays = []
        for tokens, ends_document in zip(self._tokenizer.encode_pieces(pieces, num_threads=self._num_threads), documents_end, strict=True):
            arrays += [tokens, self._eos] if ends_document else [tokens]
        return np.concatenate(arrays)


def _blocks(arrays: Iterable[np.ndarray], *, size: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The stream cut up: size + 1 tokens each, the last of a block the first of the next; the last block holds what is left."""
    held: list[np.ndarray] = []
    count = 0
    for array in arrays:
        held.append(array.astype(dtype))
        count += len(array)
        if count > size:
            tokens, start = np.concatenate(held), 0
            while len(tokens) - start > size:
                yield tokens[start : start + size + 1]
                start += size
            held, count = [tokens[start:]], len(tokens) - start
    if count > 1:
        yield np.concatenate(held)


def _write_shard(file: Path, tokens: np.ndarray, *, first: int, sequence_length: int) -> Shard:
    """One tar: sample `first`, `first` + 1, ... under nine-digit keys; nothing in it tells when or by whom it was written."""
    from webdataset.writer import TarWriter  # imports torch: seconds that a --help need not wait

    starts = range(0, len(tokens) - 1, sequence_length)
    with atomic_write(file) as stream, TarWriter(stream, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:
        for number, start in enumerate(starts, start=first):
            tar.write({"__key__": f"{number:09d}", "npy": _npy(tokens[start : start + sequence_length + 1])})
    return Shard(name=file.name, samples=len(starts), tokens=len(tokens) - 1, bytes=file.stat().st_size, sha256=sha256_of_file(file))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0))
    return buffer.getvalue()


def _copy_tokenizer(tokenizer: Tokenizer, directory: Path, *, overwrite: bool) -> None:
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return
    copy = directory.parent / TOKENIZER_NAME
    there = sha256_of_file(copy) if copy.exists() else None
    if there == tokenizer.fingerprint:
        return
    users = [index.parent.name for index in directory.parent.glob(f"*/{INDEX_NAME}") if index.parent != directory]
    if there and users and not overwrite:
        raise ValueError(
            f"{copy} is not the tokenizer {tokenizer.spec}, and the split {users[0]!r} beside it was written with it;"
            " use --overwrite to replace both, or another --output"
        )
    with atomic_write(copy) as file:
        file.write(tokenizer.model)


def _clear(directory: Path) -> None:
    """Delete the index, then the shards: whatever cuts this off, what is left is no split."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX_NAME).unlink(missing_ok=True)
    for file in directory.iterdir():
        if re.fullmatch(r"\d{6}\.tar|\.(\d{6}\.tar|index\.json)\.unfinished", file.name):
            file.unlink()

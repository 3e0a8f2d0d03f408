"""Training of a SentencePiece model whose round trip loses nothing."""

import heapq
import io
import re
from collections.abc import Iterable
from pathlib import Path

from titans_scale.data.files import atomic_write, hash_key
from titans_scale.data.tokenizers.tokenizer import SentencePieceTokenizer, cut

RESERVED = "\u2585"
"""SentencePiece skips every training sentence with this character (its sign for 'unknown')."""
SMALLEST_VOCABULARY = 258
"""256 bytes, unknown, end of document."""


def train_sentencepiece(
    texts: Iterable[str],
    model_path: str | Path,
    vocab_size: int,
    *,
    max_bytes: int = 50_000_000,
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Train byte-pair merges on some texts and write the model file, whole or not at all.

    The same texts give the same file. Numbers are split into digits, and what has no piece of its own is written as bytes, as in Llama 2.

    Args:
        max_bytes: UTF-8 bytes to learn from, an even selection of all, 50 MB by default: about 15 seconds and 2 GB of memory.
        character_coverage: share of the characters seen that get a piece of their own; the rest are written as bytes.
    Raises:
        ValueError: no text, or a vocab_size that the text cannot fill or that cannot hold its characters (with one that works).
    """
    import sentencepiece

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}; the smallest is {SMALLEST_VOCABULARY}: 256 bytes, 'unknown' and 'end of document'")
    if max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}; it must be at least 1")
    if not 0 < character_coverage <= 1:
        raise ValueError(f"character_coverage is {character_coverage}; it must be above 0 and at most 1")
    model, sentences = io.BytesIO(), _selection(texts, max_bytes=max_bytes)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 30,
            num_threads=1,  # the count is written into the model: more would give another file on another machine
            minloglevel=3,
        )
    except RuntimeError as error:
        raise ValueError(_sentence(str(error), vocab_size)) from error
    with atomic_write(model_path) as file:
        file.write(model.getvalue())
    return SentencePieceTokenizer(model_path)


def _selection(texts: Iterable[str], *, max_bytes: int) -> list[str]:
    """About max_bytes of the texts' pieces, in order: those of the lowest hashes, so that it is even without knowing how much there is."""
    kept: list[tuple[int, int, str, int]] = []
    """A heap, the highest hash first: minus the hash, the piece's number, the piece, its bytes."""
    total = 0
    for number, piece in enumerate(piece for text in texts for piece in cut(text) if piece):
        data = piece.encode()
        rank = -hash_key(data)
        if total >= max_bytes and rank < kept[0][0]:
            continue
        heapq.heappush(kept, (rank, number, piece, len(data)))
        total += len(data)
        while total - kept[0][3] >= max_bytes:
            total -= heapq.heappop(kept)[3]
    return [piece.replace(RESERVED, " ") for _, piece in sorted((number, piece) for _, number, piece, _ in kept)]


def _sentence(message: str, vocab_size: int) -> str:
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"vocab_size {vocab_size} is more than this text supports; the largest that works is {found[1]}"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"vocab_size {vocab_size} cannot hold the characters of this text; the smallest that works is {found[1]}"
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on"
    return f"SentencePiece could not train: {' '.join(message.split())}"

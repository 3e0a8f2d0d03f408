"""Training of a SentencePiece model whose round trip loses nothing."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from titans_scale.data.files import atomic_write
from titans_scale.data.tokenizer import SentencePieceTokenizer, cut

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
    total_bytes: int | None = None,
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Train byte-pair merges on some texts and write the model file, whole or not at all.

    The same texts give the same file. Numbers are split into digits, and what has no piece of its own is written as bytes, as in Llama 2.

    Args:
        max_bytes: UTF-8 bytes to learn from, 50 MB by default: about 15 seconds and 2 GB of memory.
        total_bytes: bytes of all the texts. With it, an even selection of about max_bytes of them; without, the first max_bytes.
        character_coverage: share of the characters seen that get a piece of their own; the rest are written as bytes.
    Raises:
        ValueError: no text, or a vocab_size that the text cannot fill or that cannot hold its characters (with one that works).
    """
    import sentencepiece

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}; the smallest is {SMALLEST_VOCABULARY}: 256 bytes, 'unknown' and 'end of document'")
    model = io.BytesIO()
    share = 1.0 if total_bytes is None else min(1.0, max_bytes / max(1, total_bytes))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_selection(texts, max_bytes=max_bytes, share=share),
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


def _selection(texts: Iterable[str], *, max_bytes: int, share: float) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        for piece in cut(text):
            data = piece.encode()
            if int.from_bytes(hashlib.sha256(data).digest()[:8]) >= share * 2**64:
                continue
            left -= len(data)
            if piece:
                yield piece.replace(RESERVED, " ")
            if left <= 0:
                return


def _sentence(message: str, vocab_size: int) -> str:
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"vocab_size {vocab_size} is more than this text supports; the largest that works is {found[1]}"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"vocab_size {vocab_size} cannot hold the characters of this text; the smallest that works is {found[1]}"
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on"
    return f"SentencePiece could not train: {' '.join(message.split())}"

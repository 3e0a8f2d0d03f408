"""From text to batches: corpus, tokenizer, token shards, stream."""

import importlib
from typing import TYPE_CHECKING, Any

from titans_scale.data.corpus import CorpusReport, read_corpus, write_corpus
from titans_scale.data.shards import write_shards
from titans_scale.data.sources import Document, standard_library, text_files
from titans_scale.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from titans_scale.data.tokenizer_training import train_sentencepiece

if TYPE_CHECKING:
    from titans_scale.data.dataset import TokenDataset, open_split
    from titans_scale.data.stream import IGNORED, Batch, TokenStream, validation_batches

__all__ = [
    "IGNORED",
    "Batch",
    "ByteTokenizer",
    "CorpusReport",
    "Document",
    "SentencePieceTokenizer",
    "TokenDataset",
    "TokenStream",
    "Tokenizer",
    "load_tokenizer",
    "open_split",
    "read_corpus",
    "standard_library",
    "text_files",
    "train_sentencepiece",
    "validation_batches",
    "write_corpus",
    "write_shards",
]
_NEED_TORCH = {
    "TokenDataset": "dataset",
    "open_split": "dataset",
    "IGNORED": "stream",
    "Batch": "stream",
    "TokenStream": "stream",
    "validation_batches": "stream",
}


def __getattr__(name: str) -> Any:
    """The reading side on first use: the tools that prepare data need no torch for their --help."""
    if name in _NEED_TORCH:
        return getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

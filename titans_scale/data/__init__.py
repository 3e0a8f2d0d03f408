"""From text to batches: corpus, tokenizer, token shards, stream."""

import importlib
from typing import TYPE_CHECKING, Any

from titans_scale.data.shards.making import make_split, write_shards
from titans_scale.data.text.corpus import CorpusReport, read_corpus, write_corpus
from titans_scale.data.text.sources import Document, standard_library, text_files
from titans_scale.data.tokenizers.loading import load_tokenizer
from titans_scale.data.tokenizers.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from titans_scale.data.tokenizers.training import train_sentencepiece

if TYPE_CHECKING:
    from titans_scale.data.reading.dataset import TokenDataset, open_split
    from titans_scale.data.reading.mixture import Mixture, Source
    from titans_scale.data.reading.opening import open_sources
    from titans_scale.data.reading.stream import IGNORED, Batch, TokenStream, validation_batches

__all__ = [
    "IGNORED",
    "Batch",
    "ByteTokenizer",
    "CorpusReport",
    "Document",
    "Mixture",
    "SentencePieceTokenizer",
    "Source",
    "TokenDataset",
    "TokenStream",
    "Tokenizer",
    "load_tokenizer",
    "make_split",
    "open_sources",
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
    "TokenDataset": "reading.dataset",
    "open_split": "reading.dataset",
    "Mixture": "reading.mixture",
    "Source": "reading.mixture",
    "open_sources": "reading.opening",
    "IGNORED": "reading.stream",
    "Batch": "reading.stream",
    "TokenStream": "reading.stream",
    "validation_batches": "reading.stream",
}


def __getattr__(name: str) -> Any:
    """The reading side on first use: the tools that prepare data need no torch for their --help."""
    if name in _NEED_TORCH:
        return getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

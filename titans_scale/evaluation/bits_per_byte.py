"""Held-out bits per byte: how many bits a model needs to write down a text, per byte of it.

Unlike the loss per token it does not depend on the tokenizer, and it stands on one scale with ordinary compressors.

Shape letters: B documents side by side, T tokens of a piece.
"""

import gzip
import lzma
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from titans_scale.data import IGNORED, Tokenizer
from titans_scale.models import TitansLM


@dataclass(frozen=True, kw_only=True)
class CodeLength:
    """What a model pays for a set of documents."""

    bits: float
    """Sum of -log2 p over every token of every document, its end included: the documents could be rebuilt from that many bits."""
    num_bytes: int
    """UTF-8 bytes of the documents."""
    num_tokens: int
    num_documents: int

    @property
    def bits_per_byte(self) -> float:
        """The score: lower is better; 8 is what plain text takes."""
        return self.bits / self.num_bytes


@torch.no_grad()
def code_length(
    model: TitansLM, documents: Sequence[str], tokenizer: Tokenizer, *, piece_tokens: int = 512, batch_size: int = 8, progress: bool = False
) -> CodeLength:
    """Stream every document through the model, piece by piece, its memory learning along the way as at inference.

    Each document starts from the model's initial state and an end-of-document token, as in training.

    Args:
        piece_tokens: tokens of one forward pass; the state goes from piece to piece, so this changes speed and peak memory alone.
        batch_size: documents side by side; they do not see each other, so this changes nothing else.
        progress: show a bar on a terminal.
    Raises:
        ValueError: no text, a size below 1, or a tokenizer that loses bytes of a document, for which the bits would not pay then.
    """
    for name, size in (("piece_tokens", piece_tokens), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    num_bytes = sum(len(document.encode()) for document in documents)
    if num_bytes == 0:
        raise ValueError("there is no text to evaluate on; give a file with at least one character")
    sequences = [_tokens(document, tokenizer) for document in documents]
    sequences.sort(key=len, reverse=True)  # neighbours of one length: little padding
    was_training = model.training
    model.eval()
    bits = 0.0
    num_tokens = sum(len(sequence) - 1 for sequence in sequences)
    with tqdm(total=num_tokens, unit="token", unit_scale=True, disable=None if progress else True) as bar:
        for start in range(0, len(sequences), batch_size):
            bits += _group_bits(model, sequences[start : start + batch_size], piece_tokens=piece_tokens, bar=bar)
    model.train(was_training)
    return CodeLength(bits=bits, num_bytes=num_bytes, num_tokens=num_tokens, num_documents=len(documents))


def compressor_bits_per_byte(documents: Iterable[str]) -> dict[str, float]:
    """gzip -9 and xz -9e on the documents laid end to end: the same bytes, and they may look across documents."""
    data = "".join(documents).encode()
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def _tokens(document: str, tokenizer: Tokenizer) -> list[int]:
    tokens = tokenizer.encode(document)
    if tokenizer.decode(tokens) != document:
        raise ValueError(
            f"the tokenizer does not give the document that starts with {document[:40]!r} back, so bits per byte would flatter the model;"
            " train a tokenizer with identity normalization and byte fallback, as tools/train_tokenizer.py does"
        )
    return [tokenizer.eos_id, *tokens, tokenizer.eos_id]


def _group_bits(model: TitansLM, sequences: Sequence[list[int]], *, piece_tokens: int, bar: tqdm) -> float:
    device = next(model.parameters()).device
    inputs_BT, targets_BT = _padded(sequences)
    state = model.init_state(batch_size=len(sequences))
    nats = 0.0
    for start in range(0, inputs_BT.shape[1], piece_tokens):
        piece = slice(start, start + piece_tokens)
        out = model(inputs_BT[:, piece].to(device), state=state)
        state = out.state
        targets = targets_BT[:, piece].flatten().to(device)
        # summed over the pieces in Python's doubles: a float32 sum of millions of tokens would lose its last digits
        nats += F.cross_entropy(out.logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum").item()
        bar.update(int((targets != IGNORED).sum()))
    return nats / math.log(2)


def _padded(sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Next-token inputs and targets; the padding comes after a row's last token, so no token that counts can see it."""
    length = max(map(len, sequences)) - 1
    inputs_BT = torch.zeros(len(sequences), length, dtype=torch.int64)
    targets_BT = torch.full_like(inputs_BT, IGNORED)
    for row, sequence in enumerate(sequences):
        inputs_BT[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
        targets_BT[row, : len(sequence) - 1] = torch.tensor(sequence[1:])
    return inputs_BT, targets_BT

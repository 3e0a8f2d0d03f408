"""The four ways to build a block around the memory (Titans, section 4), each a mixer between two residual paths.

A block takes the tokens and its own state and returns both. State None is the start of a sequence: the persistent tokens come
first then, and their outputs are dropped. Any cut of a sequence with the state handed on equals one pass.

Where several ranks share a block, it takes and returns a rank's share of the tokens, norms and residual sums are of that share, and what
comes out of a projection back to the model's width is a rank's part of a sum: see `titans_scale.models.ranks`.

Shape letters: B batch, T tokens, S a rank's share of the tokens (all of them on one device), P persistent tokens, M model width, H heads, D
head dimension.
"""

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titans_scale.config import ModelConfig
from titans_scale.memory.layer import Initializer, MemoryState, NeuralMemory, constant, normal
from titans_scale.memory.state import begin_anew
from titans_scale.models.attention import Attention, KeyValue, segment_attention, window_attention
from titans_scale.models.documents import DocumentLayout
from titans_scale.models.layers import MemoryGate, SwiGLU
from titans_scale.models.ranks import OneRank, Ranks


class MACState(NamedTuple):
    """Memory as context, somewhere in a segment."""

    memory: MemoryState | None
    query_tail_BKI: Tensor | None
    """Convolution tail of the queries that ask for memory tokens (those of the written tokens are in `memory`)."""
    segment_weights: list[Tensor]
    """The memory as it stood before the segment."""
    memory_tokens: KeyValue
    segment: KeyValue
    """Keys and values of the segment so far."""


class WindowState(NamedTuple):
    """Memory beside or below sliding-window attention."""

    memory: MemoryState
    prefix: KeyValue
    context: KeyValue
    """Keys and values of the last window - 1 tokens."""


class Block(nn.Module, ABC):
    """x + mixer(norm(x)), then x + MLP(norm(x)). Subclasses are the mixers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.ranks: Ranks = OneRank()
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.memory = NeuralMemory(config.dim, config.memory, init_std=config.init_std, num_layers=config.num_layers)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        if config.num_persistent_tokens:
            self.persistent = nn.Parameter(torch.empty(config.num_persistent_tokens, config.dim))

    def forward(self, x_BSM: Tensor, state: Any = None, documents: DocumentLayout | None = None) -> tuple[Tensor, Any]:
        """The tokens after this block, and the state after them; with documents each is a sequence of its own, and the state nobody's."""
        x_BSM, state = self.mix(x_BSM, state, documents)
        return x_BSM + self.ranks.scatter_sum(self.mlp(self.ranks.gather(self.mlp_norm(x_BSM)))), state

    @abstractmethod
    def mix(self, x_BSM: Tensor, state: Any, documents: DocumentLayout | None) -> tuple[Tensor, Any]:
        """The tokens with the mixer's output added, and the state after them."""

    def prefix(self, x_BSM: Tensor) -> Tensor:
        """The persistent tokens for each row of x's batch, (B, P, M); P may be 0."""
        if not self.config.num_persistent_tokens:
            return x_BSM[:, :0]
        return self.persistent.to(x_BSM.dtype).expand(x_BSM.shape[0], -1, -1)

    def initializers(self) -> dict[str, Initializer]:
        """For the parameters that are this block's own or its children's, by name, how their initial values are made."""
        small = self.config.init_std / math.sqrt(2 * self.config.num_layers)
        rules = {f"memory.{name}": rule for name, rule in self.memory.initializers().items()}
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm):
                rules[f"{name}.weight"] = constant(1.0)
        rules |= {f"mlp.{name}.weight": normal(self.config.init_std) for name in ("gate", "up")}
        rules |= {f"attention.{name}_proj.weight": normal(self.config.init_std) for name in ("q", "k", "v")}
        rules |= {"mlp.down.weight": normal(small), "attention.out_proj.weight": normal(small)}
        rules |= {"persistent": normal(1.0), "gate.y_norm.weight": constant(small)}
        return rules


class MACBlock(Block):
    """Memory as context: what the memory recalls for a segment joins it in attention, and the result is written (section 4.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.attention = Attention(config)
        self.memory_token_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.write_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.gate = MemoryGate(config)

    def mix(self, x_BSM: Tensor, state: MACState | None, documents: DocumentLayout | None) -> tuple[Tensor, MACState]:
        x = self.ranks.gather(self.norm(x_BSM))
        if documents is not None:
            x = documents.spread(x, x[:, :0])
        prefix = self.attention.keys_values(self.norm(self.prefix(x_BSM)))
        q, own = self.attention.queries(x), self.attention.keys_values(x)
        state = state or MACState(None, None, self.memory.fresh_weights(x.shape[0]), own.between(0, 0), own.between(0, 0))
        memory_q, query_tail = self.memory.queries(x, state.query_tail_BKI)
        state = state._replace(query_tail_BKI=query_tail)
        lengths = pieces_up_to(x.shape[1], self.config.segment_len, begun=state.segment.k.shape[2])
        empty = [None] * len(lengths) if documents is None else (~documents.filled_BS).split(lengths, dim=1)
        ys, reads = [], []
        pieces = zip(x.split(lengths, dim=1), empty, *(y.split(lengths, dim=2) for y in (q, *own, memory_q)), strict=True)
        for number, (x_piece, empty_piece, q_piece, k_piece, v_piece, memory_q_piece) in enumerate(pieces):
            begin = number * self.config.segment_len
            if documents is not None and number and begin % self.config.memory.chunk_size == 0:  # no document begins elsewhere
                state = self._begun_anew(state, documents.starts_BS[:, begin])
            heads = (q_piece, KeyValue(k_piece, v_piece), memory_q_piece)
            y, read, state = self._mix_piece(x_piece, *heads, prefix, state, empty_piece)
            ys.append(y)
            reads.append(read)
        # All segments at once: ranks then exchange what they read of their memories once a block, not once a segment.
        y, read = torch.cat(ys, dim=1), torch.cat(reads, dim=1)
        if documents is not None:
            y, read = documents.collect(y), documents.collect(read)
        return x_BSM + self.gate(self.ranks.own_tokens(y), self.ranks.scatter_sum(read)), state

    def _begun_anew(self, state: MACState, chosen_B: Tensor) -> MACState:
        """Between two segments: where a document begins with the next one, the memory is as before the first."""
        assert state.memory is not None
        scan = begin_anew(state.memory.scan, self.memory.fresh_weights(len(chosen_B)), chosen_B)
        return state._replace(memory=state.memory._replace(scan=scan), segment_weights=scan.weights)

    def _mix_piece(
        self,
        x_BTM: Tensor,
        q_BHTD: Tensor,
        own: KeyValue,
        memory_q_BHTD: Tensor,
        prefix: KeyValue,
        state: MACState,
        empty_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor, MACState]:
        """Tokens of one segment, up to its end at most: what attention makes of them, a rank's part of what the memory then reads, and the
        state. Empty ones, behind a document, are zeros to the memory's convolutions.
        """
        recalled = self.ranks.sum(self.memory.retrieve(memory_q_BHTD, state.segment_weights, x_BTM))
        memory_tokens = state.memory_tokens.then(self.attention.keys_values(self.memory_token_norm(recalled)))
        segment = state.segment.then(own)
        attended = segment_attention(
            q_BHTD, memory_tokens, segment, prefix, theta=self.config.rope_theta, backend=self.config.attention_backend
        )
        y = self.ranks.sum(self.attention.output(attended))
        if empty_BT is not None:
            y = y.masked_fill(empty_BT[..., None], 0)
        read, memory = self.memory(self.write_norm(y), state.memory)
        segment_weights = state.segment_weights
        if segment.k.shape[2] == self.config.segment_len:
            segment_weights = memory.scan.weights
            memory_tokens, segment = memory_tokens.between(0, 0), segment.between(0, 0)
        return y, read, MACState(memory, state.query_tail_BKI, segment_weights, memory_tokens, segment)


class MAGBlock(Block):
    """Memory as gate: sliding-window attention and the memory side by side, one gating the other (section 4.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.attention = Attention(config)
        self.gate = MemoryGate(config)

    def mix(self, x_BSM: Tensor, state: WindowState | None, documents: DocumentLayout | None) -> tuple[Tensor, WindowState]:
        x = self.ranks.gather(self.norm(x_BSM))
        if state is None:
            persistent = self.norm(self.prefix(x_BSM))
            prefix = self.attention.keys_values(persistent)
            whole = joined(persistent, x, documents)
            read, memory = self.memory(whole, None, chunks_to_reset(self.memory, documents))
            read = parted(read, persistent, documents)
        else:
            prefix = state.prefix
            read, memory = self.memory(x, state.memory)
        y, context = windowed(self.attention, x, prefix, state, self.config, documents)
        output = self.gate(self.ranks.scatter_sum(y), self.ranks.scatter_sum(read))
        return x_BSM + output, WindowState(memory, prefix, context)


class MALBlock(Block):
    """Memory as layer: the memory first, sliding-window attention on what it made of the tokens (section 4.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)

    def mix(self, x_BSM: Tensor, state: WindowState | None, documents: DocumentLayout | None) -> tuple[Tensor, WindowState]:
        x_BSM, read_persistent, memory = remember(self, x_BSM, state.memory if state else None, documents)
        if state is None:
            persistent = self.prefix(x_BSM) + self.ranks.sum(read_persistent)
            prefix = self.attention.keys_values(self.attention_norm(persistent))
        else:
            prefix = state.prefix
        x = self.ranks.gather(self.attention_norm(x_BSM))
        y, context = windowed(self.attention, x, prefix, state, self.config, documents)
        return x_BSM + self.ranks.scatter_sum(y), WindowState(memory, prefix, context)


class LMMBlock(Block):
    """The memory alone as the sequence mixer."""

    def mix(self, x_BSM: Tensor, state: MemoryState | None, documents: DocumentLayout | None) -> tuple[Tensor, MemoryState]:
        x_BSM, _, memory = remember(self, x_BSM, state, documents)
        return x_BSM, memory


def pieces_up_to(length: int, size: int, *, begun: int) -> list[int]:
    """Lengths of the pieces that `length` tokens fall into on a grid of `size`, of whose first cell `begun` are past."""
    bounds = [0, *range(size - begun, length, size), length]
    return [end - begin for begin, end in pairwise(bounds)]


def remember(
    block: Block, x_BSM: Tensor, state: MemoryState | None, documents: DocumentLayout | None
) -> tuple[Tensor, Tensor, MemoryState]:
    """x + memory(norm(x)) over [persistent || x] at the start of a sequence, over x later.

    Returns the tokens, a rank's part of what the memory read at the persistent ones (B, P, M), and its state.
    """
    persistent = block.norm(block.prefix(x_BSM) if state is None else x_BSM[:, :0])
    whole = joined(persistent, block.ranks.gather(block.norm(x_BSM)), documents)
    read, memory = block.memory(whole, state, chunks_to_reset(block.memory, documents))
    x_BSM = x_BSM + block.ranks.scatter_sum(parted(read, persistent, documents))
    return x_BSM, read[:, : persistent.shape[1]], memory


def joined(persistent_BPM: Tensor, x_BTM: Tensor, documents: DocumentLayout | None) -> Tensor:
    """The persistent tokens before the tokens, or before those of every document."""
    return torch.cat((persistent_BPM, x_BTM), dim=1) if documents is None else documents.spread(x_BTM, persistent_BPM)


def parted(whole_BTM: Tensor, persistent_BPM: Tensor, documents: DocumentLayout | None) -> Tensor:
    """The tokens alone, of what `joined` made."""
    return whole_BTM[:, persistent_BPM.shape[1] :] if documents is None else documents.collect(whole_BTM)


def chunks_to_reset(memory: NeuralMemory, documents: DocumentLayout | None) -> Tensor | None:
    return None if documents is None else documents.starts_BS[:, :: memory.config.chunk_size]


def windowed(
    attention: Attention,
    x_BTM: Tensor,
    prefix: KeyValue,
    state: WindowState | None,
    config: ModelConfig,
    documents: DocumentLayout | None,
) -> tuple[Tensor, KeyValue]:
    """Sliding-window attention with prefix, and the keys and values that the next call still sees."""
    own = attention.keys_values(x_BTM)
    context = state.context.then(own) if state else own
    q_BHTD = attention.queries(x_BTM)
    y = window_attention(
        q_BHTD,
        context,
        prefix,
        window=config.window,
        theta=config.rope_theta,
        backend=config.attention_backend,
        documents=documents,
    )
    return attention.output(y), context.between(max(0, context.k.shape[2] - config.window + 1))


BLOCKS: dict[str, type[Block]] = {"mac": MACBlock, "mag": MAGBlock, "mal": MALBlock, "lmm": LMMBlock}

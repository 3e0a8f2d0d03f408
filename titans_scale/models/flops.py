"""Floating-point operations of a training step, by part: what MFU and the run-time estimate are made of.

Matrix products only, a multiply-add counted as two; the backward pass costs twice the forward. Attention counts the pairs a
token really sees, not the masked ones that a kernel may compute besides, and recomputation is not counted: model FLOPs, as
the PaLM paper defines them for MFU. tests/test_flops.py holds the formulas to torch's own counter.
"""

from itertools import pairwise

from titans_scale.config import MemoryConfig, ModelConfig
from titans_scale.memory.flops import ScanFlops, chunk_flops
from titans_scale.models.layers import mlp_width


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of forward and backward for one token of a training sequence, the memory included."""
    return round(sum(training_flops(config, sequence_length).values()) / sequence_length)


def training_flops(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """FLOPs of forward and backward over one whole sequence, by part: embedding_head, mlp, attention, memory.

    Attention and memory include their projections.
    """
    forward = forward_flops(config, sequence_length)
    undifferentiated = config.num_layers * config.memory.num_heads
    undifferentiated *= sum(chunk.undifferentiated for chunk in _scan_flops(config, sequence_length))
    return {part: 3 * flops for part, flops in forward.items()} | {"memory": 3 * forward["memory"] - 2 * undifferentiated}


def forward_flops(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """FLOPs of the forward pass over one whole sequence, by part."""
    layers, dim = config.num_layers, config.dim
    return {
        "embedding_head": 2 * sequence_length * dim * config.vocab_size,
        "mlp": layers * 6 * sequence_length * dim * mlp_width(config),
        "attention": layers * _attention_flops(config, sequence_length),
        "memory": layers * _memory_flops(config, sequence_length),
    }


def _attention_flops(config: ModelConfig, length: int) -> int:
    if config.variant == "lmm":
        return 0
    projection = 2 * config.dim**2
    prefix = config.num_persistent_tokens
    if config.variant == "mac":  # keys and values of the memory tokens too
        pairs = sum(n * prefix + n * (n + 1) for n in _pieces(length, config.segment_len))
        return projection * (6 * length + 2 * prefix) + 4 * config.dim * pairs
    seen = sum(min(t + 1, config.window) for t in range(length)) + length * prefix
    return projection * (4 * length + 2 * prefix) + 4 * config.dim * seen


def _memory_flops(config: ModelConfig, length: int) -> int:
    memory = config.memory
    inner = memory.num_heads * _head_dim(config)
    weights = sum(into * out for into, out in memory_widths(config))
    gates = memory.num_heads * (1 + memory.momentum + memory.forgetting)
    written = length if config.variant == "mac" else length + config.num_persistent_tokens
    projections = written * 2 * config.dim * (5 * inner + gates)
    if config.variant == "mac":  # the memory tokens: a query, a read at standing weights, gate and output
        projections += length * (2 * config.dim * 3 * inner + 2 * memory.num_heads * weights)
    return projections + memory.num_heads * sum(chunk.forward for chunk in _scan_flops(config, length))


def _scan_flops(config: ModelConfig, length: int) -> list[ScanFlops]:
    """Of one memory, every chunk."""
    widths, memory = memory_widths(config), config.memory
    return [chunk_flops(widths, chunk, memory.write_rule, memory.passes) for chunk in _chunks(config, length)]


def memory_widths(config: ModelConfig) -> list[tuple[int, int]]:
    """Input and output width of each layer of one memory MLP."""
    dim, memory = _head_dim(config), config.memory
    widths = [dim, *[dim * memory.expansion] * (memory.depth - 1), dim]
    return list(pairwise(widths))


def _head_dim(config: ModelConfig) -> int:
    return config.memory.head_dim or config.dim // config.memory.num_heads


def _chunks(config: ModelConfig, length: int) -> list[int]:
    """Lengths of the chunks that a sequence is written in."""
    memory: MemoryConfig = config.memory
    if config.variant == "mac":
        return [chunk for segment in _pieces(length, config.segment_len) for chunk in _pieces(segment, memory.chunk_size)]
    return _pieces(length + config.num_persistent_tokens, memory.chunk_size)


def _pieces(length: int, size: int) -> list[int]:
    return [size] * (length // size) + ([length % size] if length % size else [])

"""What the scan costs, by formula: its floating-point operations, and what goes between ranks that share a memory's hidden width.

FLOPs are of matrix products only, a multiply-add counted as two. tests/test_flops.py holds the forward formula to torch's own counter. Like
that counter it leaves out the online rule's triangular solves. With a rank's own widths it gives the rank's share.

Letters: C tokens of a chunk, I/O a layer's input and output width, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from titans_scale.memory.groups import READ_AT_ONCE, Rule
from titans_scale.memory.write_rule import WriteRule


class ScanFlops(NamedTuple):
    """Of one memory over one chunk."""

    differentiated: int
    undifferentiated: int
    """What no gradient flows through: the normalized rule's factors."""

    @property
    def forward(self) -> int:
        return self.differentiated + self.undifferentiated

    @property
    def backward(self) -> int:
        """Twice the forward pass; what is computed again is not counted."""
        return 2 * self.differentiated


def chunk_flops(widths: Sequence[tuple[int, int]], chunk: int, write_rule: WriteRule, passes: int) -> ScanFlops:
    """FLOPs of one chunk's surprise, read and advance.

    Args:
        widths: (I, O) of each layer.   chunk: C.   passes: of the online rule; the others have none.
    """
    weights = sum(into * out for into, out in widths)
    pairs = 2 * chunk**2
    read = 4 * chunk * weights + pairs * sum(into + out for into, out in widths)
    advance = (4 * chunk + 8) * weights
    coefficients = 2 * chunk**3 + pairs
    undifferentiated = 0
    if write_rule == "online":
        above = widths[1:]
        one_pass = 4 * chunk * weights + pairs * widths[-1][0]
        one_pass += sum(4 * chunk * into * out + pairs * (into + out) for into, out in above)
        own_writes = pairs * sum(into + out for into, out in widths[:-1])
        surprise = passes * one_pass + (passes - 1) * own_writes
    else:
        surprise = 2 * chunk * (2 * weights - widths[0][0] * widths[0][1])
        if write_rule == "normalized":
            undifferentiated = pairs * sum(into + out for into, out in widths) + pairs
    return ScanFlops(surprise + read + advance + coefficients, undifferentiated)


@dataclass(frozen=True)
class Sums:
    """All-reduces over the ranks that share the hidden width."""

    collectives: int
    elements: int
    """Of one memory, in the scan's dtype. All memories of a rank go in one collective."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.collectives + other.collectives, self.elements + other.elements)

    def times(self, number: int) -> "Sums":
        return Sums(self.collectives * number, self.elements * number)


def split_sums(rule: Rule, head_dim: int, tokens: int, interval: int) -> tuple[Sums, Sums]:
    """Of a scan of `tokens` tokens, forward and backward; the backward pass runs the writes again.

    Args:
        interval: chunks between two states kept, see `memory_scan`.
    """
    chunks, rest = divmod(tokens, rule.chunk_size)
    forward = backward = Sums(0, 0)
    for length, number in ((rule.chunk_size, chunks), (rest, 1 if rest else 0)):
        write = _write_sums(rule, head_dim, length).times(number)
        reads = Sums(_reads(number, interval), length * head_dim * number)
        forward += write + reads
        backward += write + _write_vjp_sums(rule, head_dim, length).times(number) + reads
    return forward, backward


def _write_sums(rule: Rule, head_dim: int, chunk: int) -> Sums:
    output, clipped = chunk * head_dim, rule.max_norm is not None
    if rule.write_rule == "online":
        a_pass = Sums(2, output + chunk**2 + 2 * chunk).times(rule.passes)
        return a_pass + Sums(0, chunk if clipped or rule.margin is not None else 0)  # the first pass's guess
    normalized = rule.write_rule == "normalized"
    return Sums(1 + clipped + normalized, output + clipped * chunk + normalized * chunk**2)


def _write_vjp_sums(rule: Rule, head_dim: int, chunk: int) -> Sums:
    output, clip = chunk * head_dim, Sums(1, 2 * chunk).times(rule.max_norm is not None)
    return (Sums(1, output + chunk**2) + clip).times(rule.passes) if rule.write_rule == "online" else Sums(1, output) + clip


def _reads(chunks: int, interval: int) -> int:
    """How often a scan reads: several chunks at once, but no further than the next state kept."""
    groups, rest = divmod(chunks, interval)
    return groups * -(-interval // READ_AT_ONCE) + -(-rest // READ_AT_ONCE)

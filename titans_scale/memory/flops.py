"""Floating-point operations of the scan: matrix products only, a multiply-add counted as two.

tests/test_flops.py holds the forward formula to torch's own counter. Like that counter it leaves out the online rule's triangular solves.

Letters: C tokens of a chunk, I/O a layer's input and output width.
"""

from collections.abc import Sequence
from typing import NamedTuple

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

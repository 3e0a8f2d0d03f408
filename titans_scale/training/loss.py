"""Targets of a step: the loss is a sum, and what it is divided by is known only after all ranks have counted theirs."""

from collections.abc import Iterable

from titans_scale.data import IGNORED, Batch


def count_targets(batches: Iterable[Batch]) -> int:
    """Positions that have a target, over all micro-batches."""
    return sum(int((batch.targets != IGNORED).sum()) for batch in batches)

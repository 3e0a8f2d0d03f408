"""The training loss, as a sum: what it is divided by is known only after all ranks have counted their targets.

Shape letters: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from titans_scale.data import Batch
from titans_scale.models.model import IGNORED


def cross_entropy_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the positions that have a target, in float32.

    Args:
        logits_BTV: of the next token.   targets_BT: the next token itself; -100 where there is none.
    """
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


def count_targets(batches: Iterable[Batch]) -> int:
    """Positions that have a target, over all micro-batches."""
    return sum(int((batch.targets != IGNORED).sum()) for batch in batches)

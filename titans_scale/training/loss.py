"""The loss of a micro-batch is a sum: what it is divided by is known only after all ranks have counted their targets."""

from collections.abc import Iterable

import torch
from torch import Tensor

from titans_scale.data import IGNORED, Batch
from titans_scale.models import TitansLM
from titans_scale.models.documents import DocumentLayout


def loss_sum(model: TitansLM, batch: Batch, device: torch.device, *, logits_bytes: int | None, reset_at: int | None) -> Tensor:
    """Cross-entropy in nats, summed over the targets of a micro-batch that is still on the CPU: a scalar on the device.

    Args:
        logits_bytes: see `TitansLM.loss_sum`.
        reset_at: the end-of-document token, where attention and memory begin anew at each document; None: they do not.
    """
    documents = None if reset_at is None else DocumentLayout.of_inputs(batch.inputs, reset_at, model.config, device)
    on_device = batch.to(device, non_blocking=True)
    return model.loss_sum(on_device.inputs, on_device.targets, logits_bytes=logits_bytes, document_starts=documents)


def count_targets(batches: Iterable[Batch]) -> int:
    """Positions that have a target, over all micro-batches."""
    return sum(int((batch.targets != IGNORED).sum()) for batch in batches)

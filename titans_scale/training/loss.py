"""The loss of a micro-batch is a sum: what it is divided by is known only after all ranks have counted their targets."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from titans_scale.data import IGNORED, Batch
from titans_scale.models import TitansLM
from titans_scale.models.documents import DocumentLayout
from titans_scale.parallel import Mesh


def loss_sum(model: TitansLM, batch: Batch, mesh: Mesh, device: torch.device, *, logits_bytes: int | None, reset_at: int | None) -> Tensor:
    """Cross-entropy in nats, summed over the targets of a micro-batch that is still on the CPU: a scalar on the device.

    With context parallelism over the targets of this rank's tokens.

    Args:
        logits_bytes: see `TitansLM.loss_sum`.
        reset_at: the end-of-document token, where attention and memory begin anew at each document; None: they do not.
    """
    documents = None if reset_at is None else DocumentLayout.of_inputs(batch.inputs, reset_at, model.config, device)
    on_device = own_tokens(batch.to(device, non_blocking=True), mesh)
    return model.loss_sum(on_device.inputs, on_device.targets, logits_bytes=logits_bytes, document_starts=documents)


def own_tokens(batch: Batch, mesh: Mesh) -> Batch:
    """Of every sequence the consecutive tokens that are this rank's; all of them where no other rank shares it."""
    length = batch.inputs.shape[1] // mesh.sizes.context
    own = slice(mesh.context_rank * length, (mesh.context_rank + 1) * length)
    return replace(batch, inputs=batch.inputs[:, own], targets=batch.targets[:, own])


def count_targets(batches: Iterable[Batch]) -> int:
    """Positions that have a target, over all micro-batches."""
    return sum(int((batch.targets != IGNORED).sum()) for batch in batches)

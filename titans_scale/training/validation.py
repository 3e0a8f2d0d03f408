"""Loss on text the model is not trained on."""

import torch

from titans_scale.data import TokenDataset, validation_batches
from titans_scale.models import TitansLM
from titans_scale.parallel import DistributedContext
from titans_scale.parallel.apply import reshard
from titans_scale.training.loss import count_targets


@torch.no_grad()
def validation_loss(
    model: TitansLM,
    dataset: TokenDataset,
    context: DistributedContext,
    *,
    micro_batch_size: int,
    max_batches: int,
    logits_bytes: int | None,
) -> float:
    """Mean cross-entropy in nats over all target tokens of all ranks, each token weighing the same. All ranks call this together.

    Args:
        max_batches: micro-batches of a rank; 0: the whole split.   logits_bytes: see `TitansLM.loss_sum`.
    """
    batches = validation_batches(
        dataset, micro_batch_size=micro_batch_size, rank=context.rank, world_size=context.world_size, max_batches=max_batches
    )
    model.eval()
    # float64: the sum over a large split outgrows the digits of float32
    loss_and_targets = torch.zeros(2, dtype=torch.float64, device=context.device)
    for batch in batches:
        on_device = batch.to(context.device, non_blocking=True)
        loss_and_targets[0] += model.loss_sum(on_device.inputs, on_device.targets, logits_bytes=logits_bytes)
        loss_and_targets[1] += count_targets([batch])
    model.train()
    reshard(model)
    loss, targets = context.sum(loss_and_targets).tolist()
    return loss / targets

"""Loss on text the model is not trained on."""

import torch

from titans_scale.data import Mixture, validation_batches
from titans_scale.parallel import DistributedContext, Engine, Mesh
from titans_scale.training.loss import count_targets, loss_sum
from titans_scale.training.metrics import Record


@torch.no_grad()
def validate(
    engine: Engine,
    data: Mixture,
    context: DistributedContext,
    mesh: Mesh,
    *,
    micro_batch_size: int,
    max_batches: int,
    logits_bytes: int | None,
    reset_at_document: bool = False,
) -> Record:
    """Mean cross-entropy in nats over the target tokens of all ranks, each token of a source weighing the same.

    Where there are several sources each has its own number, and the loss is their mean by the mixture's weights. All ranks call this
    together.

    Args:
        max_batches: micro-batches of a rank and source; 0: the whole split.   logits_bytes: see `TitansLM.loss_sum`.
        reset_at_document: see data.reset_at_document.
    Raises:
        RunError: a rank could not read its part; on every rank.
    """
    model = engine.model.eval()
    # float64: the sum over a large split outgrows the digits of float32
    sums = torch.zeros(len(data.sources), 3, dtype=torch.float64, device=context.device)
    for place, source in enumerate(data.sources):
        batches = validation_batches(
            source.dataset, micro_batch_size=micro_batch_size, rank=mesh.data_rank, world_size=mesh.sizes.data, max_batches=max_batches
        )
        reset_at = source.dataset.eos_id if reset_at_document else None
        while True:
            with context.together():  # a rank that cannot read would leave the others waiting in the model's collectives
                batch = next(batches, None)
            if batch is None:
                break
            loss = loss_sum(model, batch, mesh, context.device, logits_bytes=logits_bytes, reset_at=reset_at)
            sums[place, 0] += loss / mesh.sizes.tensor  # which all have the same
            if mesh.is_first_reader:
                sums[place, 1] += count_targets([batch])
                sums[place, 2] += batch.skipped
    model.train()
    engine.release()
    losses, targets, skipped = context.sum(sums).cpu().unbind(1)
    means = losses / targets
    weights = torch.tensor([source.weight for source in data.sources], dtype=torch.float64)
    record = {"validation_metrics/loss": ((means * weights).sum() / weights.sum()).item()}
    if len(data.sources) > 1:
        record |= {f"validation_metrics/{source.name}/loss": mean for source, mean in zip(data.sources, means.tolist(), strict=True)}
    if skipped.sum():
        record["validation_metrics/skipped_samples"] = skipped.sum().item()
    return record

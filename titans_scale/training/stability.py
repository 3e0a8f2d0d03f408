"""Notices a loss or gradient norm that is not finite, on the device, without making the host wait for it."""

import torch
from torch import Tensor

from titans_scale.parallel import DistributedContext, Engine
from titans_scale.parallel.context import RunError


class FiniteWatch:
    """Remembers the first step that was not finite; the question what it remembers is asked when a step is logged or saved."""

    def __init__(self, context: DistributedContext) -> None:
        self._context = context
        self._never = torch.tensor(torch.iinfo(torch.int64).min, device=context.device)
        self._minus_first_bad = self._never

    def see(self, step: int, *values: Tensor) -> None:
        """Take note of one step's numbers. No host sync."""
        bad = ~torch.stack([value.isfinite() for value in values]).all()
        self._minus_first_bad = torch.maximum(self._minus_first_bad, torch.where(bad, -step, self._never))

    def first_bad_step(self) -> int | None:
        """The first step at which a rank saw a number that is not finite. All ranks must ask; the host waits."""
        worst = self._context.max(self._minus_first_bad)
        return None if bool(worst == self._never) else -int(worst)


def weights_are_finite(engine: Engine, context: DistributedContext) -> bool:
    """Whether every weight on every rank is a number. All ranks must ask; the host waits."""
    bad = ~torch.stack([shard.isfinite().all() for shard in engine.shards()]).all()
    return not bool(context.max(bad.to(torch.int64)))


def not_finite(what: str, last_checkpoint: str | None) -> RunError:
    """The sentence that ends a run whose numbers are gone."""
    back = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
    return RunError(
        f"{what} not finite; nothing was saved after it, {back}; lower optimizer.lr, or set a tighter training.max_grad_norm, and run again"
    )

"""What steps a sharded model: backward with as little communication as possible, clipping, the optimizer."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Fsdp2Engine:
    """A model under `fully_shard` and its optimizer.

    Args:
        model: from `parallelize`.   optimizer: over its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch.

        Gradients are reduced over ranks on the last micro-batch only. Until then each rank keeps them whole: as much memory as the
        full model in the reduction's precision (4 bytes a parameter), paid only when there is more than one micro-batch.

        Args:
            loss: this rank's part of the loss, divided by the global number of target tokens.   last: of this optimizer step.
        """
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        loss.backward()

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Scale all gradients so that their global norm is at most max_norm (None: leave them) and return the norm before that.

        On the device, without a host sync; the norm is over all ranks' shards, the same number on each.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def step(self) -> None:
        """Update the weights and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

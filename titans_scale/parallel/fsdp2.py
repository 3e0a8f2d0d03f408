"""The engine on torch's `fully_shard`: backward with as little communication as possible, clipping, the optimizer."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from titans_scale.models import TitansLM
from titans_scale.parallel.apply import reshard


class Fsdp2Engine:
    """A model under `fully_shard` and its optimizer; see `Engine`.

    Args:
        model: from `parallelize`.   optimizer: over its parameters.
    """

    def __init__(self, model: TitansLM, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gradients are reduced over ranks on the last micro-batch only. Until then each rank keeps them whole: as much memory as the
        full model in the reduction's precision (4 bytes a parameter), paid only when there is more than one micro-batch.
        """
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        loss.backward()

    def step(self, *, lr: float, max_norm: float | None) -> Tensor:
        norm = self._clip_grad_norm(max_norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def release(self) -> None:
        reshard(self.model)

    def state(self) -> dict[str, Any]:
        reshard(self.model)
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer)["state"],
        }

    def load(self, state: dict[str, Any]) -> None:
        """The optimizer's hyperparameters stay those of its construction."""
        set_model_state_dict(self.model, state["model"])
        groups = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        set_optimizer_state_dict(self.model, self.optimizer, {"state": state["optimizer"], "param_groups": groups})

    def _clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Over all ranks' shards."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr

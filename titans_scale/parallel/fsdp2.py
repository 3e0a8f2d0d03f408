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
        model: from `parallelize`.   optimizer: over its parameters.   device: of the losses and norms; with parallelism.cpu_offload
        not that of the parameters.
        reshard: whether gathered parameters are freed as soon as they can be, as parallelism.reshard_after_forward says; else they
            stay until the step.
    """

    def __init__(self, model: TitansLM, optimizer: torch.optim.Optimizer, device: torch.device, *, reshard: bool) -> None:
        self.model = model
        self.optimizer = optimizer
        self._device = device
        self._reshard = reshard

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gradients are reduced over ranks on the last micro-batch only. Until then each rank keeps them whole: as much memory as the
        full model in the reduction's precision (4 bytes a parameter), paid only when there is more than one micro-batch.
        """
        model = cast(FSDPModule, self.model)
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or self._reshard)  # the next micro-batch takes the same parameters
        loss.backward()

    def step(self, *, lr: float, max_norm: float | None) -> Tensor:
        norm = self._clip_grad_norm(max_norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def release(self) -> None:
        reshard(self.model)

    def shards(self) -> list[Tensor]:
        reshard(self.model)
        return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in self.model.parameters()]

    def state(self) -> dict[str, Any]:
        reshard(self.model)
        is_new = not self.optimizer.state
        moments = cast(dict[str, Any], get_optimizer_state_dict(self.model, self.optimizer)["state"])
        if is_new:  # torch has made the moments by a step with no gradient, which must not count
            for of_parameter in (*moments.values(), *self.optimizer.state.values()):
                of_parameter["step"].zero_()
        return {"model": get_model_state_dict(self.model), "optimizer": moments}

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
        return norm.to(self._device, non_blocking=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr

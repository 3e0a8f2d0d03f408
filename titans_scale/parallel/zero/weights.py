"""The weights and moments of a model under ZeRO, one whole tensor at a time: in from initial values or a checkpoint, out into one.

DeepSpeed lays parameters end to end and cuts the line into equal parts, one for each rank; the float32 weights and the optimizer's
moments exist only so.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titans_scale.parallel.fsdp2 import set_learning_rate


class ZeroWeights:
    """Weights and moments by the model's names. All ranks call every method together, with the same names in the same order.

    Args:
        engine: from `deepspeed.initialize`, before its first step.   stage: of ZeRO.
    """

    def __init__(self, engine: Any, stage: int) -> None:
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        self._whole, self._whole_moment = safe_get_full_fp32_param, safe_get_full_optimizer_state
        self._set, self._set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
        self._set_local, self._set_local_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
        self._zero, self._optimizer = engine.optimizer, engine.basic_optimizer
        self._sharded = stage == 3
        self._parameters: dict[str, Any] = dict(engine.module.named_parameters())
        self._begin_moments()
        self.moments = [name for name, value in self._optimizer.state[self.parts()[0]].items() if value.dim()]
        """What the optimizer keeps of every parameter, and in its shape."""

    @property
    def names(self) -> list[str]:
        """Of all parameters."""
        return list(self._parameters)

    def parts(self) -> list[Tensor]:
        """This rank's part of the float32 weights: flat, several parameters in each, zeros behind the last."""
        if self._sharded:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [part for group in self._optimizer.param_groups for part in group["params"]]

    def weight(self, name: str) -> Tensor:
        """The whole weight in float32."""
        return self._whole(self._parameters[name])

    def moment(self, name: str, moment: str) -> Tensor:
        """The whole moment in float32."""
        return self._whole_moment(self._parameters[name], moment)

    @torch.no_grad()
    def set_weight(self, name: str, value: Tensor) -> None:
        """Change the float32 weight, and the copy that the model computes with."""
        parameter = self._parameters[name]
        if self._sharded:
            part = self._part_of(value, parameter)
            self._set_local(parameter, part)
            parameter.ds_tensor.copy_(part)
        else:
            self._set(parameter, value.to(parameter.device))
            parameter.copy_(value)

    @torch.no_grad()
    def set_moment(self, name: str, moment: str, value: Tensor) -> None:
        parameter = self._parameters[name]
        if self._sharded:
            self._set_local_moment(parameter, self._part_of(value, parameter), moment)
        else:
            self._set_moment(parameter, value.to(parameter.device), moment)

    @property
    def steps(self) -> Tensor:
        """How many steps the optimizer has taken, as it counts them: a scalar."""
        return self._optimizer.state[self.parts()[0]]["step"]

    def set_steps(self, steps: Tensor) -> None:
        for part in self.parts():
            self._optimizer.state[part]["step"].copy_(steps)

    def _part_of(self, value: Tensor, parameter: Any) -> Tensor:
        size = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        return padded.narrow(0, size * dist.get_rank(), size)

    def _begin_moments(self) -> None:
        """A step with no gradient at a learning rate of zero, after which there are moments to read and write; it counts for nothing."""
        groups, parts = self._optimizer.param_groups, self.parts()
        rates = [group["lr"] for group in groups]
        set_learning_rate(self._optimizer, 0.0)
        ours = [part for part in parts if part.grad is None]  # where ZeRO offloads there are lasting gradients, all zeros
        for part in ours:
            part.grad = torch.zeros_like(part)
        if self._sharded:
            for number in range(len(parts)):
                self._zero._optimizer_step(number)
        else:
            self._optimizer.step()
            self._zero._lazy_init_hp_params_optimizer_state()  # DeepSpeed does so after a step of the first group, and misses the others
        for part in ours:
            part.grad = None
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self.set_steps(torch.zeros(()))

"""What stands between the trainer and whatever shards and steps the model."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titans_scale.config import TitansConfig
from titans_scale.models import TitansLM
from titans_scale.parallel.apply import parallelize
from titans_scale.parallel.fsdp2 import Fsdp2Engine
from titans_scale.parallel.mesh import Mesh
from titans_scale.parallel.zero.engine import ZeroEngine

OptimizerOf = Callable[[nn.Module], torch.optim.Optimizer]


class Engine(Protocol):
    """A model on all ranks and the optimizer that steps it. All ranks call every method together."""

    model: TitansLM
    """For forward passes: its `loss_sum` and its call."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch.

        Args:
            loss: this rank's part of the loss, divided by the global number of target tokens.   last: of this optimizer step.
        """

    def step(self, *, lr: float, max_norm: float | None) -> Tensor:
        """Clip the gradients' global norm to max_norm (None: leave it), update the weights, drop the gradients.

        Returns:
            The norm before clipping, the same number on every rank, on the device: no host sync.
        """

    def release(self) -> None:
        """After a forward pass without a backward pass: free what was gathered for it."""

    def shards(self) -> list[Tensor]:
        """This rank's part of the weights, in the optimizer's precision: to look at, not to change."""

    def state(self) -> dict[str, Any]:
        """Parameters and the optimizer's moments, {"model": {name: tensor}, "optimizer": {name: {moment: tensor}}}, by qualified
        name and of the whole model's shapes (DTensors, or the same tensor on every rank): what a checkpoint holds.
        """

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave, filled in from a checkpoint."""


def build_engine(config: TitansConfig, mesh: Mesh, device: torch.device, optimizer_of: OptimizerOf) -> Engine:
    """The engine of engine.name, with the model's initial values.

    Raises:
        ConfigError: it cannot run here.
    """
    with torch.device("meta"):
        model = TitansLM(config.model)
    if config.engine.name == "deepspeed":
        return ZeroEngine(model, config, mesh, device, optimizer_of)
    parallelize(model, config, mesh, device)
    return Fsdp2Engine(model, optimizer_of(model), device, reshard=config.parallelism.reshard_after_forward)

"""The engine on DeepSpeed's ZeRO: all ranks share the optimizer's state (stage 1), gradients too (2), or parameters too (3)."""

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from titans_scale.config import ConfigError, TitansConfig
from titans_scale.models import TitansLM
from titans_scale.parallel.apply import resolve_precision, wrap_blocks
from titans_scale.parallel.fsdp2 import set_learning_rate
from titans_scale.parallel.mesh import Mesh
from titans_scale.parallel.zero.settings import deepspeed_settings
from titans_scale.parallel.zero.weights import ZeroWeights


class ZeroEngine:
    """A model under ZeRO and its optimizer; see `Engine`. Unlike FSDP2's, a step makes the host wait for the device: DeepSpeed looks
    whether the gradients are finite, and leaves out the update if they are not. The norm returned is infinite then.

    Args:
        model: on the meta device.   mesh, device: of this rank.   optimizer_of: torch's optimizer over a model's parameters.
    Raises:
        ConfigError: deepspeed is not installed, or engine.config cannot be used.
    """

    def __init__(
        self,
        model: TitansLM,
        config: TitansConfig,
        mesh: Mesh,
        device: torch.device,
        optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    ) -> None:
        self.model = model
        self._mesh, self._device, self._stage = mesh.fsdp, device, config.engine.zero_stage
        wrap_blocks(model, config)
        self._engine = start_deepspeed(model, config, device, optimizer_of)
        self._weights = ZeroWeights(self._engine, self._stage)
        with torch.device("meta"):
            whole = TitansLM(config.model)  # this one has lost its shapes, in stage 3
        for name, value in whole.initial_values(config.training.seed):
            self._weights.set_weight(name, value)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Stage 1 reduces gradients on the last micro-batch only; 2 and 3 with each, as nobody keeps them whole."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks, and in stage 3 knows no sum.
        self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def step(self, *, lr: float, max_norm: float | None) -> Tensor:
        self._engine.optimizer.clip_grad = max_norm or 0.0
        set_learning_rate(self._engine.basic_optimizer, lr)
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._device)

    def release(self) -> None:
        if self._stage == 3:
            self._engine.empty_partition_cache()

    def shards(self) -> list[Tensor]:
        return self._weights.parts()

    def state(self) -> dict[str, Any]:
        """As FSDP2's, in rows over the ranks, so that either engine reads the other's: at most one tensor is whole at a time."""
        weights = self._weights
        return {
            "model": {name: self._in_rows(weights.weight(name)) for name in weights.names},
            "optimizer": {
                name: {"step": weights.steps.clone()} | {moment: self._in_rows(weights.moment(name, moment)) for moment in weights.moments}
                for name in weights.names
            },
        }

    def load(self, state: dict[str, Any]) -> None:
        for name in self._weights.names:
            self._weights.set_weight(name, state["model"][name].full_tensor())
            moments = state["optimizer"][name]
            for moment in self._weights.moments:
                self._weights.set_moment(name, moment, moments[moment].full_tensor())
        self._weights.set_steps(moments["step"])  # one count for all
        self.release()  # what was gathered before is out of date

    def _in_rows(self, whole: Tensor) -> DTensor:
        return distribute_tensor(whole, self._mesh, [Shard(0)], src_data_rank=None)


def start_deepspeed(
    model: TitansLM, config: TitansConfig, device: torch.device, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]
) -> Any:
    """DeepSpeed's engine around a model from the meta device, whose weights are allocated and still have no values.

    Raises:
        ConfigError: as `ZeroEngine`.
    """
    deepspeed = import_deepspeed(device)
    precision = resolve_precision(config.training.dtype, device)
    settings = deepspeed_settings(config, ranks=dist.get_world_size(), precision=precision)
    dtype = getattr(torch, precision)
    deepspeed.init_distributed(dist_init_required=False)  # around the process group that there is
    try:
        deepspeed.DeepSpeedConfig(settings)
    except (AssertionError, ValueError, deepspeed.DeepSpeedConfigError) as error:
        raise ConfigError(f"DeepSpeed refuses engine.config {config.engine.config}: {' '.join(str(error).split())}") from error
    if config.engine.zero_stage == 3:
        # Blocks read parameters of their own, and call their children's methods: a block's are there while it is called, all or none.
        deepspeed.utils.set_z3_leaf_modules(model, [type(model.blocks[0])])
        for module in [*model.blocks, *(child for child in model.children() if child is not model.blocks)]:
            deepspeed.zero.Init(module.to_empty(device=device).to(dtype), config_dict_or_path=settings)  # at most one is whole
    else:
        model.to_empty(device=device)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings, dist_init_required=False)
    if config.engine.zero_stage == 3 and model.head is None:
        deepspeed.zero.register_external_parameter(model, model.embedding.weight)  # the model itself uses it, as the head
    run_as_forward(model, "loss_sum", engine)
    return engine


def run_as_forward(model: TitansLM, name: str, engine: Any) -> None:
    """Let a method of the model run as the engine's forward pass: around that alone DeepSpeed does its work."""
    method = getattr(model, name)

    def through_engine(*arguments: Any, **options: Any) -> Any:
        model.forward = method  # type: ignore[method-assign]
        try:
            return engine(*arguments, **options)
        finally:
            del model.forward

    setattr(model, name, through_engine)


def import_deepspeed(device: torch.device) -> Any:
    """The package, on the device's kind of accelerator, quiet.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            'engine.name is deepspeed, and that is not installed: pip install "titans-scale[deepspeed]", or set engine.name to fsdp2'
        )
    os.environ["DS_ACCELERATOR"] = device.type  # read once, at the import
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, in a run without torchrun too
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it builds C++ on a CPU, which only its inference uses
    # torch 2.13's own names for what DeepSpeed calls by the older ones
    warnings.filterwarnings("ignore", message="`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated")
    return deepspeed

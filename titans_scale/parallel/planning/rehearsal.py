"""A step of a run rehearsed by one rank of a fake world: what that rank holds, keeps and sends. Nothing large is allocated.

The whole model is built and sharded as a run would, which gives parameters and optimizer state. The step itself is rehearsed at two small
depths: blocks are alike, so every further one adds what the last of those did. Not compiled, and without documents of their own.
"""

from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titans_scale.config import ConfigError, TitansConfig
from titans_scale.parallel.engine import build_engine
from titans_scale.parallel.limits import check_layout
from titans_scale.parallel.mesh import Mesh, mesh_sizes
from titans_scale.parallel.planning.fake_world import fake_world, like_a_gpu, without_memory
from titans_scale.parallel.planning.meter import GRADIENTS, WHOLE_GRADIENTS, Inside, Meter
from titans_scale.parallel.planning.traffic import MESSAGES, Pass, Traffic, total_of


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What one rank does in one step."""

    rank: int
    parameters_here: int
    """Numbers in this rank's shards."""
    state_bytes: dict[str, int]
    """Parameters and optimizer state: there all the time."""
    peak_bytes: dict[str, int]
    """What forward and backward add to it at their worst moment, by kind."""
    passes: list[Pass]
    """The micro-batches of a step; those between the first and the last are taken to be alike."""
    optimizer: Traffic
    """Of clipping and stepping."""

    @property
    def traffic(self) -> Traffic:
        """Of the whole step."""
        return total_of(self.passes, self.optimizer)

    @property
    def total_bytes(self) -> int:
        return sum(self.state_bytes.values()) + sum(self.peak_bytes.values())


def rehearse(
    config: TitansConfig,
    *,
    world_size: int,
    rank: int = 0,
    accumulation_steps: int,
    surroundings: AbstractContextManager[None] | None = None,
) -> Rehearsal:
    """One rank's step in a world of that size. The process must have no process group.

    Args:
        accumulation_steps: micro-batches of the step.
        surroundings: how the model's operators are to behave; None: as on a GPU.
    Raises:
        ConfigError: a layout that cannot be, no such rank, or one that is told by another what it will receive.
    """
    sizes = mesh_sizes(config.parallelism, world_size)
    check_layout(config, sizes)
    if rank // sizes.tensor % sizes.context:
        beginning = rank - rank // sizes.tensor % sizes.context * sizes.tensor
        raise ConfigError(f"rank {rank} goes on from a state that others tell it of; rehearse rank {beginning}, which has the first tokens")
    depth, depths = config.model.num_layers, depths_rehearsed(config)
    with fake_world(world_size, rank):
        mesh = Mesh(sizes, "cpu")
        with without_memory(), surroundings or like_a_gpu():
            parameters, state_bytes = _held(_as_rehearsed(config, depth), mesh)
            inside: Inside = {}
            steps = [_step(_as_rehearsed(config, layers), mesh, accumulation_steps, inside) for layers in depths]
    step = steps[0] if len(steps) == 1 else steps[0].deeper(steps[1], depth - depths[0])
    passes = step.passes
    if accumulation_steps > 1:
        first, last = passes
        passes = [first, *[Pass(forward=last.forward, backward=first.backward)] * (accumulation_steps - 2), last]
    return Rehearsal(
        rank=rank,
        parameters_here=parameters,
        state_bytes=state_bytes,
        peak_bytes=step.peak,
        passes=passes,
        optimizer=step.optimizer,
    )


def depths_rehearsed(config: TitansConfig) -> list[int]:
    """Numbers of blocks: two from which on each block adds the same, or that of the model if it has no more."""
    shallow = 2 + config.parallelism.prefetch if config.parallelism.reshard_after_forward else 1  # as many as are gathered at once
    return [shallow, shallow + 1] if config.model.num_layers > shallow + 1 else [config.model.num_layers]


@dataclass(frozen=True, kw_only=True)
class _Step:
    peak: dict[str, int]
    passes: list[Pass]
    optimizer: Traffic

    def deeper(self, other: "_Step", blocks: int) -> "_Step":
        """With so many blocks more, from a step that has one more."""
        passes = [
            Pass(forward=_deeper(a.forward, b.forward, blocks), backward=_deeper(a.backward, b.backward, blocks))
            for a, b in zip(self.passes, other.passes, strict=True)
        ]
        peak = {kind: size + blocks * (other.peak[kind] - size) for kind, size in self.peak.items()}
        return _Step(peak=peak, passes=passes, optimizer=_deeper(self.optimizer, other.optimizer, blocks))


def _deeper(fewer: Traffic, more: Traffic, blocks: int) -> Traffic:
    total = Traffic()
    total.add_all(fewer, 1 - blocks)
    total.add_all(more, blocks)
    return total


def _step(config: TitansConfig, mesh: Mesh, accumulation_steps: int, inside: Inside) -> _Step:
    """The first and the last micro-batch of a step, and the optimizer."""
    engine = build_engine(config, mesh, torch.device("cpu"), _adamw)
    meter = Meter(_Dimensions(mesh), inside=inside)
    tokens_BT = torch.zeros(config.training.micro_batch_size, config.training.sequence_length // mesh.sizes.context, dtype=torch.int64)
    passes = []
    with meter:
        for last in [False, True] if accumulation_steps > 1 else [True]:
            loss = engine.model.loss_sum(tokens_BT, tokens_BT, logits_bytes=config.training.logits_bytes)
            forward = _taken(meter)
            engine.backward(loss, last=last)
            del loss
            meter.call_the_rest(GRADIENTS if last else WHOLE_GRADIENTS)
            passes.append(Pass(forward=forward, backward=_taken(meter)))
        peak = dict(meter.peak)
        engine.step(lr=config.optimizer.lr, max_norm=config.training.max_grad_norm)
    return _Step(peak=peak, passes=passes, optimizer=_taken(meter))


def _taken(meter: Meter) -> Traffic:
    """The collectives since the last time."""
    traffic, meter.traffic = meter.traffic, Traffic()
    return traffic


def _held(config: TitansConfig, mesh: Mesh) -> tuple[int, dict[str, int]]:
    """Numbers in this rank's shards, and the bytes of what is there all the time. Shards are padded to be even."""
    engine = build_engine(config, mesh, torch.device("cpu"), _adamw)
    local = [_local(parameter) for parameter in engine.model.parameters()]
    parameters = sum(x.untyped_storage().nbytes() for x in local)
    return sum(x.numel() for x in local), {
        "parameters": parameters,
        "optimizer state": 2 * sum(x.numel() * x.element_size() for x in local),
    }


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def _as_rehearsed(config: TitansConfig, layers: int) -> TitansConfig:
    """In the precision of a GPU, and not compiled."""
    config = deepcopy(config)
    config.model.num_layers = layers
    config.compile.enabled = False
    if config.training.dtype == "auto":
        config.training.dtype = "bfloat16"
    return config


class _Dimensions:
    """Names of a mesh's dimensions. Groups of the same ranks are one: then messages are context's, all else is the parameters'."""

    def __init__(self, mesh: Mesh) -> None:
        self._names: dict[str, str] = {}
        for part in (mesh.context, mesh.tensor, mesh.fsdp):
            if part is not None:
                self._names |= {part.get_group(name).group_name: name for name in part.mesh_dim_names or ()}

    def __call__(self, group: dist.ProcessGroup, kind: str) -> str:
        return "context" if kind in MESSAGES else self._names.get(group.group_name, "all ranks")

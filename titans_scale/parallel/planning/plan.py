"""The plan of a run on a cluster: the estimate by formulas and, where the engine can be rehearsed, a step rehearsed and timed."""

from dataclasses import asdict, dataclass
from typing import Any

from titans_scale.config import ConfigError, ParallelismConfig, TitansConfig
from titans_scale.parallel.mesh import DIMENSIONS
from titans_scale.parallel.planning.estimate import Estimate, estimate
from titans_scale.parallel.planning.memory_plan import ALLOWANCE_BYTES, outside_share
from titans_scale.parallel.planning.rehearsal import Rehearsal, rehearse
from titans_scale.parallel.planning.sharding_traffic import sharding_passes
from titans_scale.parallel.planning.step_time import Links, StepTime, predict
from titans_scale.parallel.planning.traffic import Traffic, total_of

SHORT_NAMES = dict(zip(("replicate", "shard", "context", "tensor"), DIMENSIONS, strict=True))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything `tools/estimate.py` shows."""

    estimate: Estimate
    gpu_bytes: dict[str, int]
    """By what they are for, on one GPU: as rehearsed, else by formula."""
    rehearsal: Rehearsal | None = None
    """None: not asked for, or an engine that cannot be rehearsed."""
    traffic: Traffic | None = None
    """Of one rank in one step; None: no formula, and no rehearsal."""
    time: StepTime | None = None

    def to_dict(self) -> dict[str, Any]:
        """Fields, sums and derived numbers, for machines."""
        result = self.estimate.to_dict() | {"gpu_bytes": self.gpu_bytes, "gpu_bytes_total": sum(self.gpu_bytes.values())}
        if self.rehearsal is not None:
            result |= {"rank": self.rehearsal.rank, "parameters_here": self.rehearsal.parameters_here}
        if self.traffic is not None and self.time is not None:
            result |= {
                "collectives_per_step": self.traffic.to_dicts(),
                "step_seconds": asdict(self.time),
                "tokens_per_second_predicted": self.estimate.tokens / self.estimate.steps / self.time.step,
            }
        return result


def plan(
    config: TitansConfig,
    *,
    world_size: int,
    rank: int = 0,
    mfu: float = 0.4,
    peak_tflops: float | None = None,
    links: Links | None = None,
    rehearsed: bool = True,
) -> Plan:
    """Plan a run of this configuration on `world_size` GPUs.

    Args:
        rank: the one that is rehearsed.   links: between GPUs; None: those of H100 machines.
        rehearsed: False: formulas alone, in a second; they know no time of tensor and context parallelism. DeepSpeed has nothing else, and
            no time at all.
    Raises:
        ConfigError: as `estimate`, or no such rank.
    """
    formulas = estimate(config, world_size=world_size, mfu=mfu, peak_tflops=peak_tflops)
    sizes, training = formulas.sizes, config.training
    if config.engine.name == "deepspeed" or (not rehearsed and sizes.same_data > 1):
        return Plan(estimate=formulas, gpu_bytes=formulas.gpu_bytes)
    rehearsal, gpu_bytes, optimizer = None, formulas.gpu_bytes, Traffic()
    if rehearsed:
        rehearsal = rehearse(config, world_size=world_size, rank=rank, accumulation_steps=formulas.accumulation_steps)
        held = {} if config.parallelism.cpu_offload else rehearsal.state_bytes
        gpu_bytes = held | rehearsal.peak_bytes | {"allowance": ALLOWANCE_BYTES}
        passes, optimizer = rehearsal.passes, rehearsal.optimizer
    else:
        passes = sharding_passes(config, sizes, formulas.accumulation_steps)
    tokens = training.micro_batch_size * training.sequence_length / sizes.same_data
    time = predict(
        passes,
        optimizer,
        links or Links(),
        micro_batch_flops=tokens * sum(formulas.training_flops_per_token.values()),
        flops_per_second=formulas.peak_tflops * 1e12 * mfu,
        layers=config.model.num_layers,
        context=sizes.context,
        root_share=outside_share(config, sum(formulas.parameters.values())),
    )
    return Plan(estimate=formulas, gpu_bytes=gpu_bytes, rehearsal=rehearsal, traffic=total_of(passes, optimizer), time=time)


def set_mesh(parallelism: ParallelismConfig, mesh: str) -> None:
    """Set the sizes that a text like "replicate=64,shard=8,context=1,tensor=1" names; the others stay.

    Raises:
        ConfigError: no such dimension, or no number.
    """
    for part in mesh.split(","):
        name, _, size = part.strip().partition("=")
        if name not in SHORT_NAMES:
            raise ConfigError(f"--mesh has {part.strip()!r}; write {', '.join(f'{known}=N' for known in SHORT_NAMES)}, any of them")
        try:
            setattr(parallelism, SHORT_NAMES[name], int(size))
        except ValueError as error:
            raise ConfigError(f"--mesh has {part.strip()!r}; {name} takes a whole number, or -1 for all ranks that are left") from error

"""What a run will take before it takes it, by formulas: parameters, FLOPs, memory of one GPU, time. An estimate, not a measurement."""

from dataclasses import asdict, dataclass
from typing import Any

from titans_scale.config import ConfigError, TitansConfig
from titans_scale.models.flops import forward_flops, training_flops
from titans_scale.models.plans import parameters_by_part
from titans_scale.parallel.limits import check_layout
from titans_scale.parallel.mesh import MeshSizes, mesh_sizes
from titans_scale.parallel.planning.memory_plan import gpu_bytes

H100_TFLOPS = 989.0
"""Peak of an H100 or H200 SXM in bfloat16 without sparsity."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What formulas say of a run."""

    parameters: dict[str, int]
    """By part; a tied head is counted once, with the embedding."""
    forward_flops_per_token: dict[str, float]
    """By part."""
    training_flops_per_token: dict[str, float]
    """Forward and backward, by part. Recomputed activations are not counted."""
    gpu_bytes: dict[str, int]
    """By what they are for, on one GPU."""
    world_size: int
    sizes: MeshSizes
    accumulation_steps: int
    """Micro-batches of one rank for one optimizer step."""
    steps: int
    tokens: int
    """Of the whole run."""
    mfu: float
    peak_tflops: float
    """Of one GPU."""

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together, at this MFU."""
        return self.world_size * self.mfu * self.peak_tflops * 1e12 / sum(self.training_flops_per_token.values())

    @property
    def hours(self) -> float:
        """Of the whole run, validation and checkpoints left out."""
        return self.tokens / self.tokens_per_second / 3600

    def to_dict(self) -> dict[str, Any]:
        """Fields, sums and derived numbers, for machines."""
        totals = {
            "parameters_total": sum(self.parameters.values()),
            "forward_flops_per_token_total": sum(self.forward_flops_per_token.values()),
            "training_flops_per_token_total": sum(self.training_flops_per_token.values()),
            "gpu_bytes_total": sum(self.gpu_bytes.values()),
            "tokens_per_second": self.tokens_per_second,
            "hours": self.hours,
            "gpu_hours": self.hours * self.world_size,
        }
        return asdict(self) | totals


def estimate(config: TitansConfig, *, world_size: int = 1, mfu: float = 0.4, peak_tflops: float | None = None) -> Estimate:
    """Estimate a run of this configuration on `world_size` GPUs.

    Args:
        mfu: model FLOPs utilisation that the run is expected to reach, in (0, 1].
        peak_tflops: of one GPU; None: metrics.peak_tflops, or else an H100's.
    Raises:
        ConfigError: numbers out of range, a mesh that does not fit the world size, a layout that cannot be, or a global batch that does
            not come out even over the ranks that read different data.
    """
    peak_tflops = peak_tflops or config.metrics.peak_tflops or H100_TFLOPS
    if world_size < 1:
        raise ConfigError(f"the world size is {world_size}; it must be at least 1")
    if not 0 < mfu <= 1:
        raise ConfigError(f"the MFU is {mfu}; it must be above 0 and at most 1 (0.4 means 40 percent)")
    if peak_tflops <= 0:
        raise ConfigError(f"the peak is {peak_tflops} TFLOP/s; it must be positive")
    training, length = config.training, config.training.sequence_length
    sizes = mesh_sizes(config.parallelism, world_size)
    check_layout(config, sizes)
    accumulation_steps, rest = divmod(training.global_batch_tokens, length * training.micro_batch_size * sizes.data)
    if rest or not accumulation_steps:
        raise ConfigError(
            f"training.global_batch_tokens {training.global_batch_tokens} is not a multiple of sequence_length {length}"
            f" * micro_batch_size {training.micro_batch_size} * {sizes.data} ranks that read different data; change one of"
            " them, or let ranks share sequences (parallelism.context_parallel)"
        )
    parameters = parameters_by_part(config.model)
    return Estimate(
        parameters=parameters,
        forward_flops_per_token={part: flops / length for part, flops in forward_flops(config.model, length).items()},
        training_flops_per_token={part: flops / length for part, flops in training_flops(config.model, length).items()},
        gpu_bytes=gpu_bytes(config, sum(parameters.values()), sizes, accumulation_steps),
        world_size=world_size,
        sizes=sizes,
        accumulation_steps=accumulation_steps,
        steps=training.steps,
        tokens=training.steps * training.global_batch_tokens,
        mfu=mfu,
        peak_tflops=peak_tflops,
    )

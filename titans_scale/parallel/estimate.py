"""What a run will take before it takes it: parameters, FLOPs, memory of one GPU, time. An estimate, not a measurement.

The memory of one GPU is that of FSDP2 at the start of the last micro-batch's backward pass, where it peaks. Allocator, CUDA
context and communication buffers are a flat allowance; fragmentation is not modelled.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from titans_scale.config import ConfigError, TitansConfig
from titans_scale.models.flops import forward_flops, training_flops
from titans_scale.models.plans import keeps_result, parameters_by_part
from titans_scale.parallel.activations import block_activation_bytes
from titans_scale.parallel.mesh import mesh_sizes

GIB = 2**30
ALLOWANCE_BYTES = 2 * GIB
"""CUDA context, NCCL's buffers, workspaces of matrix products."""
H100_TFLOPS = 989.0
"""Peak of an H100 or H200 SXM in bfloat16 without sparsity."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Everything `tools/estimate.py` shows."""

    parameters: dict[str, int]
    """By part; a tied head is counted once, with the embedding."""
    forward_flops_per_token: dict[str, float]
    """By part."""
    training_flops_per_token: dict[str, float]
    """Forward and backward, by part. Recomputed activations are not counted."""
    gpu_bytes: dict[str, int]
    """By what they are for, on one GPU."""
    world_size: int
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
        ConfigError: numbers out of range, or a global batch or mesh that does not fit the world size.
    """
    peak_tflops = peak_tflops or config.metrics.peak_tflops or H100_TFLOPS
    if world_size < 1:
        raise ConfigError(f"the world size is {world_size}; it must be at least 1")
    if not 0 < mfu <= 1:
        raise ConfigError(f"the MFU is {mfu}; it must be above 0 and at most 1 (0.4 means 40 percent)")
    if peak_tflops <= 0:
        raise ConfigError(f"the peak is {peak_tflops} TFLOP/s; it must be positive")
    training, length = config.training, config.training.sequence_length
    accumulation_steps, rest = divmod(training.global_batch_tokens, length * training.micro_batch_size * world_size)
    if rest or not accumulation_steps:
        raise ConfigError(
            f"training.global_batch_tokens {training.global_batch_tokens} is not a multiple of sequence_length {length}"
            f" * micro_batch_size {training.micro_batch_size} * {world_size} ranks; change one of them"
        )
    parameters = parameters_by_part(config.model)
    return Estimate(
        parameters=parameters,
        forward_flops_per_token={part: flops / length for part, flops in forward_flops(config.model, length).items()},
        training_flops_per_token={part: flops / length for part, flops in training_flops(config.model, length).items()},
        gpu_bytes=_gpu_bytes(config, sum(parameters.values()), world_size, accumulation_steps),
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        steps=training.steps,
        tokens=training.steps * training.global_batch_tokens,
        mfu=mfu,
        peak_tflops=peak_tflops,
    )


def _gpu_bytes(config: TitansConfig, parameters: int, world_size: int, accumulation_steps: int) -> dict[str, int]:
    """Peak of one GPU, part by part.

    parameters, gradients, optimizer state: float32, 4 + 4 + 8 bytes a parameter, over the ranks of one shard group.
    gathered parameters: the whole model in the compute precision; with reshard_after_forward the embedding, which stays, and
        three blocks: the one at work, the one before it, and the one fetched ahead.
    gradients before reduction: a block's while it is at work; with more than one micro-batch the whole model's in float32.
    activations: what the forward pass of each block leaves, and of one more for the gradients on their way; with activation
        checkpointing less of all blocks but the one at work.
    logits and loss: with training.max_logits_mib that much or less, and the head's gradient in float32; else the logits in the
        compute precision, and three copies in float32: log-probabilities and two gradients.
    """
    model, training = config.model, config.training
    dtype = torch.float32 if training.dtype == "float32" else torch.bfloat16
    shards = mesh_sizes(config.parallelism, world_size).shard
    outside = model.dim * model.vocab_size * (1 if model.tie_embeddings else 2)
    per_block = (parameters - outside) // model.num_layers
    gathered = outside + 3 * per_block if config.parallelism.reshard_after_forward else parameters
    micro_batch_tokens = training.micro_batch_size * training.sequence_length
    block_bytes = partial(
        block_activation_bytes, model, batch_size=training.micro_batch_size, sequence_length=training.sequence_length, dtype=dtype
    )
    whole = block_bytes()
    match config.activation_checkpoint.mode:
        case "none":
            kept = whole
        case "selective":
            kept = block_bytes(keeps=keeps_result)
        case "full":
            kept = micro_batch_tokens * model.dim * dtype.itemsize
    logits = micro_batch_tokens * model.vocab_size
    if training.logits_bytes is None:
        logits_and_loss = logits * (dtype.itemsize + 3 * 4)
    else:
        logits_and_loss = min(2 * 4 * logits, training.logits_bytes) + 4 * model.vocab_size * model.dim
    return {
        "parameters": 4 * parameters // shards,
        "gradients": 4 * parameters // shards,
        "optimizer state": 8 * parameters // shards,
        "gathered parameters": gathered * dtype.itemsize,
        "gradients before reduction": 4 * parameters if accumulation_steps > 1 else 2 * per_block * dtype.itemsize,
        "activations": (model.num_layers - 1) * kept + 2 * whole,
        "logits and loss": logits_and_loss,
        "allowance": ALLOWANCE_BYTES,
    }


def table(result: Estimate) -> str:
    """The estimate as text for a terminal."""
    lines = ["parameters"]
    lines += _rows(result.parameters, "total", lambda n: f"{n / 1e6:,.1f} M")
    lines += ["", "FLOPs of a token, forward"]
    lines += _rows(result.forward_flops_per_token, "total", lambda n: f"{n / 1e9:,.3f} G")
    lines += ["", "FLOPs of a token, forward and backward"]
    lines += _rows(result.training_flops_per_token, "total", lambda n: f"{n / 1e9:,.3f} G")
    lines += ["", f"memory of one GPU of {result.world_size}, estimated ({result.accumulation_steps} micro-batches a step)"]
    lines += _rows(result.gpu_bytes, "peak", lambda n: f"{n / GIB:,.2f} GiB")
    lines += [
        "",
        f"the whole run on {result.world_size} x {result.peak_tflops:g} TFLOP/s at {result.mfu:.0%} MFU",
        f"  {'steps':28}{result.steps:>16,}",
        f"  {'tokens':28}{result.tokens / 1e9:>14,.3f} G",
        f"  {'tokens per second':28}{result.tokens_per_second:>16,.0f}",
        f"  {'time':28}{_duration(result.hours):>16}",
        f"  {'GPU-hours':28}{result.hours * result.world_size:>16,.1f}",
    ]
    return "\n".join(lines)


def _rows(parts: dict[str, Any], total: str, written: Any) -> list[str]:
    whole = sum(parts.values())
    rows = [f"  {name:28}{written(value):>16}{value / whole:>8.1%}" for name, value in parts.items() if value]
    return [*rows, f"  {total:28}{written(whole):>16}"]


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"

"""What DeepSpeed is told: our settings in its words, and beside them the JSON file of engine.config, which must not contradict them."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from titans_scale.config import ConfigError, TitansConfig, flatten

Json = dict[str, Any]

AUTO = "auto"
"""A value in the file that means ours, as in files written for Hugging Face."""
FREE = (
    *("aio", "comet", "comms_logger", "csv_monitor", "disable_python_gc", "dump_state", "flops_profiler", "log_level", "memory_breakdown"),
    *("steps_per_print", "tensorboard", "timers", "wall_clock_breakdown", "wandb"),
)
"""Top-level keys that the file alone decides; besides, whatever `_decided` does not name of a block such as zero_optimization."""
DECIDED_ELSEWHERE = {
    "optimizer": "optimizer",
    "scheduler": "lr_scheduler",
    "activation_checkpointing": "activation_checkpoint",
    "compile": "compile",
    "checkpoint": "checkpoint",
    "data_efficiency": "data",
    "curriculum_learning": "data",
    "amp": "training.dtype",
    "torch_autocast": "training.dtype",
    "tensor_parallel": "parallelism.tensor_parallel",
    "sequence_parallel_size": "parallelism.context_parallel",
}
"""Blocks of DeepSpeed's whose matter is settled by keys or sections of ours, and how those are called."""


def deepspeed_settings(config: TitansConfig, *, ranks: int, precision: Literal["auto", "float32", "bfloat16"]) -> Json:
    """The configuration for `deepspeed.initialize`.

    Args:
        ranks: of the run.   precision: "auto" as long as the device is not known; bf16.enabled then agrees with anything.
    Raises:
        ConfigError: the file is missing or no JSON, has a key that is unknown or not for it to decide, or a value that contradicts ours.
    """
    settings: Json = {"timers": {"throughput": {"enabled": False}}}  # or the host would wait for the device in every step
    if config.engine.config is not None:
        path = Path(config.engine.config)
        given = _read(path)
        decided = {key: (ours, value) for key, ours, value in _decided(config, ranks, precision)}
        _check_keys(given, {key.split(".")[0] for key in decided}, path)
        for key, value in flatten(given):
            if value not in (None, AUTO) and any(other.startswith(f"{key}.") for other in decided):
                raise ConfigError(f"{key} is {json.dumps(value)} in {path}; it has to be a mapping of settings")
            if key in decided and value != AUTO and not _same(value, decided[key][1]):
                ours, our_value = decided[key]
                raise ConfigError(
                    f"{key} is {json.dumps(value)} in {path}, and {ours} makes it {json.dumps(our_value)};"
                    f' change one of them, or write "{AUTO}" there'
                )
        settings |= given
    for key, _, value in _decided(config, ranks, precision):
        _put(settings, key, value)
    return settings


def _decided(config: TitansConfig, ranks: int, precision: str) -> Iterator[tuple[str, str, Any]]:
    """DeepSpeed's dotted key, what of ours decides it, and the value."""
    training, stage = config.training, config.engine.zero_stage
    offload = "cpu" if config.parallelism.cpu_offload else "none"
    sequences = training.global_batch_tokens // training.sequence_length
    yield "train_batch_size", "training.global_batch_tokens / training.sequence_length", sequences
    yield "train_micro_batch_size_per_gpu", "training.micro_batch_size", training.micro_batch_size
    steps = sequences // (training.micro_batch_size * ranks)
    yield "gradient_accumulation_steps", "training.global_batch_tokens / (sequence_length * micro_batch_size * ranks)", steps
    yield "gradient_clipping", "training.max_grad_norm", training.max_grad_norm or 0.0
    yield "zero_optimization.stage", "engine.zero_stage", stage
    yield "zero_optimization.offload_optimizer.device", "parallelism.cpu_offload", offload
    yield "zero_optimization.offload_param.device", "parallelism.cpu_offload", offload if stage == 3 else "none"
    if precision != "auto":
        yield "bf16.enabled", "training.dtype", precision == "bfloat16"
    never = "training.dtype, which knows no float16 and keeps the optimizer in float32,"
    yield "fp16.enabled", never, False
    yield "bf16.bf16_master_weights_and_grads", never, False
    yield "bf16.bf16_optimizer_states", never, False
    sums = "the rule that gradients are summed over ranks in float32"
    yield "communication_data_type", sums, "fp32"
    yield "data_types.grad_accum_dtype", sums, "fp32"
    yield "gradient_allreduce_op", sums, "mean"  # the engine multiplies by the number of ranks: stage 3 cannot sum
    yield "prescale_gradients", sums, False
    yield "gradient_predivide_factor", sums, 1.0
    yield "zero_optimization.compute_grad_norm", "the norm that every step reports", True
    if config.activation_checkpoint.mode == "selective":
        # It adds the bias in place, to a product that was kept to be used again.
        yield "zero_optimization.memory_efficient_linear", "activation_checkpoint.mode", False
    yield "zero_force_ds_cpu_optimizer", "the optimizer, which is torch's AdamW", False


def _read(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.config {path} cannot be read ({error.strerror}); examples are in configs/deepspeed") from error
    except ValueError as error:
        raise ConfigError(f"engine.config {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"engine.config {path} holds a {type(content).__name__}; DeepSpeed's settings are a mapping")
    return content


def _check_keys(given: Json, decided: set[str], path: Path) -> None:
    known = {*FREE, *decided}
    for key in given:
        if key in DECIDED_ELSEWHERE:
            raise ConfigError(f"{path} has {key!r}, which {DECIDED_ELSEWHERE[key]} decides here; take it out of the file")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {key!r} in {path}; {hint}")


def _same(given: Any, ours: Any) -> bool:
    """JSON's null is DeepSpeed's "none" for a device; true is not 1."""
    if isinstance(given, bool) or isinstance(ours, bool):
        return given is ours
    return given == ours or (given is None and ours == "none")


def _put(settings: Json, dotted_key: str, value: Any) -> None:
    *blocks, key = dotted_key.split(".")
    for block in blocks:
        if not isinstance(settings.get(block), dict):
            settings[block] = {}
        settings = settings[block]
    settings[key] = value

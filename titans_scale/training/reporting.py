"""What a run tells the world: sentences and step lines, metrics files, speed. Rank 0 speaks and writes; every rank measures."""

from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from titans_scale.config import TitansConfig, save_config
from titans_scale.models.attention import Backend
from titans_scale.models.plans import flops_per_token, num_parameters
from titans_scale.parallel import DistributedContext, MeshSizes
from titans_scale.parallel.apply import Precision
from titans_scale.training.metrics import Console, JsonLines, Record, Sink, TensorBoard
from titans_scale.training.throughput import Speedometer, peak_flops


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the settings left open, and was chosen for this machine."""

    precision: Precision
    """Of parameters and activations."""
    sizes: MeshSizes
    attention: Backend | None
    """None: the model has no attention."""


class Reporter:
    """Console, sinks and speedometer of one run, from the step it starts at.

    Args:
        step: the last step that is done already; later records of an interrupted run are dropped.
    Raises:
        RunError: the run's folder cannot be written.
    """

    def __init__(self, config: TitansConfig, context: DistributedContext, chosen: Chosen, *, step: int) -> None:
        self.failure: Exception | None = None
        """Why the last record could not be written. On this rank alone: the trainer sees to it that the others learn of it."""
        self.console = Console(step=step, steps=config.training.steps, speaks=context.is_main)
        self._sinks: list[Sink] = []
        run = Path(config.training.output_dir)
        with context.together():
            if context.is_main:
                save_config(config, run / "config.yaml")
                self._sinks.append(JsonLines(run / "metrics.jsonl", resumed_step=step))
                if config.metrics.tensorboard:
                    self._sinks.append(TensorBoard(run / "tensorboard", resumed_step=step))
                self._sinks.append(self.console)
        if step < config.training.steps:
            self.say(plan(config, context, chosen, step))
        peak = peak_flops(context.device, chosen.precision, config.metrics.peak_tflops)
        if peak is None:
            self.say("no MFU: the peak of this GPU in this precision is not known here; metrics.peak_tflops sets it")
        self.speed = Speedometer(context.device, flops_per_token=flops_per_token(config.model, config.training.sequence_length), peak=peak)

    def say(self, sentence: str) -> None:
        """One line on the console."""
        self.console.say(sentence)

    def write(self, step: int, record: Record) -> None:
        """The record of a step, to the console and all files, with the speed since the last one."""
        record = {**record, **self.speed.read()}
        try:
            for sink in self._sinks:
                sink.write(step, record)
        except OSError as error:
            self.failure = error

    def close(self) -> None:
        """Close the files."""
        for sink in [*self._sinks, self.console]:
            with suppress(OSError):
                sink.close()


def plan(config: TitansConfig, context: DistributedContext, chosen: Chosen, step: int) -> str:
    """One line: what was chosen, and what is left to do."""
    training, model, sizes, comm = config.training, config.model, chosen.sizes, config.comm
    ranks, data_ranks = (f"{count} rank{'s' if count > 1 else ''}" for count in (context.world_size, sizes.data))
    accumulation = training.global_batch_tokens // (training.sequence_length * training.micro_batch_size * sizes.data)
    reduced = " (gradients summed in float32)" if chosen.precision != "float32" else ""
    attention = [] if chosen.attention is None else [f"attention on {chosen.attention.name} ({chosen.attention.reason})"]
    what = [
        f"{model.variant} with {num_parameters(model):,} parameters in {chosen.precision}{reduced} on {ranks}"
        f" ({context.device.type}, {context.backend}, {sizes})",
        f"{training.global_batch_tokens:,} tokens a step = {data_ranks} * {accumulation} micro-batches"
        f" * {training.micro_batch_size} sequences * {training.sequence_length}",
        _engine(config),
        *attention,
        f"memory {model.memory.write_rule}, chunks of {model.memory.chunk_size}, scan on torch",
        f"blocks {'compiled' if config.compile.enabled else 'not compiled'}",
        f"activation checkpoints {config.activation_checkpoint.mode}",
        f"ranks wait {comm.init_timeout_seconds} s in the first step and {comm.train_timeout_seconds} s then",
        f"steps {step + 1} to {training.steps}",
    ]
    return f"{training.output_dir}: {'; '.join(what)}"


def _engine(config: TitansConfig) -> str:
    layout, offload = config.parallelism, "; weights and optimizer in host memory" if config.parallelism.cpu_offload else ""
    if config.engine.name == "deepspeed":
        return f"engine deepspeed {version('deepspeed')}, ZeRO stage {config.engine.zero_stage}{offload}"
    stage = "freed" if layout.reshard_after_forward else "kept"
    return f"engine fsdp2 of torch {version('torch')}, parameters {stage} after forward, {layout.prefetch} blocks ahead{offload}"

"""What a run tells the world: sentences and step lines, metrics files, speed. Rank 0 speaks and writes; every rank measures."""

from contextlib import suppress
from pathlib import Path

from titans_scale.config import TitansConfig, save_config
from titans_scale.models.plans import flops_per_token, num_parameters
from titans_scale.parallel import DistributedContext, MeshSizes
from titans_scale.parallel.apply import Precision
from titans_scale.training.metrics import Console, JsonLines, Record, Sink, TensorBoard
from titans_scale.training.throughput import Speedometer, peak_flops


class Reporter:
    """Console, sinks and speedometer of one run, from the step it starts at.

    Args:
        step: the last step that is done already; later records of an interrupted run are dropped.
    Raises:
        RunError: the run's folder cannot be written.
    """

    def __init__(self, config: TitansConfig, context: DistributedContext, *, precision: Precision, sizes: MeshSizes, step: int) -> None:
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
            self.say(plan(config, context, precision, sizes, step))
        peak = peak_flops(context.device, precision, config.metrics.peak_tflops)
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


def plan(config: TitansConfig, context: DistributedContext, precision: Precision, sizes: MeshSizes, step: int) -> str:
    """One line: what was chosen, and what is left to do."""
    training = config.training
    ranks, data_ranks = (f"{count} rank{'s' if count > 1 else ''}" for count in (context.world_size, sizes.data))
    accumulation = training.global_batch_tokens // (training.sequence_length * training.micro_batch_size * sizes.data)
    return (
        f"{training.output_dir}: {config.model.variant} with {num_parameters(config.model):,} parameters in {precision}"
        f" on {ranks} ({context.device.type}, {context.backend}, {sizes});"
        f" {training.global_batch_tokens:,} tokens a step = {data_ranks} * {accumulation} micro-batches"
        f" * {training.micro_batch_size} sequences * {training.sequence_length}; steps {step + 1} to {training.steps}"
    )

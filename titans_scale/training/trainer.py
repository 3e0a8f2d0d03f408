"""The main loop: shards -> stream -> step -> loss -> engine -> metrics -> checkpoint."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from titans_scale.config import TitansConfig
from titans_scale.data import Batch, Mixture, TokenStream, open_sources
from titans_scale.memory import MemoryProbe
from titans_scale.models.attention import choose_backend
from titans_scale.models.documents import document_starts, longest_document
from titans_scale.parallel import DistributedContext, Mesh, build_engine, check_layout, mesh_sizes
from titans_scale.parallel.apply import Precision, resolve_precision
from titans_scale.parallel.context import RunError, sentence_of
from titans_scale.parallel.runtime.environment import set_environment, unset_environment
from titans_scale.training.checkpoint import CheckpointManager, Counters
from titans_scale.training.checks import check_apart, check_global_batch, check_patience, check_same_data, check_shards
from titans_scale.training.garbage import ScheduledCollection
from titans_scale.training.loss import count_targets, loss_sum, own_tokens
from titans_scale.training.metrics import Record
from titans_scale.training.optimizer import build_optimizer
from titans_scale.training.reporting import Chosen, Reporter
from titans_scale.training.resume_rules import check_resumable
from titans_scale.training.run_folder import RunFolder
from titans_scale.training.schedule import learning_rate_factor
from titans_scale.training.signals import StopSignals
from titans_scale.training.stability import FiniteWatch, not_finite, weights_are_finite
from titans_scale.training.validation import validate


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step leaves to be logged, still on the device."""

    loss: Tensor
    """This rank's part of the global mean loss, the same on all ranks of a tensor-parallel group; the sum over the others is the mean."""
    grad_norm: Tensor
    """Global, before clipping."""
    lr: float
    input_tokens: int
    """Tokens this rank put through the model; those that it shares with others count for each in part."""


class Trainer:
    """One run, from its configuration to its last checkpoint: `Trainer(config).run()`.

    Every rank makes one and calls `run`, once. What is in the run's folder already is gone on with.

    Raises:
        ValueError: a configuration or shards that cannot work, in one sentence, on every rank.
    """

    def __init__(self, config: TitansConfig) -> None:
        self.config = config
        self.environment = set_environment(config)
        try:
            self.context = DistributedContext(config.comm, device=config.training.device)
        except BaseException:
            unset_environment(self.environment)
            raise
        self.run_folder: RunFolder | None = None
        self.report: Reporter | None = None
        self.step = 0
        """Optimizer steps taken."""
        self.n_tokens_seen = 0
        """Target tokens trained on, over all ranks."""
        self.retries = self.skipped_samples = 0
        """Of reading, over all ranks, since this process started."""
        try:
            with self.context.naming_the_lost():
                self._open()
                self._build()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Everything that touches files, checked before anything that takes time."""
        config, context = self.config, self.context
        training = config.training
        sizes = mesh_sizes(config.parallelism, context.world_size)
        check_layout(config, sizes)
        self.precision: Precision = resolve_precision(training.dtype, context.device)
        self.attention = None
        if config.model.variant != "lmm":
            model, dtype = config.model, getattr(torch, self.precision)
            self.attention = choose_backend(model.attention_backend, context.device, dtype, head_dim=model.dim // model.num_heads)
        check_global_batch(config, sizes.data)
        self.mesh = Mesh(sizes, context.device.type)
        with context.together():
            data = open_sources(config.data, "train", sequence_length=training.sequence_length)
            check_shards(data, config)
            check_patience(data, config, context.world_size)
            self.validation_data: Mixture | None = None
            if config.eval.interval:
                self.validation_data = open_sources(config.data, "validation", sequence_length=training.sequence_length)
                check_shards(self.validation_data, config)
                check_apart(data, self.validation_data)
            self.stream = TokenStream(
                data,
                micro_batch_size=training.micro_batch_size,
                global_batch_size=training.global_batch_tokens // training.sequence_length,
                rank=self.mesh.data_rank,
                world_size=sizes.data,
                shuffle=config.data.shuffle,
                shuffle_window=config.data.shuffle_window,
                seed=config.data.seed,
                skip=config.data.skip_steps or (),
                num_workers=config.data.num_workers,
            )
            if context.is_main:
                self.run_folder = RunFolder(Path(training.output_dir))
        check_same_data(context.gather(self.stream.identity()))
        self.stream_state = self.stream.state_dict()
        """Where the stream stood after the last step: what is fetched ahead for the next one does not count."""
        context.start_heartbeat(Path(training.output_dir))

    def _build(self) -> None:
        config, context = self.config, self.context
        if config.training.deterministic:
            torch.use_deterministic_algorithms(True)
        self.engine = build_engine(config, self.mesh, context.device, partial(build_optimizer, config=config.optimizer))
        self.model = self.engine.model
        self.checkpoints = CheckpointManager(Path(config.training.output_dir), context, keep_last=config.checkpoint.keep_last)
        self.watch = FiniteWatch(context)
        context.expect_slow_start()

    def run(self) -> None:
        """Resume, train to the last step or until asked to stop, and leave a checkpoint.

        Raises:
            RunError: numbers that are not finite, a checkpoint that cannot be written or read, data that cannot be read.
            LostRank: another rank is gone or stuck.
        """
        # Signals are caught to the very end: torchrun sends SIGTERM to those who are about to name the rank it has lost.
        with StopSignals(speaks=self.context.is_main) as signals, closing(self), self.context.naming_the_lost():
            self.context.enter("loading", self.step)
            notes = self._resume()
            chosen = Chosen(precision=self.precision, sizes=self.mesh.sizes, attention=self.attention)
            report = Reporter(self.config, self.context, chosen, step=self.step)
            self.report = report
            for note in notes:
                report.say(note)
            if self.step < self.config.training.steps:
                self._train(report, signals)
            else:
                report.say(f"nothing left to do: {self.checkpoints.path()} is the last of {self.config.training.steps} steps")

    def _train(self, report: Reporter, signals: StopSignals) -> None:
        # Closed in any case: workers that read ahead end with the iterator, and Python waits for them at exit.
        with (
            closing(cast(Generator[Batch], iter(self.stream))) as batches,
            ScheduledCollection(self.config.training.gc_interval) as garbage,
        ):
            first_step = self.step + 1
            while self.step < self.config.training.steps:
                micro_batches, target_tokens, stop = self.next_global_batch(batches, report, signals)
                if stop:
                    self._stop(report, signals)
                    return
                result = self.train_step(micro_batches, target_tokens)
                report.speed.count(tokens=result.input_tokens)
                report.console.advance()
                if self.step == first_step:
                    self.context.expect_steady_pace()
                with report.speed.paused():
                    extra = self.evaluate(micro_batches[-1])
                if extra or self.step == first_step or self._due(self.config.metrics.log_interval):
                    self.log(report, result, extra)
                if self._due(self.config.checkpoint.interval):
                    self.save(report)
                garbage.after_step(self.step)
        self.context.raise_together(report.failure)
        report.say(f"done: step {self.step}, saved in {self.checkpoints.path()}")

    def next_global_batch(self, batches: Iterator[Batch], report: Reporter, signals: StopSignals) -> tuple[list[Batch], int, bool]:
        """This rank's micro-batches of the next step, the target tokens of all ranks in it, and whether any rank was asked to stop.

        One small sum over the hosts carries all that ranks must agree on between two steps, failures of one rank included.
        """
        failure, micro_batches = report.failure, []
        self.context.enter("data", self.step + 1)
        try:
            with report.speed.loading():  # not the sum below, which waits for the slowest rank
                micro_batches = list(islice(batches, self.stream.micro_batches_per_step))
        except (OSError, ValueError) as error:
            failure = RunError(sentence_of(error))  # not the error itself, whose traceback keeps the workers alive
        self.context.enter("agreement", self.step + 1)
        target_tokens, stops, failures, retries, skipped = self.context.sum_on_host(
            count_targets(micro_batches) if self.mesh.is_first_reader else 0,
            int(signals.received is not None),
            int(failure is not None),
            sum(batch.retries for batch in micro_batches),
            sum(batch.skipped for batch in micro_batches) if self.mesh.is_first_reader else 0,
        )
        if failures:
            self.context.raise_together(failure)
        self.retries += retries
        self.skipped_samples += skipped
        return micro_batches, target_tokens, stops > 0

    def train_step(self, micro_batches: list[Batch], target_tokens: int) -> StepResult:
        """One optimizer step. Nothing in here makes the host wait for the device."""
        config = self.config
        lr = config.optimizer.lr * learning_rate_factor(config.lr_scheduler, step=self.step + 1, steps=config.training.steps)
        reset_at = self.stream.dataset.eos_id if config.data.reset_at_document else None
        step_loss = torch.zeros((), device=self.context.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            self.context.enter("forward", self.step + 1)
            whole = loss_sum(
                self.model, micro_batch, self.mesh, self.context.device, logits_bytes=config.training.logits_bytes, reset_at=reset_at
            )
            # Divided by the targets of all ranks: a rank or micro-batch with fewer of them weighs less, as it should.
            loss = whole / max(1, target_tokens)
            self.context.enter("backward", self.step + 1)
            self.engine.backward(loss, last=number == len(micro_batches))
            step_loss += loss.detach()
        self.context.enter("optimizer", self.step + 1)
        grad_norm = self.engine.step(lr=lr, max_norm=config.training.max_grad_norm)
        self.step += 1
        self.n_tokens_seen += target_tokens
        self.stream_state = self.stream.state_dict()
        self.watch.see(self.step, step_loss, grad_norm)
        input_tokens = sum(batch.inputs.numel() for batch in micro_batches) // self.mesh.sizes.same_data
        return StepResult(loss=step_loss, grad_norm=grad_norm, lr=lr, input_tokens=input_tokens)

    def evaluate(self, batch: Batch) -> Record:
        """Validation loss and a look into the memories, where they are due."""
        config, record = self.config, Record()
        if self.validation_data is not None and self._due(config.eval.interval):
            self.context.enter("validation", self.step)
            with self.context.unhurried():
                record |= validate(
                    self.engine,
                    self.validation_data,
                    self.context,
                    self.mesh,
                    micro_batch_size=config.training.micro_batch_size,
                    max_batches=config.eval.batches,
                    logits_bytes=config.training.logits_bytes,
                    reset_at_document=config.data.reset_at_document,
                )
        if config.metrics.memory_interval and self.step % config.metrics.memory_interval == 0:
            self.context.enter("validation", self.step)
            with self.context.unhurried():
                record |= self.look_into_memories(batch)
        return record

    @torch.no_grad()
    def look_into_memories(self, batch: Batch) -> Record:
        """What the memories do with a batch, averaged over ranks; with its longest document, where they begin anew at each. All ranks run
        the model together.
        """
        inputs = own_tokens(batch, self.mesh).inputs
        if self.config.data.reset_at_document:
            longest = longest_document(inputs, document_starts(inputs, self.stream.dataset.eos_id))
            ranks = self.mesh.sizes.tensor  # which share the tokens evenly
            inputs = longest[:, : longest.shape[1] // ranks * ranks] if longest.shape[1] >= ranks else inputs[:1, :ranks]
        # Hooks would not run inside compiled blocks.
        with torch.compiler.set_stance("force_eager"), MemoryProbe(self.model) as probe:
            self.model(inputs.to(self.context.device))
        self.engine.release()
        metrics = probe.metrics()
        means = self.context.sum(torch.tensor(list(metrics.values()), device=self.context.device)) / self.context.world_size
        return {f"titans/{name}": mean for name, mean in zip(metrics, means.tolist(), strict=True)}

    def log(self, report: Reporter, result: StepResult, extra: Record) -> None:
        """Write the step's record, then stop if its numbers are not finite. The host waits for the device here."""
        self.context.enter("log", self.step)
        record = {
            "loss_metrics/global_avg_loss": self.context.sum(result.loss).item() / self.mesh.sizes.tensor,
            "grad_norm": result.grad_norm.item(),
            "lr": result.lr,
            "n_tokens_seen": self.n_tokens_seen,
            **self.stream.metrics(),
            "data/retries": self.retries,
            "data/skipped_samples": self.skipped_samples,
        }
        report.write(self.step, {**record, **extra})
        self.check_finite()

    def check_finite(self) -> None:
        """Stop if a step since the last check was not finite."""
        if self.config.stability.stop_on_nonfinite and (bad := self.watch.first_bad_step()) is not None:
            raise not_finite(f"loss or gradient norm of step {bad} is", self.checkpoints.path())

    def save(self, report: Reporter) -> None:
        """Write a checkpoint of this step; never one whose weights are not finite."""
        self.context.enter("checkpoint", self.step)
        self.check_finite()
        with report.speed.paused():
            if not weights_are_finite(self.engine, self.context):
                if self.config.stability.stop_on_nonfinite:
                    raise not_finite(f"weights after step {self.step} are", self.checkpoints.path())
                report.say(f"step {self.step} is not saved: its weights are not finite")
                return
            self.checkpoints.save(self.step, self.engine, self._counters(), self.config)

    def _stop(self, report: Reporter, signals: StopSignals) -> None:
        by = f"stopped by {signals.received or 'a signal to another rank'}"
        if self.step == 0:
            report.say(f"{by} before the first step; there is nothing to save")
            return
        self.save(report)
        report.say(f"{by} at step {self.step}; saved in {self.checkpoints.path()}, run the same command again to go on")

    def _resume(self) -> list[str]:
        """Load the newest checkpoint, if there is one. Returns what the user should know of it."""
        config, checkpoints = self.config, self.checkpoints
        notes = checkpoints.find()
        if checkpoints.newest is None:
            if notes:
                raise RunError(f"{'; '.join(notes)}; no whole checkpoint is left, move {checkpoints.folder.path} away to start anew")
            return notes
        path = checkpoints.path()
        if not config.checkpoint.resume:
            raise RunError(f"{path} exists and checkpoint.resume is false; set it to true to go on, or set another training.output_dir")
        with self.context.together():
            changes = check_resumable(config, checkpoints.config(), checkpoints.folder.checkpoint(checkpoints.newest))
        counters = checkpoints.load(self.engine, self._counters())
        with self.context.together():
            self.stream.load_state_dict(counters["stream"])
        self.stream_state = self.stream.state_dict()
        self.step = counters["train_state"]["step"]
        self.n_tokens_seen = counters["train_state"]["n_tokens_seen"]
        if changes:
            notes.append(f"settings that changed since {path}: {', '.join(changes)}")
        return [*notes, f"resumed from {path}"]

    def _counters(self) -> Counters:
        return {"stream": self.stream_state, "train_state": {"step": self.step, "n_tokens_seen": self.n_tokens_seen}}

    def _due(self, interval: int) -> bool:
        """Every `interval` steps (0: never), and at the last step in any case."""
        return self.step == self.config.training.steps or (interval > 0 and self.step % interval == 0)

    def close(self) -> None:
        """Close files, let go of the run's folder, leave the process group, and the environment as it was."""
        if self.report is not None:
            self.report.close()
        if self.run_folder is not None:
            self.run_folder.close()
        self.context.destroy()
        unset_environment(self.environment)

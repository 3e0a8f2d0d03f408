"""Context parallelism on the cores of one machine: how long ranks wait for each other's states, and what is left of their number.

Wall time, as waiting takes no CPU time: the machine must have a core for every rank, and nothing else to do.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from titans_scale.config import TitansConfig, load_config
from titans_scale.evaluation.benchmarks.measure import progress
from titans_scale.evaluation.benchmarks.report import Report, Row, this_machine
from titans_scale.models import TitansLM
from titans_scale.models.blocks import Block
from titans_scale.parallel import Mesh, mesh_sizes
from titans_scale.parallel.apply import parallelize
from titans_scale.parallel.sequence import Layout, Link, handed_on

WAVEFRONT, SHARDED = "Blocks alone", "Through fully_shard"
SETTINGS = [
    *("model.variant=mag", "model.dim=256", "model.num_heads=4", "model.window=128", "model.vocab_size=512", "model.memory.num_heads=4"),
    *("model.memory.chunk_size=64", "training.micro_batch_size=1", "training.dtype=float32"),
]


@dataclass(kw_only=True)
class Steps:
    """What a rank measured, of every step."""

    seconds: list[float] = field(default_factory=list)
    """Until the last rank is done."""
    waiting: list[float] = field(default_factory=list)
    """Of these: for states and gradients of other ranks, and at the end for the last."""
    handed_on: int = 0
    """Bytes of a layer's state."""


class TimedLink(Link):
    """A link that adds up what it waits."""

    waited = 0.0
    received = 0

    def receive(self, layout: Layout, sender: int, device: torch.device) -> list[Tensor]:
        start = time.perf_counter()
        tensors = super().receive(layout, sender, device)
        self.waited += time.perf_counter() - start
        self.received = layout.size
        return tensors


def benchmark_context(*, ranks: int, layers: Sequence[int], tokens: int, repeats: int) -> Report:
    """Measure models of some depths on one rank and on several, each with a thread of its own.

    Args:
        tokens: of the sequence, over all ranks.   repeats: steps; the median counts, after one that does not.
    """
    title = f"Context parallelism: MAG of width 256, window 128, one sequence of {tokens:,} tokens, float32, forward and backward."
    report = Report(title=title, machine=this_machine(threads=1))
    for form in (WAVEFRONT, SHARDED):
        report.tables[form] = []
        for depth in layers:
            progress(f"{form.lower()}, {depth} layers")
            alone, *_ = _on_ranks(1, form, depth, tokens, repeats)
            together = _on_ranks(ranks, form, depth, tokens, repeats)
            report.tables[form].append(_row(depth, alone, together))
    return report


def _row(depth: int, alone: Steps, together: Sequence[Steps]) -> Row:
    ranks = len(together)
    seconds = statistics.median(together[0].seconds)
    row: Row = {
        "layers": depth,
        "ranks": ranks,
        "s a step, one rank": statistics.median(alone.seconds),
        "s a step": seconds,
        "times as fast": statistics.median(alone.seconds) / seconds,
        "without other cost": ranks * depth / (depth + ranks - 1),
    }
    if together[-1].handed_on:
        shares = [sum(steps.waiting) / sum(steps.seconds) for steps in together]
        row |= {f"rank {rank} waits, %": 100 * share for rank, share in enumerate(shares)}
        row |= {"(R - 1) / (L + R - 1), %": 100 * (ranks - 1) / (depth + ranks - 1), "KiB handed on a layer": together[-1].handed_on / 1024}
    return row


def _on_ranks(ranks: int, form: str, depth: int, tokens: int, repeats: int) -> list[Steps]:
    """In processes of their own: each has one thread and one process group."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(ranks, mp_context=context) as pool:
        store = str(Path(folder) / "store")
        waiting = [pool.submit(_measure, rank, ranks, store, form, depth, tokens, repeats) for rank in range(ranks)]
        return [result.result() for result in waiting]


def _measure(rank: int, ranks: int, store: str, form: str, depth: int, tokens: int, repeats: int) -> Steps:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    config = load_config(None, [*SETTINGS, f"model.num_layers={depth}", f"parallelism.context_parallel={ranks}"])
    own_BT = torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(0)).chunk(ranks, dim=1)[rank]
    model, links = _joined(config) if form == WAVEFRONT else _sharded(config, ranks)
    steps = _timed(lambda: model.loss_sum(own_BT, own_BT).backward(), links, repeats)
    dist.destroy_process_group()
    return steps


def _joined(config: TitansConfig) -> tuple[TitansLM, list[TimedLink]]:
    model = TitansLM(config.model)
    links = []
    for block in model.blocks:
        assert isinstance(block, Block) and dist.group.WORLD is not None
        links.append(TimedLink(dist.group.WORLD))
        block.forward = handed_on(block, block.forward, links[-1])  # type: ignore[method-assign]
    return model, links


def _sharded(config: TitansConfig, ranks: int) -> tuple[TitansLM, list[TimedLink]]:
    with torch.device("meta"):
        model = TitansLM(config.model)
    return parallelize(model, config, Mesh(mesh_sizes(config.parallelism, ranks), "cpu"), torch.device("cpu")), []


def _timed(step: Callable[[], None], links: Sequence[TimedLink], repeats: int) -> Steps:
    steps = Steps()
    step()
    for _ in range(repeats):
        dist.barrier()
        for link in links:
            link.waited = 0.0
        start = time.perf_counter()
        step()
        own = time.perf_counter() - start
        dist.barrier()
        steps.seconds.append(time.perf_counter() - start)
        steps.waiting.append(steps.seconds[-1] - own + sum(link.waited for link in links))
    steps.handed_on = max((link.received for link in links), default=0)
    return steps

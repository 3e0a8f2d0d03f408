"""Batches for the trainer, in an order that no number of ranks, workers or micro-batches changes.

A global batch is the next G entries of the endless sequence of samples; its micro-batch m on rank r takes those from
(m*world_size + r) * micro_batch_size on. So where a run stands is one number, the samples consumed, and it may go on with other ranks.

Shape letters: B sequences of a micro-batch, T tokens of a sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from titans_scale.data.reading.dataset import Rows, TokenDataset
from titans_scale.data.reading.mixture import MixedOrder, Mixture, Source
from titans_scale.data.reading.workers import batches_of, leave_signals_to_the_trainer

IGNORED = -100
"""Target of a position that does not count, as torch's cross entropy knows it."""
LOOK_AHEAD = 4096
"""Samples between two looks at what remote sources will be asked for."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch."""

    inputs: Tensor
    """int64 (B, T)."""
    targets: Tensor
    """int64 (B, T): the token after each input, or IGNORED past the end of a sample."""
    retries: int = 0
    """Further attempts that reading it took."""
    skipped: int = 0
    """Its rows that could not be read; none of their targets counts."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        inputs, targets = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.inputs, self.targets))
        return Batch(inputs=inputs, targets=targets, retries=self.retries, skipped=self.skipped)


class TokenStream:
    """Micro-batches of one rank, endlessly. Iterating goes on from where `state_dict` says; one iterator at a time.

    Args:
        dataset: a split, or several as a mixture.
        micro_batch_size: sequences a rank gets at once.   global_batch_size: sequences of one step over all ranks.
        shuffle_window: see `SampleOrder`.
        skip: (first, last) global batches, counted from 1, that are passed over.
        num_workers: processes that read ahead; 0 reads in this one.
    Raises:
        ValueError: the global batch does not come out even over the ranks' micro-batches, or there are fewer samples than ranks.
    """

    def __init__(
        self,
        dataset: TokenDataset | Mixture,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        shuffle_window: int = 65_536,
        seed: int = 0,
        skip: Sequence[tuple[int, int]] = (),
        num_workers: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among {world_size} ranks")
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"a global batch of {global_batch_size} sequences does not come out even in micro-batches of {micro_batch_size} on"
                f" {world_size} ranks; make it a multiple of {micro_batch_size * world_size}"
            )
        self.dataset = dataset if isinstance(dataset, Mixture) else Mixture([Source(dataset=dataset)])
        if len(self.dataset) < world_size:
            raise ValueError(
                f"{self.dataset.where} has too few samples ({len(self.dataset)}) to give each of {world_size} ranks one; use fewer ranks,"
                " or more text"
            )
        self.samples_consumed = 0
        """Samples of the global sequence that lie behind: in batches that every rank has been given whole, or passed over."""
        self._skipped = [0] * len(self.dataset.sources)
        self._order = MixedOrder(self.dataset, shuffle=shuffle, shuffle_window=shuffle_window, seed=seed)
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._rank = rank
        self._world_size = world_size
        self._settings: dict[str, Any] = {"shuffle": shuffle, "shuffle_window": shuffle_window, "seed": seed}
        self._skip = sorted((first, last) for first, last in skip)
        self._num_workers = num_workers

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches a rank takes for one global batch."""
        return self._global_batch_size // (self._micro_batch_size * self._world_size)

    def __iter__(self) -> Iterator[Batch]:
        batches, starts = self._batches(), self._batch_starts()
        while True:
            start = next(starts)
            for number in range(1, self.micro_batches_per_step + 1):
                batch = next(batches)
                if number == self.micro_batches_per_step:
                    self._advance(start)
                yield batch

    def metrics(self) -> dict[str, float]:
        """How much was trained on: for each source tokens (whole sequences) and epochs, steps passed over."""
        drawn = self._order.drawn(self.samples_consumed)
        metrics: dict[str, float] = {"data/skipped_steps": sum(self._skipped) // self._global_batch_size}
        for source, count, skipped in zip(self.dataset.sources, drawn, self._skipped, strict=True):
            of_source = {
                "data/epoch": count / len(source.dataset),
                "data/tokens": (count - skipped) * self.dataset.sequence_length,
            }
            metrics |= {name.replace("/", f"/{source.name}/") if source.name else name: value for name, value in of_source.items()}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last whole global batch, and of which data; the same on every rank."""
        return {"samples_consumed": self.samples_consumed, "samples_skipped": list(self._skipped), **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, also one of other ranks, workers or batch sizes. Takes effect at the next `iter`.

        Raises:
            ValueError: the state is of other data or another order (what differs).
        """
        if changes := identity_changes(state, self.identity()):
            raise ValueError(
                f"the checkpoint was trained on other data than {self.dataset.where} ({', '.join(changes)});"
                " give the data it was trained on, or start anew in another training.output_dir"
            )
        self.samples_consumed = int(state["samples_consumed"])
        self._skipped = list(state["samples_skipped"])

    def identity(self) -> dict[str, Any]:
        """All that decides the global sequence."""
        first = self.dataset.sources[0].dataset
        return {
            "sequence_length": first.sequence_length,
            "tokenizer": first.index.settings.tokenizer_fingerprint,
            **self._settings,
            # lists, not a dict: a checkpoint of other sources can then be read, and refused for what it is
            "sources": [[source.name, source.weight, len(source.dataset), source.dataset.fingerprint] for source in self.dataset.sources],
        }

    def _batch_starts(self) -> Iterator[int]:
        """Where in the global sequence the next global batches begin, those passed over left out."""
        start = self.samples_consumed
        while True:
            for first, last in self._skip:
                if (first - 1) * self._global_batch_size < start + self._global_batch_size and start < last * self._global_batch_size:
                    start = last * self._global_batch_size
            yield start
            start += self._global_batch_size

    def _batches(self) -> Iterator[Batch]:
        """This rank's micro-batches, read here or by workers."""
        if not self._num_workers:
            return (collate(self.dataset.__getitems__(samples)) for samples in self._micro_batches())
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._micro_batches(),
            num_workers=self._num_workers,
            collate_fn=collate,  # type: ignore[arg-type]  # it gets what __getitems__ gives
            worker_init_fn=leave_signals_to_the_trainer,
            generator=torch.Generator(),  # or it would draw its workers' seed from torch's global generator, which belongs to the model
        )
        # what fetching ahead took here, in this process, no worker can tell
        return (replace(batch, retries=batch.retries + self.dataset.take_retries()) for batch in batches_of(loader))

    def _micro_batches(self) -> Iterator[list[tuple[int, int]]]:
        """The samples of this rank's micro-batches; workers are told of them ahead."""
        order = MixedOrder(self.dataset, **self._settings)
        stride, next_look = self._micro_batch_size * self._world_size, 0
        for start in self._batch_starts():
            if self.dataset.remote and start >= next_look:
                self.dataset.prefetch(self._soon(start))
                next_look = start + LOOK_AHEAD
            for number in range(self.micro_batches_per_step):
                yield order.take(start + number * stride + self._rank * self._micro_batch_size, self._micro_batch_size)

    def _soon(self, start: int) -> list[tuple[int, int]]:
        """A few samples of this window and of the next: all but never is a shard of theirs among none of them."""
        places = start, start + self._settings["shuffle_window"]
        return [sample for place in places for sample in self._order.take(place, LOOK_AHEAD)]

    def _advance(self, start: int) -> None:
        """The global batch from `start` on has been handed out; what lies between it and the one before was passed over."""
        if start > self.samples_consumed:
            before, after = self._order.drawn(self.samples_consumed), self._order.drawn(start)
            self._skipped = [skipped + b - a for skipped, a, b in zip(self._skipped, before, after, strict=True)]
        self.samples_consumed = start + self._global_batch_size


def validation_batches(
    dataset: TokenDataset, *, micro_batch_size: int, rank: int = 0, world_size: int = 1, max_batches: int = 0
) -> Iterator[Batch]:
    """A split once, in its own order. Every rank gets equally many batches; rows past the end are all padding.

    Args:
        max_batches: batches of a rank; where the split has more, an even selection of its samples. 0: all.
    """
    row_count = micro_batch_size * world_size
    num_batches = -(-len(dataset) // row_count)
    if 0 < max_batches < num_batches:
        num_batches = max_batches
    chosen = min(len(dataset), num_batches * row_count)
    for batch in range(num_batches):
        first = batch * row_count + rank * micro_batch_size
        numbers = [number * len(dataset) // chosen for number in range(first, min(first + micro_batch_size, chosen))]
        tokens = torch.full((micro_batch_size, dataset.sequence_length + 1), dataset.eos_id)
        counts = torch.zeros(micro_batch_size, dtype=torch.int64)
        retries = skipped = 0
        if numbers:
            rows = dataset.__getitems__(numbers)
            tokens[: len(numbers)], counts[: len(numbers)] = rows.tokens, rows.counts
            retries, skipped = rows.retries, rows.skipped
        yield collate(Rows(tokens=tokens, counts=counts, retries=retries, skipped=skipped))


def collate(rows: Rows) -> Batch:
    """Rows as inputs and the targets one further on."""
    tokens = rows.tokens
    targets = tokens[:, 1:].contiguous()
    if rows.counts.min() < tokens.shape[1]:  # hardly ever, and finding out where costs more than the copies
        targets = targets.masked_fill(torch.arange(1, tokens.shape[1]) >= rows.counts[:, None], IGNORED)
    return Batch(inputs=tokens[:, :-1].contiguous(), targets=targets, retries=rows.retries, skipped=rows.skipped)


def identity_changes(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between two of `TokenStream.identity`, a phrase "what old -> new" each."""
    pairs = [(name, theirs.get(name), value) for name, value in ours.items() if name != "sources"]
    before, after = ({name or "data.path": values for name, *values in identity["sources"]} for identity in (theirs, ours))
    gone = [f"source {name} is gone" for name in before if name not in after]
    new = [f"source {name} is new" for name in after if name not in before]
    for name in [name for name in after if name in before]:
        whose = "" if name == "data.path" else f"{name}'s "
        whats = (f"{whose}{what}" for what in ("weight", "num_samples", "fingerprint"))
        pairs += zip(whats, before[name], after[name], strict=True)
    return [*gone, *new, *(f"{what} {old!s:.12} -> {now!s:.12}" for what, old, now in pairs if old != now)]

"""Several sources as one: a dataset over them all, and the order in which a mixture by weight draws from each.

Every sample has sequence_length tokens, so shares of samples are shares of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch.utils.data import Dataset

from titans_scale.data.reading.dataset import Rows, TokenDataset
from titans_scale.data.reading.order import SampleOrder, random_keys
from titans_scale.data.reading.store import is_remote

PERIOD = 65_536
"""Samples over which the shares of the sources are exact, as near as whole numbers come to them."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a mixture."""

    dataset: TokenDataset
    name: str = ""
    """"" for a dataset alone."""
    weight: float = 1.0
    """Its share of the tokens, relative to the other sources' weights."""


class Mixture(Dataset[Rows]):
    """The sources, by name, whatever order they are given in. A mixture of one is that source alone.

    Raises:
        ValueError: two sources were made with different tokenizers, or hold sequences of different lengths.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sorted(sources, key=lambda source: source.name))
        first, *others = self.sources
        for other in others:
            _check_agreement(first, other)
        self.sequence_length, self.vocab_size, self.eos_id = first.dataset.sequence_length, first.dataset.vocab_size, first.dataset.eos_id
        self.remote = [number for number, source in enumerate(self.sources) if is_remote(source.dataset.where)]
        """Numbers of the sources whose shards have to be fetched."""

    @property
    def where(self) -> str:
        """Where the sources lie, for a sentence."""
        return " and ".join(source.dataset.where for source in self.sources)

    def __len__(self) -> int:
        return sum(len(source.dataset) for source in self.sources)

    def __getitems__(self, samples: Sequence[tuple[int, int]]) -> Rows:
        """The samples (source, number in it), in the order asked for. Raises as `TokenDataset.__getitems__` does."""
        drawn = {source for source, _ in samples}
        if len(drawn) == 1:
            return self.sources[drawn.pop()].dataset.__getitems__([number for _, number in samples])
        tokens = torch.empty(len(samples), self.sequence_length + 1, dtype=torch.int64)
        counts = torch.empty(len(samples), dtype=torch.int64)
        retries = skipped = 0
        for source in sorted(drawn):
            places = [place for place, (of, _) in enumerate(samples) if of == source]
            rows = self.sources[source].dataset.__getitems__([samples[place][1] for place in places])
            tokens[places], counts[places] = rows.tokens, rows.counts
            retries, skipped = retries + rows.retries, skipped + rows.skipped
        return Rows(tokens=tokens, counts=counts, retries=retries, skipped=skipped)

    def prefetch(self, samples: Sequence[tuple[int, int]]) -> None:
        """Have what is remote of these fetched in the background."""
        for number in self.remote:
            self.sources[number].dataset.prefetch(sample for source, sample in samples if source == number)

    def take_retries(self) -> int:
        """Further attempts in this process since last asked."""
        return sum(source.dataset.take_retries() for source in self.sources)


class MixedOrder:
    """The endless sequence of a mixture: a pure function of the seed, the weights and the sources' names.

    Each PERIOD of it holds every source's share exactly, its places drawn by the seed. What is drawn from a source goes through
    that source's own endless order, so each has epochs of its own.
    """

    def __init__(self, mixture: Mixture, *, shuffle: bool, shuffle_window: int, seed: int) -> None:
        sources = mixture.sources
        self._orders = [
            SampleOrder(
                [shard.samples for shard in source.dataset.index.shards],
                shuffle=shuffle,
                seed=f"{seed} {source.name}" if source.name else seed,
                window=shuffle_window,
            )
            for source in sources
        ]
        self._seed = seed
        self._shares = shares([source.weight for source in sources], of=PERIOD)
        self._cached: tuple[int, np.ndarray] = -1, np.empty((2, 0), dtype=np.int64)

    def take(self, start: int, count: int) -> list[tuple[int, int]]:
        """Entries number `start` to `start` + `count` of the sequence: (source, number of the sample in it)."""
        if len(self._orders) == 1:
            return [(0, number) for number in self._orders[0].take(start, count)]
        taken: list[tuple[int, int]] = []
        while len(taken) < count:
            period, place = divmod(start + len(taken), PERIOD)
            labels, turns = (row[place : place + count - len(taken)] for row in self._period(period))
            numbers = np.empty_like(labels)
            for source in np.unique(labels).tolist():
                here = labels == source
                first = period * self._shares[source] + int(turns[here][0])
                numbers[here] = self._orders[source].take(first, int(here.sum()))
            taken += zip(labels.tolist(), numbers.tolist(), strict=True)
        return taken

    def drawn(self, count: int) -> list[int]:
        """How many of the sequence's first `count` entries come from each source."""
        if len(self._orders) == 1:
            return [count]
        period, place = divmod(count, PERIOD)
        labels, _ = self._period(period)
        begun = np.bincount(labels[:place], minlength=len(self._shares)).tolist()
        return [period * share + more for share, more in zip(self._shares, begun, strict=True)]

    def _period(self, period: int) -> np.ndarray:
        """Of each entry of a period its source, and how many before it in the period are of that source: int64 (2, PERIOD)."""
        if self._cached[0] != period:
            order = np.argsort(random_keys(0, PERIOD, f"{self._seed} {period} mixture"), kind="stable")
            labels = np.repeat(np.arange(len(self._shares)), self._shares)[order]
            turns = np.empty_like(labels)
            turns[np.argsort(labels, kind="stable")] = np.concatenate([np.arange(share) for share in self._shares])
            self._cached = period, np.stack([labels, turns])
        return self._cached[1]


def shares(weights: Sequence[float], *, of: int) -> list[int]:
    """A whole number in proportion to weights (all positive, no more of them than `of`): each gets 1 at least, and the largest remainders
    what is left over."""
    total = sum(map(Fraction, weights))
    exact = [max(Fraction(1), Fraction(weight) / total * of) for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda place: (int(exact[place]) - exact[place], place))
    for place in by_remainder[: max(0, of - sum(parts))]:
        parts[place] += 1
    while sum(parts) > of:  # what those below 1 were given is taken from the largest
        parts[parts.index(max(parts))] -= 1
    return parts


def _check_agreement(first: Source, other: Source) -> None:
    for what, of_first, of_other in (
        ("tokenizer", first.dataset.index.settings.tokenizer_fingerprint, other.dataset.index.settings.tokenizer_fingerprint),
        ("vocabulary", first.dataset.vocab_size, other.dataset.vocab_size),
        ("eos_id", first.dataset.eos_id, other.dataset.eos_id),
        ("sequence_length", first.dataset.sequence_length, other.dataset.sequence_length),
    ):
        if of_first != of_other:
            raise ValueError(
                f"data.sources {first.name} and {other.name} do not go together: {what} {of_first!s:.12} in {first.dataset.where},"
                f" {of_other!s:.12} in {other.dataset.where}; make their shards with the same settings"
            )

"""From the configuration's data section to the sources of a split: what has to be done before a sample can be read is done here."""

from titans_scale.config import DataConfig, SourceConfig
from titans_scale.data.reading.converting import shards_of_others
from titans_scale.data.reading.dataset import TokenDataset, open_split
from titans_scale.data.reading.faults import ReadPolicy
from titans_scale.data.reading.mixture import Mixture, Source


def open_sources(config: DataConfig, split: str, *, sequence_length: int) -> Mixture:
    """A split ("train" or "validation") of data.path, or of each of data.sources.

    Args:
        sequence_length: of the run. Tars of others are made into shards of that length; our own have one.
    Raises:
        ValueError: a source has no such split, is damaged or empty, or does not go together with another.   OSError: it cannot be read.
    """
    named, policy = config.sources or {"": SourceConfig(path=config.path)}, ReadPolicy.of(config)

    def opened(path: str) -> TokenDataset:
        ours = path if config.format == "tokens" else shards_of_others(path, split, config, sequence_length=sequence_length)
        return open_split(ours, split, policy=policy)

    return Mixture([Source(name=name, weight=source.weight, dataset=opened(source.path)) for name, source in named.items()])

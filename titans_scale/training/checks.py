"""What can be known to be wrong before the first step, said in one sentence each."""

from titans_scale.config import ConfigError, TitansConfig
from titans_scale.data import TokenDataset


def check_global_batch(config: TitansConfig, data_ranks: int) -> None:
    """The global batch must be the same number of whole micro-batches on every rank.

    Raises:
        ConfigError: naming the nearest batch that is.
    """
    training = config.training
    unit = training.sequence_length * training.micro_batch_size * data_ranks
    if training.global_batch_tokens % unit:
        nearest = max(1, round(training.global_batch_tokens / unit)) * unit
        raise ConfigError(
            f"training.global_batch_tokens {training.global_batch_tokens} is not a multiple of sequence_length {training.sequence_length}"
            f" * micro_batch_size {training.micro_batch_size} * {data_ranks} ranks = {unit}; the nearest that is: {nearest}"
        )


def check_shards(dataset: TokenDataset, config: TitansConfig) -> None:
    """The shards must fit the model and the sequence length.

    Raises:
        ConfigError: naming the keys and both values.
    """
    where, length = dataset.directory, config.training.sequence_length
    if dataset.sequence_length != length:
        raise ConfigError(
            f"the shards in {where} hold sequences of {dataset.sequence_length} tokens, training.sequence_length is {length};"
            f" set it to {dataset.sequence_length}, or make the shards again"
        )
    if dataset.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the shards in {where} were made with a vocabulary of {dataset.vocab_size}, model.vocab_size is {config.model.vocab_size};"
            f" set it to {dataset.vocab_size} or more"
        )

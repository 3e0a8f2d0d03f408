"""What can be known to be wrong before the first step, said in one sentence each."""

from collections.abc import Sequence
from typing import Any

from titans_scale.config import ConfigError, TitansConfig
from titans_scale.data import Mixture
from titans_scale.data.reading.faults import ReadPolicy
from titans_scale.data.reading.stream import identity_changes


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


def check_shards(data: Mixture, config: TitansConfig) -> None:
    """The shards must fit the model and the sequence length. (Those of one mixture are alike in both.)

    Raises:
        ConfigError: naming the keys and both values.
    """
    where, length = data.where, config.training.sequence_length
    if data.sequence_length != length:
        raise ConfigError(
            f"the shards in {where} hold sequences of {data.sequence_length} tokens, training.sequence_length is {length};"
            f" set it to {data.sequence_length}, or make the shards again"
        )
    if data.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the shards in {where} were made with a vocabulary of {data.vocab_size}, model.vocab_size is {config.model.vocab_size};"
            f" set it to {data.vocab_size} or more"
        )


def check_apart(train: Mixture, validation: Mixture) -> None:
    """No shard may be both trained on and validated on.

    Raises:
        ConfigError: naming one that is.
    """
    trained = {shard.sha256: f"{source.dataset.where}/{shard.name}" for source in train.sources for shard in source.dataset.index.shards}
    for source in validation.sources:
        for shard in source.dataset.index.shards:
            if shard.sha256 in trained:
                raise ConfigError(
                    f"{source.dataset.where}/{shard.name} is to be validated on and is the same as {trained[shard.sha256]}, which is"
                    " trained on; make the shards again from texts that are apart, or set eval.interval to 0"
                )


def check_patience(data: Mixture, config: TitansConfig, ranks: int) -> None:
    """The other ranks must wait longer for one that cannot read than that one tries.

    Raises:
        ConfigError: naming the keys and both times.
    """
    tries, patience = ReadPolicy.of(config.data).longest_seconds, config.comm.train_timeout_seconds
    if data.remote and ranks > 1 and tries >= patience:
        raise ConfigError(
            f"a remote that falls silent is given up after {tries:g} s (data.retries, data.retry_seconds, data.timeout_seconds), and the"
            f" other ranks wait comm.train_timeout_seconds {patience} s; lower the former, or raise the latter"
        )


def check_same_data(identities: Sequence[dict[str, Any]]) -> None:
    """All ranks must read the same data.

    Args:
        identities: `TokenStream.identity` of every rank, by rank.
    Raises:
        ConfigError: on every rank, naming the first that differs from rank 0.
    """
    for rank, identity in enumerate(identities):
        if changes := identity_changes(identities[0], identity):
            raise ConfigError(
                f"rank {rank} reads other data than rank 0 ({', '.join(changes)}); every machine must have the same shards under the"
                " same path"
            )

"""May a run go on from a checkpoint that was written under another configuration?"""

from pathlib import Path

from titans_scale.config import ConfigError, TitansConfig, config_differences

FIXED = (
    "model.",
    "data.seed",
    "data.shuffle",
    "data.reset_at_document",
    "training.seed",
    "training.sequence_length",
    "training.global_batch_tokens",
)
"""Beginnings of the keys that make the run what it is: weights of other shapes, another order. What data.path and data.sources hold is
compared too, by TokenStream.load_state_dict: the same shards may lie elsewhere."""
FREE_ALL_THE_SAME = ("model.attention_backend", "model.memory.backend", "model.memory.state_interval")
"""Keys of the model that change how it is computed, not what."""


def check_resumable(ours: TitansConfig, theirs: TitansConfig, checkpoint: Path) -> list[str]:
    """Compare the configuration given with that of a checkpoint.

    Returns:
        One phrase "key old -> new" for each difference that does no harm.
    Raises:
        ConfigError: naming each key that must not differ, with both values.
    """
    differences = config_differences(ours, theirs)
    broken = {key: values for key, values in differences.items() if key.startswith(FIXED) and key not in FREE_ALL_THE_SAME}
    if broken:
        listed = ", ".join(f"{key} is {mine} here and {other} there" for key, (mine, other) in broken.items())
        raise ConfigError(f"{checkpoint} was written under another configuration: {listed}; use its values, or another training.output_dir")
    return [f"{key} {other} -> {mine}" for key, (mine, other) in differences.items()]

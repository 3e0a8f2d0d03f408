"""Which layouts a model can be trained in: everything that is known to be impossible before a rank does any work."""

from titans_scale.config import ConfigError, TitansConfig
from titans_scale.models.layers import mlp_width
from titans_scale.parallel.mesh import MeshSizes
from titans_scale.parallel.zero.settings import deepspeed_settings


def check_layout(config: TitansConfig, sizes: MeshSizes) -> None:
    """Whether the engine, the model and the sequences can be split as asked.

    Raises:
        ConfigError: naming what does not divide, or does not go together, and the way out.
    """
    if config.engine.name == "deepspeed":
        _check_deepspeed(config, sizes)
    elif config.engine.config is not None:
        raise ConfigError(f"engine.config {config.engine.config} is for DeepSpeed; set engine.name to deepspeed, or engine.config to null")
    if sizes.tensor > 1:
        _check_tensor(config, sizes)
    if sizes.context > 1:
        _check_context(config, sizes)


def _check_deepspeed(config: TitansConfig, sizes: MeshSizes) -> None:
    whole = {"data_parallel_replicate": sizes.replicate, "context_parallel": sizes.context, "tensor_parallel": sizes.tensor}
    for key, size in whole.items():
        if size > 1:
            raise ConfigError(
                f"parallelism.{key} is {size}, and engine deepspeed shards over all ranks alike; set it to 1, or engine.name to fsdp2"
            )
    deepspeed_settings(config, ranks=sizes.data, precision=config.training.dtype)  # refuses a file that contradicts ours


def _check_tensor(config: TitansConfig, sizes: MeshSizes) -> None:
    model, ranks = config.model, sizes.tensor
    parts = {"the MLP's width (model.mlp_dim)": mlp_width(model)}
    if model.variant != "lmm":
        parts["model.num_heads"] = model.num_heads
    if config.parallelism.memory_split == "heads":
        parts["model.memory.num_heads"] = model.memory.num_heads
    else:
        if model.memory.depth != 2:
            raise ConfigError(
                f"parallelism.memory_split hidden needs a memory of two layers, model.memory.depth is {model.memory.depth};"
                " set it to 2, or memory_split to heads"
            )
        head_dim = model.memory.head_dim or model.dim // model.memory.num_heads
        parts["the memory's hidden width (head width * model.memory.expansion)"] = head_dim * model.memory.expansion
        parts["the memory's width (model.memory.num_heads * head width)"] = model.memory.num_heads * head_dim
    parts["the tokens of a rank (training.sequence_length / context_parallel)"] = config.training.sequence_length // sizes.context
    if (ranks - 1) * -(-model.vocab_size // ranks) >= model.vocab_size:
        raise ConfigError(
            f"model.vocab_size {model.vocab_size} leaves a rank of parallelism.tensor_parallel {ranks} without a word; set fewer ranks"
        )
    for name, size in parts.items():
        if size % ranks:
            other = "" if "memory.num_heads" not in name else ", or memory_split to hidden"
            raise ConfigError(f"{name}, {size}, does not divide by parallelism.tensor_parallel {ranks}; change one of them{other}")


def _check_context(config: TitansConfig, sizes: MeshSizes) -> None:
    length, ranks = config.training.sequence_length, sizes.context
    unit = ranks * (config.model.segment_len if config.model.variant == "mac" else 1)
    if length % unit:
        what = f"{ranks} ranks * model.segment_len {config.model.segment_len}" if config.model.variant == "mac" else f"{ranks} ranks"
        raise ConfigError(f"training.sequence_length {length} does not divide by parallelism.context_parallel's {what}; change one of them")
    if config.data.reset_at_document:
        raise ConfigError(
            "parallelism.context_parallel hands the memory on over a whole sequence, and data.reset_at_document ends it; use one"
        )

"""The memory of one GPU by formulas, for any engine, in a second. `rehearsal.py` measures what FSDP2 really keeps.

The peak is at the start of the last micro-batch's backward pass. Allocator, CUDA context and communication buffers are a flat allowance;
fragmentation is not modelled.
"""

from functools import partial

import torch

from titans_scale.config import TitansConfig
from titans_scale.models.plans import keeps_result
from titans_scale.parallel.mesh import MeshSizes
from titans_scale.parallel.planning.activations import block_activation_bytes

ALLOWANCE_BYTES = 2 * 2**30
"""CUDA context, NCCL's buffers, workspaces of matrix products."""
REDUCE_BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once, in numbers: configs/deepspeed."""


def gpu_bytes(config: TitansConfig, parameters: int, sizes: MeshSizes, accumulation_steps: int) -> dict[str, int]:
    """Peak of one GPU, part by part.

    parameters, gradients, optimizer state: float32, 4 + 4 + 8 bytes a parameter, over the ranks that share one copy of the model; nothing
        with parallelism.cpu_offload, which keeps them in the host's memory.
    gathered parameters: the whole model in the compute precision; with reshard_after_forward (and ZeRO 3) the embedding, which stays, and
        the block at work, the one before it, and those fetched ahead.
    gradients before reduction: a block's while it is at work; with more than one micro-batch the whole model's in float32. DeepSpeed:
        the whole model's in the compute precision with ZeRO 1, a bucket of them with 2 and 3.
    activations: what the forward pass of each block leaves, and of one more for the gradients on their way; with activation
        checkpointing less of all blocks but the one at work. Over context and tensor ranks they are taken to divide evenly.
    logits and loss: with training.max_logits_mib that much or less, and the head's gradient in float32; else the logits in the
        compute precision, and three copies in float32: log-probabilities and two gradients.
    """
    held = parameters // sizes.tensor
    shards = sizes.shard * sizes.context
    kept = {"parameters": 4 * held // shards, "gradients": 4 * held // shards, "optimizer state": 8 * held // shards}
    if config.parallelism.cpu_offload:
        kept = dict.fromkeys(kept, 0)
    gathered, whole_gradients = _while_at_work(config, held, outside_share(config, parameters), accumulation_steps)
    activations, logits_and_loss = _activations(config, sizes)
    return kept | {
        "gathered parameters": gathered,
        "gradients before reduction": whole_gradients,
        "activations": activations,
        "logits and loss": logits_and_loss,
        "allowance": ALLOWANCE_BYTES,
    }


def _while_at_work(config: TitansConfig, held: int, outside: float, accumulation_steps: int) -> tuple[int, int]:
    """Bytes of whole parameters and of whole gradients, of `held` numbers in the layers as a rank has them, that share of them outside the
    blocks.
    """
    model, parallelism, itemsize = config.model, config.parallelism, compute_dtype(config).itemsize
    per_block = round(held * (1 - outside) / model.num_layers)
    if config.engine.name == "deepspeed":
        whole, reshards = (held if config.engine.zero_stage == 1 else min(held, REDUCE_BUCKET)) * itemsize, config.engine.zero_stage == 3
    else:
        whole, reshards = 4 * held if accumulation_steps > 1 else 2 * per_block * itemsize, parallelism.reshard_after_forward
    gathered = min(held, round(held * outside) + (2 + parallelism.prefetch) * per_block) if reshards else held
    return gathered * itemsize, whole


def outside_share(config: TitansConfig, parameters: int) -> float:
    """Of so many parameters, those of embedding and head."""
    return min(1.0, config.model.dim * config.model.vocab_size * (1 if config.model.tie_embeddings else 2) / parameters)


def _activations(config: TitansConfig, sizes: MeshSizes) -> tuple[int, int]:
    """Bytes of activations, and of logits and loss."""
    model, training, dtype = config.model, config.training, compute_dtype(config)
    tokens = training.micro_batch_size * training.sequence_length // sizes.context
    length = training.sequence_length // sizes.context
    block_bytes = partial(block_activation_bytes, model, batch_size=training.micro_batch_size, sequence_length=length, dtype=dtype)
    whole = block_bytes()
    match config.activation_checkpoint.mode:
        case "none":
            kept = whole
        case "selective":
            kept = block_bytes(keeps=keeps_result)
        case "full":
            kept = tokens * model.dim * dtype.itemsize
    logits = tokens * model.vocab_size // sizes.tensor
    if training.logits_bytes is None:
        logits_and_loss = logits * (dtype.itemsize + 3 * 4)
    else:
        logits_and_loss = min(2 * 4 * logits, training.logits_bytes) + 4 * model.vocab_size * model.dim // sizes.tensor
    return ((model.num_layers - 1) * kept + 2 * whole) // sizes.tensor, logits_and_loss


def compute_dtype(config: TitansConfig) -> torch.dtype:
    """Of forward and backward on a GPU."""
    return torch.float32 if config.training.dtype == "float32" else torch.bfloat16

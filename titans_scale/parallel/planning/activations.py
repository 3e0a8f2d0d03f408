"""How much one block's forward pass leaves in memory for its backward pass, counted on the meta device: nothing is computed."""

from collections.abc import Callable

import torch
from torch._ops import OpOverload

from titans_scale.config import ModelConfig
from titans_scale.models.blocks import BLOCKS
from titans_scale.parallel.planning.fake_world import like_a_gpu
from titans_scale.parallel.planning.meter import Meter
from titans_scale.parallel.recompute import recomputed


def block_activation_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    keeps: Callable[[OpOverload], bool] | None = None,
) -> int:
    """Bytes alive after the forward pass of one block: what autograd saved, what checkpoints of the scan start from, the output.

    Args:
        batch_size, sequence_length: of a micro-batch.   dtype: of parameters and activations; the scan works in float32 by itself.
        keeps: under selective checkpointing, whether an operator's results are kept.
    """
    with torch.device("meta"):
        block = BLOCKS[config.variant](config).to(dtype)
        x_BTM = torch.empty(batch_size, sequence_length, config.dim, dtype=dtype, requires_grad=True)
    forward = block if keeps is None else recomputed(block, keeps)
    meter = Meter(closed=lambda operator: True)  # what one takes while it runs is gone by the end
    with meter, like_a_gpu():
        output = forward(x_BTM)[0]
    assert output.requires_grad  # and its graph with it, until the count is done
    return sum(meter.live.values())

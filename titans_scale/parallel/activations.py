"""How much one block's forward pass leaves in memory for its backward pass, counted on the meta device: nothing is allocated or computed.

RMSNorm is counted as its fused GPU kernel keeps it (input and output), not as the many small operators it falls apart into
without a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titans_scale.config import ModelConfig
from titans_scale.models.blocks import BLOCKS
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
    live = _LiveStorages()
    with live, _FusedKernels():
        output = forward(x_BTM)[0]
    assert output.requires_grad  # and its graph with it, until the count is done
    return live.bytes()


class _LiveStorages(TorchDispatchMode):
    """Remembers, without keeping it alive, the storage of every tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                storage = leaf.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self._seen.values() if not storage.expired())


class _FusedKernels(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.rms_norm, torch.rms_norm):
            return _KeepsInputsAndOutput.apply(args[0].shape, args[0])
        return func(*args, **kwargs)


class _KeepsInputsAndOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        output = inputs[0].new_empty(shape)
        ctx.save_for_backward(*inputs, output)
        return output

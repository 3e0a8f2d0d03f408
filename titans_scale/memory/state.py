"""What a scan hands on to the next call. Named tuples: torch's tree functions know them, so a whole state maps, moves and detaches at once.

Shape letters: B batch, H memory heads, R tokens of the open chunk (0 <= R < chunk size), D head dimension.
"""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

AnyState = TypeVar("AnyState")


class OpenChunk(NamedTuple):
    """Tokens since the last chunk boundary: their surprise is taken at the boundary's weights, whenever they come."""

    k_BHRD: Tensor
    v_BHRD: Tensor
    theta_BHR: Tensor
    eta_BHR: Tensor
    alpha_BHR: Tensor

    @property
    def length(self) -> int:
        return self.k_BHRD.shape[2]


class ScanState(NamedTuple):
    """State of the memories after some token. Its size does not depend on how many tokens went by."""

    weights: list[Tensor]
    """Weights after the last token, one (B, H, out, in) a layer: what a read sees now."""
    momentum: list[Tensor]
    """Momentum after the last token, same shapes."""
    chunk_weights: list[Tensor]
    """Weights at the start of the open chunk; those of `weights` where no chunk is open."""
    chunk_momentum: list[Tensor]
    open_chunk: OpenChunk


def detach(state: AnyState) -> AnyState:
    """The same state without its history: truncated backpropagation through time, or inference."""
    return tree_map_only(Tensor, Tensor.detach, state)


def compact(state: AnyState) -> AnyState:
    """The same state without the storage that its tensors are views of: a tail of three tokens must not keep a long prompt alive."""

    def own(x: Tensor) -> Tensor:
        return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x

    return tree_map_only(Tensor, own, state)


def begin_anew(state: ScanState, fresh_weights: list[Tensor], chosen_B: Tensor) -> ScanState:
    """A state in which no chunk is open, but at the chosen rows that before the first token."""
    assert state.open_chunk.length == 0
    anew = chosen_B[:, None, None, None]
    weights = [torch.where(anew, fresh, now) for fresh, now in zip(fresh_weights, state.weights, strict=True)]
    momentum = [now.masked_fill(anew, 0) for now in state.momentum]
    return ScanState(weights, momentum, weights, momentum, state.open_chunk)


def initial_weights(weights: list[Tensor], batch_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Learned weights (H, out, in) as the (B, H, out, in) that every row of a batch starts from."""
    return [weight.to(dtype).expand(batch_size, *weight.shape) for weight in weights]

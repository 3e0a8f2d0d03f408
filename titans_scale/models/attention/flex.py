"""The window as a block mask of torch's flex_attention, compiled: for GPUs and precisions that FlashAttention does not serve.

flex_attention returns its log-sum-exp with an exact gradient, so autograd merges the parts by itself here.
Needs a GPU (no backward pass on a CPU): tests/test_attention.py, marked gpu, holds it to the definition; the block mask is tested anywhere.

Shape letters: B batch, H heads, T query tokens, S key tokens, P persistent tokens, D head dimension; Q and K blocks of queries and keys.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from titans_scale.models.attention.merge import attend, merge
from titans_scale.models.documents import DocumentLayout

BLOCK = 128


def flex_attend(
    q_BHTD: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    prefix_q_BHTD: Tensor,
    prefix_k_BHPD: Tensor,
    prefix_v_BHPD: Tensor,
    window: int,
    documents: DocumentLayout | None = None,
) -> Tensor:
    """As `attend`. Pieces shorter than a block go there: decoding would compile a kernel anew for every length of its context."""
    num_queries, num_keys = q_BHTD.shape[2], keys[0].shape[2]
    if num_queries < BLOCK:
        return attend(q_BHTD, keys, values, prefix_q_BHTD, prefix_k_BHPD, prefix_v_BHPD, window, "sdpa", documents)
    mask = document_mask(documents.number_BT, window) if documents else band_mask(num_queries, num_keys, window, q_BHTD.device)
    parts = []
    for k, v in zip(keys, values, strict=True):
        out, aux = _compiled()(q_BHTD, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
        parts.append((out, aux.lse))
    return merge(parts, prefix_q_BHTD, prefix_k_BHPD, prefix_v_BHPD)[0]


@cache
def _compiled() -> Callable:
    return torch.compile(flex_attention)


@lru_cache(maxsize=16)
def band_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> BlockMask:
    """Each of the last num_queries tokens sees the last `window` up to itself.

    From the blocks' corners: torch's `create_block_mask` looks at every pair of tokens, a gigabyte at 32K tokens.
    """
    past = num_keys - num_queries

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + past - key
        return (distance >= 0) & (distance < window)

    some_QK, all_QK = _band_blocks(num_queries, num_keys, window, device)
    return _block_mask(some_QK[None], all_QK[None], mask, (num_queries, num_keys))


def document_mask(number_BT: Tensor, window: int) -> BlockMask:
    """Each token sees the last `window` up to itself that are of its document.

    Numbers never fall along a row, so the corners of a block tell enough here too.
    """
    length = number_BT.shape[1]

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        return (distance >= 0) & (distance < window) & (number_BT[batch, query] == number_BT[batch, key])

    some_QK, all_QK = _band_blocks(length, length, window, number_BT.device)
    first = torch.arange(0, length, BLOCK, device=number_BT.device)
    first_BQ, last_BQ = number_BT[:, first], number_BT[:, (first + BLOCK - 1).clamp(max=length - 1)]
    some_BQK = some_QK & (last_BQ[:, None] >= first_BQ[..., None])
    all_BQK = all_QK & (first_BQ[:, None] == last_BQ[..., None])
    return _block_mask(some_BQK, all_BQK, mask, (length, length))


def _band_blocks(num_queries: int, num_keys: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of which blocks a window lets some pair meet, and of which all."""
    past = num_keys - num_queries
    first_Q = past + BLOCK * torch.arange(-(-num_queries // BLOCK), device=device)[:, None]
    first_K = BLOCK * torch.arange(-(-num_keys // BLOCK), device=device)
    last_Q, last_K = first_Q + BLOCK - 1, first_K + BLOCK - 1
    some_QK = (first_K <= last_Q.clamp(max=num_keys - 1)) & (first_Q - last_K < window)
    whole_QK = (last_Q < num_keys) & (last_K < num_keys)  # a block cut short by the end counts as masked, as torch has it
    all_QK = whole_QK & (last_K <= first_Q) & (last_Q - first_K < window)
    return some_QK, all_QK


def _block_mask(some_BQK: Tensor, all_BQK: Tensor, mask: Callable[..., Tensor], lengths: tuple[int, int]) -> BlockMask:
    """For each row, or with one row for all of them."""
    blocks = (*_block_lists(some_BQK & ~all_BQK), *_block_lists(all_BQK))
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=lengths)


def _block_lists(chosen_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries the number of chosen blocks of keys, and their indices before all others, for all heads."""
    chosen = chosen_BQK.int()
    return chosen.sum(-1, dtype=torch.int32)[:, None], chosen.argsort(dim=-1, descending=True, stable=True).int()[:, None]

"""FlashAttention as torch carries it: version 2 inside torch, 3 or 4 in its place where that package is installed.

The operators below torch's own `varlen_attn` are called directly, for two reasons: merge.py needs the backward pass with the output and
the log-sum-exp of a larger softmax, and the autograd formula of `varlen_attn` ignores a gradient that comes through its log-sum-exp.
Needs a GPU: tests/test_attention.py, marked gpu, holds it to the definition.

Shape letters: B batch, H heads, T query tokens, S key tokens, D head dimension.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, list_flash_attention_impls

NEWER = {(9, 0): ("FA3", "flash_attn_interface"), (10, 0): ("FA4", "flash_attn.cute")}
"""Compute capability -> what torch calls the newer kernels made for it, and the module that has to be installed."""


def flash_forward(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, window: int, bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `tiled_forward`. The kernel aligns the last query with the last key, and counts the keys to the left of a query.

    Args:
        bounds: where each document begins if all rows are one, then B * T, int32; the kernel takes the documents for the batch. None: the
            rows are the batch.
    """
    num_queries, num_keys = q_BHTD.shape[2], k_BHSD.shape[2]
    q, k, v = (_by_token(x, bounds) for x in (q_BHTD, k_BHSD, v_BHSD))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, num_queries, num_keys, 0.0, False, False, window_size_left=window - 1, window_size_right=0
    )
    if bounds is not None:  # of all rows as one: (B * T, H, D) and (H, B * T)
        out, lse = out.unflatten(0, (-1, num_queries)), lse.unflatten(1, (-1, num_queries)).transpose(0, 1)
    return out.transpose(1, 2), lse


def flash_backward(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    window: int,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `tiled_backward`; bounds as in `flash_forward`."""
    num_queries, num_keys = q_BHTD.shape[2], k_BHSD.shape[2]
    grad, q, k, v, out = (_by_token(x, bounds) for x in (grad_BHTD, q_BHTD, k_BHSD, v_BHSD, out_BHTD))
    lse = lse_BHT if bounds is None else lse_BHT.transpose(0, 1).flatten(1)
    no_random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    unused = torch.empty(0, device=q.device)
    gradients = torch.ops.aten._flash_attention_backward(
        grad.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        bounds,
        bounds,
        num_queries,
        num_keys,
        0.0,
        False,
        no_random_state,
        unused,
        window_size_left=window - 1,
        window_size_right=0,
    )
    if bounds is not None:
        gradients = [x.unflatten(0, (-1, num_queries)) for x in gradients]
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _by_token(x_BHTD: Tensor, bounds: Tensor | None) -> Tensor:
    """(B, T, H, D), as the kernel has it; all rows as one with bounds."""
    x_BTHD = x_BHTD.transpose(1, 2)
    return x_BTHD if bounds is None else x_BTHD.flatten(0, 1)


@cache
def newest_flash(capability: tuple[int, int]) -> str:
    """Switches torch to the newest FlashAttention installed for a GPU of this compute capability, and says which that is."""
    name, module = NEWER.get(capability, ("", ""))
    if current_flash_attention_impl() is None and name in list_flash_attention_impls() and _is_installed(module):
        activate_flash_attention_impl(name)
    return {"FA3": "FlashAttention 3", "FA4": "FlashAttention 4"}.get(current_flash_attention_impl() or "", "torch's own FlashAttention 2")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # the package above it is missing or broken
        return False

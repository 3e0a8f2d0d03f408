"""Cross-entropy of the next token: from logits, or from the head's input and weight without ever holding all logits.

At a large vocabulary the logits are the largest tensor of a training step, and autograd keeps three of their size. Here a chunk of
tokens at a time goes through the head, and its gradients are taken while its logits are there: the same three matrix products
as in the plain form, nothing computed twice. torch's own `linear_cross_entropy` (2.13) does likewise, but under bfloat16 it returns
the sum in bfloat16 and adds up the weight's gradient in it, and torch 2.11 and 2.12 have no chunks.

Shape letters: B batch, T tokens, N = B * T, C tokens of a chunk, M model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position that has no target."""


def cross_entropy_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the positions that have a target, in float32 (float64 stays).

    Args:
        logits_BTV: of the next token.   targets_BT: the next token itself; -100 where there is none.
    """
    logits_NV = logits_BTV.flatten(0, 1)
    return F.cross_entropy(logits_NV.to(_wide(logits_NV)), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy of predicting labels[t + 1] from logits[t], in float32; 0 where there is no target at all."""
    targets_BT = labels_BT[:, 1:]
    return cross_entropy_sum(logits_BTV[:, :-1].float(), targets_BT) / (targets_BT != IGNORED).sum().clamp(min=1)


def linear_cross_entropy_sum(x_BTM: Tensor, weight_VM: Tensor, targets_BT: Tensor, *, logits_bytes: int) -> Tensor:
    """`cross_entropy_sum(x @ weight.T, targets)` in little memory.

    The gradients are made along with the loss, so it is differentiable once, by one backward pass.

    Args:
        x_BTM, weight_VM: input and weight of the head, of one dtype.   targets_BT: as in `cross_entropy_sum`.
        logits_bytes: room for the logits of a chunk; as many tokens as fit go through the head at once, and at least one.
    Returns:
        A scalar in float32 (float64 for such inputs). Logits and the weight's gradient are computed in that precision; where x is
        bfloat16 on a GPU the matrix products take bfloat16.
    """
    x_NM, targets_N = x_BTM.flatten(0, 1), targets_BT.flatten()
    chunk = tokens_of_a_chunk(x_NM.shape[0], weight_VM.shape[0], bytes_per_logit=_wide(x_NM).itemsize, logits_bytes=logits_bytes)
    differentiable = torch.is_grad_enabled() and (x_NM.requires_grad or weight_VM.requires_grad)
    return _loss_and_gradients(x_NM, weight_VM, targets_N, chunk, differentiable)[0]


def tokens_of_a_chunk(num_tokens: int, vocab_size: int, *, bytes_per_logit: int, logits_bytes: int) -> int:
    """Tokens whose logits and log-probabilities fit into logits_bytes together, all chunks being of nearly one length."""
    fitting = max(1, logits_bytes // (2 * bytes_per_logit * vocab_size))
    num_chunks = max(1, -(-num_tokens // fitting))
    return max(1, -(-num_tokens // num_chunks))


# A custom operator, because then torch.compile and selective checkpointing meet one operator and not a loop.
@torch.library.custom_op("titans_scale::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    x_NM: Tensor, weight_VM: Tensor, targets_N: Tensor, chunk: int, differentiable: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, where wanted (else empty), its gradients: x's in x's dtype, the weight's in the wide one."""
    wide = _wide(x_NM)
    # A CPU has no product of bfloat16 with a float32 result.
    factors = x_NM.dtype if x_NM.is_cuda else wide
    weight = weight_VM.to(factors)
    loss = torch.zeros((), dtype=wide, device=x_NM.device)
    grad_x_NM = torch.empty_like(x_NM) if differentiable else x_NM.new_empty(0)
    grad_weight_VM = torch.zeros_like(weight_VM, dtype=wide) if differentiable else x_NM.new_empty(0, dtype=wide)
    for start in range(0, x_NM.shape[0], chunk):
        here = slice(start, start + chunk)
        gradients = (grad_x_NM[here], grad_weight_VM) if differentiable else None
        loss += _chunk_loss(x_NM[here].to(factors), weight, targets_N[here], gradients)
    return loss, grad_x_NM, grad_weight_VM


def _chunk_loss(x_CM: Tensor, weight_VM: Tensor, targets_C: Tensor, gradients: tuple[Tensor, Tensor] | None) -> Tensor:
    """The loss of one chunk. Fills in its rows of x's gradient and adds to the weight's."""
    has_target_C1 = (targets_C != IGNORED).unsqueeze(1)
    targets_C1 = targets_C.unsqueeze(1).where(has_target_C1, 0)
    log_p_CV = torch.log_softmax(_product(x_CM, weight_VM.mT), dim=-1)
    loss = -log_p_CV.gather(1, targets_C1).masked_fill(~has_target_C1, 0).sum()
    if gradients is not None:
        grad_x_CM, grad_weight_VM = gradients
        minus_one = log_p_CV.new_full((), -1).expand_as(targets_C1)
        grad_logits_CV = log_p_CV.exp_().scatter_add_(1, targets_C1, minus_one).to(x_CM.dtype)
        # Positions without a target are left out here, on (C, M), rather than on the far larger (C, V).
        grad_x_CM.copy_((grad_logits_CV @ weight_VM).masked_fill_(~has_target_C1, 0))
        _add_product(grad_weight_VM, grad_logits_CV.mT, x_CM.masked_fill(~has_target_C1, 0))
    return loss


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, float64 for such factors."""
    return a @ b if a.dtype == _wide(a) else torch.mm(a, b, out_dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@_loss_and_gradients.register_fake
def _(x_NM: Tensor, weight_VM: Tensor, targets_N: Tensor, chunk: int, differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(x_NM)
    loss = x_NM.new_empty((), dtype=wide)
    if not differentiable:
        return loss, x_NM.new_empty(0), x_NM.new_empty(0, dtype=wide)
    return loss, torch.empty_like(x_NM), torch.empty_like(weight_VM, dtype=wide)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad_x_NM, grad_weight_VM = output
    ctx.mark_non_differentiable(grad_x_NM, grad_weight_VM)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_x_NM, grad_weight_VM)


def _scale_gradients(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor, Tensor, None, None, None]:
    grad_x_NM, grad_weight_VM = ctx.saved_tensors
    # In place, to hold the weight's gradient once; a second backward pass is then refused by autograd.
    return grad_x_NM.mul_(grad_loss), grad_weight_VM.mul_(grad_loss), None, None, None


_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)

"""Cross-entropy of the next token: from logits, or from the head's input and weight without ever holding all logits.

At a large vocabulary the logits are the largest tensor of a training step, and autograd keeps three of their size. Here a chunk of
tokens at a time goes through the head, and its gradients are taken while its logits are there: the same three matrix products
as in the plain form, nothing computed twice. torch's own `linear_cross_entropy` (2.13) does likewise, but under bfloat16 it returns
the sum in bfloat16 and adds up the weight's gradient in it, and torch 2.11 and 2.12 have no chunks.

Where ranks share the vocabulary, each has the logits of its own words only, and of a token they exchange two numbers, in the loss's
precision: the largest of their log-sum-exps, and the sum of their shares of the probability.

Shape letters: B batch, T tokens, N = B * T, C tokens of a chunk, M model width, V vocabulary, W a rank's share of it (all of it on one
device).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_scale.memory.ranks import sum_over
from titans_scale.models.ranks import Words

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


def linear_cross_entropy_sum(
    x_BTM: Tensor, weight_WM: Tensor, targets_BT: Tensor, *, logits_bytes: int | None, words: Words | None = None
) -> Tensor:
    """`cross_entropy_sum(x @ weight.T, targets)` in little memory.

    The gradients are made along with the loss, so it is differentiable once, by one backward pass.

    Args:
        x_BTM, weight_WM: input and weight of the head, of one dtype.   targets_BT: as in `cross_entropy_sum`.
        logits_bytes: room for the logits of a chunk; as many tokens as fit go through the head at once, and at least one. None: all.
        words: which ones weight_WM is for, where it is not for all.
    Returns:
        A scalar in float32 (float64 for such inputs), the same on all ranks; x's gradient is a rank's part. Logits and the
        weight's gradient are computed in that precision; where x is bfloat16 on a GPU the matrix products take bfloat16.
    """
    x_NM, targets_N = x_BTM.flatten(0, 1), targets_BT.flatten()
    words = words or Words(0, weight_WM.shape[0], "")
    chunk = x_NM.shape[0]
    if logits_bytes is not None:  # by the largest share: all ranks go through the same chunks
        chunk = tokens_of_a_chunk(chunk, words.most, bytes_per_logit=_wide(x_NM).itemsize, logits_bytes=logits_bytes)
    differentiable = torch.is_grad_enabled() and (x_NM.requires_grad or weight_WM.requires_grad)
    return _loss_and_gradients(x_NM, weight_WM, targets_N, chunk, differentiable, words.first, words.group)[0]


def tokens_of_a_chunk(num_tokens: int, vocab_size: int, *, bytes_per_logit: int, logits_bytes: int) -> int:
    """Tokens whose logits and log-probabilities fit into logits_bytes together, all chunks being of nearly one length."""
    fitting = max(1, logits_bytes // (2 * bytes_per_logit * vocab_size))
    num_chunks = max(1, -(-num_tokens // fitting))
    return max(1, -(-num_tokens // num_chunks))


# A custom operator, because then torch.compile and selective checkpointing meet one operator and not a loop.
@torch.library.custom_op("titans_scale::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    x_NM: Tensor, weight_WM: Tensor, targets_N: Tensor, chunk: int, differentiable: bool, first_word: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, where wanted (else empty), its gradients: x's in x's dtype, the weight's in the wide one."""
    wide = _wide(x_NM)
    # A CPU has no product of bfloat16 with a float32 result.
    factors = x_NM.dtype if x_NM.is_cuda else wide
    weight = weight_WM.to(factors)
    loss = torch.zeros((), dtype=wide, device=x_NM.device)
    grad_x_NM = torch.empty_like(x_NM) if differentiable else x_NM.new_empty(0)
    grad_weight_WM = torch.zeros_like(weight_WM, dtype=wide) if differentiable else x_NM.new_empty(0, dtype=wide)
    for start in range(0, x_NM.shape[0], chunk):
        here = slice(start, start + chunk)
        gradients = (grad_x_NM[here], grad_weight_WM) if differentiable else None
        loss += _chunk_loss(x_NM[here].to(factors), weight, targets_N[here], gradients, first_word, group)
    return sum_over(loss, group), grad_x_NM, grad_weight_WM


def _chunk_loss(
    x_CM: Tensor, weight_WM: Tensor, targets_C: Tensor, gradients: tuple[Tensor, Tensor] | None, first_word: int, group: str
) -> Tensor:
    """The loss of one chunk, of the targets that are a rank's own words. Fills in its rows of x's gradient and adds to the weight's."""
    has_target_C1 = (targets_C != IGNORED).unsqueeze(1)
    own_C1 = targets_C.unsqueeze(1) - first_word
    is_own_C1 = has_target_C1 & (own_C1 >= 0) & (own_C1 < weight_WM.shape[0])
    own_C1 = own_C1.where(is_own_C1, 0)
    logits_CW = _product(x_CM, weight_WM.mT)
    log_p_CW = _log_softmax_over_ranks(logits_CW, group) if group else torch.log_softmax(logits_CW, dim=-1)
    loss = -log_p_CW.gather(1, own_C1).masked_fill(~is_own_C1, 0).sum()
    if gradients is not None:
        grad_x_CM, grad_weight_WM = gradients
        grad_logits_CW = log_p_CW.exp_().scatter_add_(1, own_C1, -is_own_C1.to(log_p_CW.dtype)).to(x_CM.dtype)
        # Positions without a target are left out here, on (C, M), rather than on the far larger (C, W).
        grad_x_CM.copy_((grad_logits_CW @ weight_WM).masked_fill_(~has_target_C1, 0))
        _add_product(grad_weight_WM, grad_logits_CW.mT, x_CM.masked_fill(~has_target_C1, 0))
    return loss


def _log_softmax_over_ranks(logits_CW: Tensor, group: str) -> Tensor:
    """Log-probabilities of a rank's words among those of all ranks; overwrites the logits."""
    own_C1 = torch.logsumexp(logits_CW, dim=-1, keepdim=True)
    largest_C1 = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(own_C1, "max", group))
    total_C1 = largest_C1 + sum_over((own_C1 - largest_C1).exp(), group).log()
    return logits_CW.sub_(total_C1)


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
def _(x_NM: Tensor, weight_WM: Tensor, targets_N: Tensor, chunk: int, differentiable: bool, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(x_NM)
    loss = x_NM.new_empty((), dtype=wide)
    if not differentiable:
        return loss, x_NM.new_empty(0), x_NM.new_empty(0, dtype=wide)
    return loss, torch.empty_like(x_NM), torch.empty_like(weight_WM, dtype=wide)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad_x_NM, grad_weight_WM = output
    ctx.mark_non_differentiable(grad_x_NM, grad_weight_WM)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_x_NM, grad_weight_WM)


def _scale_gradients(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grad_x_NM, grad_weight_WM = ctx.saved_tensors
    # In place, to hold the weight's gradient once; a second backward pass is then refused by autograd.
    return grad_x_NM.mul_(grad_loss), grad_weight_WM.mul_(grad_loss), *(None,) * 5


_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)

"""Sampling from a language model through its streaming state.

Shape letters: B batch, T tokens, V vocabulary.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

PREFILL_TOKENS = 2048
"""Tokens of a prompt that go through the model at once; bounds the memory that a long prompt takes."""


class StreamingModel(Protocol):
    """What sampling needs of a model: logits and the next state, from tokens and a state."""

    def init_state(self, batch_size: int = 1) -> Any: ...

    def __call__(self, tokens_BT: Tensor, state: Any = None) -> Any: ...


@torch.inference_mode()
def generate_tokens(
    model: StreamingModel,
    prompt_BT: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_token: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Continue each row of a prompt.

    Args:
        prompt_BT: token ids, (B, T), T >= 1.
        max_new_tokens: tokens to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p, min_p: keep the k likeliest tokens; the likeliest that together reach probability p; those with at least
            min_p of the likeliest one's probability. Applied in this order; None: off.
        stop_token: a row that has drawn it goes on with it; the loop ends when all rows have.
        seed: of the draws; None: torch's global generator.
    Returns:
        (B, T + new), the prompt included.
    Raises:
        ValueError: an empty prompt, or an option outside its range.
    """
    _check(prompt_BT, max_new_tokens, temperature, top_k, top_p, min_p)
    device = prompt_BT.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    state, logits_BV = model.init_state(prompt_BT.shape[0]), prompt_BT.new_zeros(0)
    for piece in prompt_BT.split(PREFILL_TOKENS, dim=1):
        output = model(piece, state=state)
        state, logits_BV = output.state, output.logits[:, -1]
    tokens = [prompt_BT]
    stopped_B = torch.zeros(prompt_BT.shape[0], dtype=torch.bool, device=device)
    for added in range(max_new_tokens):
        if added:
            output = model(tokens[-1], state=state)
            state, logits_BV = output.state, output.logits[:, -1]
        next_B = _draw(filter_logits(logits_BV.float(), top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature), generator)
        if stop_token is not None:
            next_B = torch.where(stopped_B, stop_token, next_B)
            stopped_B |= next_B == stop_token
        tokens.append(next_B.unsqueeze(1))
        if stop_token is not None and bool(stopped_B.all()):
            break
    return torch.cat(tokens, dim=1)


def filter_logits(
    logits_BV: Tensor, *, temperature: float, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Logits after temperature, with -inf at every token that the filters drop; the likeliest token always stays."""
    if temperature == 0:
        likeliest = logits_BV.argmax(-1, keepdim=True)
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, likeliest, 0.0)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        smallest = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, -torch.inf)
    if top_p is not None:
        ordered, order = logits_BV.softmax(-1).sort(descending=True)
        reached_before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, reached_before >= top_p)
        logits_BV = logits_BV.masked_fill(dropped, -torch.inf)
    if min_p is not None:
        probability = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(probability < min_p * probability.amax(-1, keepdim=True), -torch.inf)
    return logits_BV


def _draw(logits_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(-1)


def _check(prompt_BT: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    if prompt_BT.dim() != 2 or prompt_BT.shape[1] == 0:
        raise ValueError(f"the prompt has shape {tuple(prompt_BT.shape)}; it must be (batch, tokens) with at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; it must lie above 0 and at most at 1, or be None")

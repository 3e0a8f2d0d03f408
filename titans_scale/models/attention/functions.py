"""Which token sees which: a sliding window (mag, mal) or a segment with its memory tokens (mac), and the persistent prefix.

Keys of the prefix have no position: a persistent token says the same to every token, however far along, so it is met by the query
as it was before its rotation.

Shape letters: B batch, H heads, T query tokens, S key tokens, P persistent tokens, D head dimension.
"""

from torch import Tensor

from titans_scale.models.attention.backends import BackendRequest, choose_backend
from titans_scale.models.attention.flex import flex_attend
from titans_scale.models.attention.merge import attend
from titans_scale.models.attention.projections import KeyValue
from titans_scale.models.documents import DocumentLayout
from titans_scale.models.layers import rotate


def window_attention(
    q_BHTD: Tensor,
    context: KeyValue,
    prefix: KeyValue,
    *,
    window: int,
    theta: float,
    backend: BackendRequest = "auto",
    documents: DocumentLayout | None = None,
) -> Tensor:
    """Each token attends to the prefix and to the last `window` tokens, itself included. O(T * (window + P)) in time, O(T) in memory.

    Args:
        q_BHTD: queries of the last T of the S tokens.   context: keys and values of all S, at least the last T + window - 1 there are.
        prefix: those of the persistent tokens; P may be 0.   theta: base of the rotary embedding.   backend: model.attention_backend.
        documents: of rows that several are packed in, T = S: the window ends at the start of the token's document.
    Raises:
        ValueError: the backend cannot run on these tensors.
    """
    return _attend(q_BHTD, (context,), prefix, window, theta, backend, documents)


def segment_attention(
    q_BHTD: Tensor, memory: KeyValue, segment: KeyValue, prefix: KeyValue, *, theta: float, backend: BackendRequest = "auto"
) -> Tensor:
    """Causal attention of the last T tokens of a segment over [prefix || memory tokens || segment] (equations 22 and 23).

    Memory token j was asked for by token j, so token i sees memory tokens j <= i only: more would leak the segment's future. Two
    causal attentions with the same positions, then, merged into one softmax: no mask over both is ever made.

    Args:
        q_BHTD: queries of the last T of the S tokens.   memory, segment: keys and values of all S tokens so far in the segment.
        prefix: those of the persistent tokens; P may be 0.   theta: base of the rotary embedding.   backend: model.attention_backend.
    Raises:
        ValueError: the backend cannot run on these tensors.
    """
    return _attend(q_BHTD, (memory, segment), prefix, segment.k.shape[2], theta, backend)


def _attend(
    q_BHTD: Tensor,
    contexts: tuple[KeyValue, ...],
    prefix: KeyValue,
    window: int,
    theta: float,
    backend: BackendRequest,
    documents: DocumentLayout | None = None,
) -> Tensor:
    past = contexts[0].k.shape[2] - q_BHTD.shape[2]
    rotated = rotate(q_BHTD, start=past, theta=theta)
    keys = [rotate(context.k, start=0, theta=theta) for context in contexts]
    values = [context.v for context in contexts]
    chosen = choose_backend(backend, q_BHTD.device, q_BHTD.dtype, head_dim=q_BHTD.shape[-1]).name
    if chosen == "flex":
        return flex_attend(rotated, keys, values, q_BHTD, prefix.k, prefix.v, window, documents)
    return attend(rotated, keys, values, q_BHTD, prefix.k, prefix.v, window, chosen, documents)

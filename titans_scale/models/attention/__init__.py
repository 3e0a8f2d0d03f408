"""Attention with a persistent prefix, over a sliding window (mag, mal) or inside a segment (mac), on whatever kernels a device has.

`functions.py` says which token sees which; `merge.py` makes one softmax of several groups of keys, exact in its gradients; `flash.py`,
`flex.py` and `tiles.py` are the kernels below it, chosen by `backends.py`.
"""

from titans_scale.models.attention.backends import Backend, choose_backend
from titans_scale.models.attention.functions import segment_attention, window_attention
from titans_scale.models.attention.projections import Attention, KeyValue

__all__ = ["Attention", "Backend", "KeyValue", "choose_backend", "segment_attention", "window_attention"]

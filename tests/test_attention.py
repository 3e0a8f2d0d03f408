"""Block-wise attention against the T x T definition."""

import pytest
import torch

from titans_scale.models.attention import KeyValue, segment_attention, window_attention
from titans_scale.models.layers import rotate

BATCH, HEADS, DIM, THETA = 2, 3, 8, 100.0


def randn(seed, length):
    return torch.randn(BATCH, HEADS, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def key_value(seed, length):
    return KeyValue(randn(seed, length), randn(seed + 50, length))


def reference(q, context, prefix, mask):
    """Softmax over everything with rotary positions 0, 1, ... on the context; the prefix is met without rotation."""
    length = context.k.shape[2]
    past = length - q.shape[2]
    scores = rotate(q, start=past, theta=THETA) @ rotate(context.k, start=0, theta=THETA).mT
    scores = torch.cat((q @ prefix.k.mT, scores.masked_fill(~mask, -torch.inf)), dim=-1) / DIM**0.5
    return scores.softmax(-1) @ torch.cat((prefix.v, context.v), dim=2)


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("length, window", [(1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (33, 4), (33, 1), (33, 16), (20, 64)])
def test_a_window_over_blocks_equals_the_masked_square(length, window, persistent):
    q, context, prefix = randn(0, length), key_value(1, length), key_value(2, persistent)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    expected = reference(q, context, prefix, (distance >= 0) & (distance < window))
    torch.testing.assert_close(window_attention(q, context, prefix, window=window, theta=THETA), expected)


@pytest.mark.parametrize("past", [1, 5, 15, 40])
@pytest.mark.parametrize("length", [1, 7, 16, 50])
def test_a_window_continues_over_earlier_keys(past, length, window=16):
    q, context, prefix = randn(0, past + length), key_value(1, past + length), key_value(2, 2)
    whole = window_attention(q, context, prefix, window=window, theta=THETA)
    kept = context.between(max(0, past - window + 1))
    later = window_attention(q[:, :, past:], kept, prefix, window=window, theta=THETA)
    torch.testing.assert_close(later, whole[:, :, past:])


def test_a_segment_sees_prefix_memory_tokens_and_itself_up_to_its_own_place():
    q, memory, segment, prefix = randn(0, 9), key_value(1, 9), key_value(2, 9), key_value(3, 2)
    both = KeyValue(
        torch.cat((rotate(memory.k, start=0, theta=THETA), rotate(segment.k, start=0, theta=THETA)), dim=2),
        torch.cat((memory.v, segment.v), dim=2),
    )
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    scores = rotate(q, start=0, theta=THETA) @ both.k.mT
    scores = torch.cat((q @ prefix.k.mT, scores.masked_fill(~causal.repeat(1, 2), -torch.inf)), dim=-1) / DIM**0.5
    expected = scores.softmax(-1) @ torch.cat((prefix.v, both.v), dim=2)
    torch.testing.assert_close(segment_attention(q, memory, segment, prefix, theta=THETA), expected)
    torch.testing.assert_close(segment_attention(q[:, :, 4:], memory, segment, prefix, theta=THETA), expected[:, :, 4:])


def test_rotation_depends_on_distance_alone():
    q, k = randn(0, 6), randn(1, 6)
    near = rotate(q, start=3, theta=THETA) @ rotate(k, start=1, theta=THETA).mT
    far = rotate(q, start=1003, theta=THETA) @ rotate(k, start=1001, theta=THETA).mT
    torch.testing.assert_close(near, far)


def test_memory_is_linear_in_the_sequence():
    """Nothing the size of T x T is ever made."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    length, window = 2048, 32
    q, context, prefix = randn(0, length), key_value(1, length), key_value(2, 2)
    with Watch():
        window_attention(q, context, prefix, window=window, theta=THETA)
    assert largest <= BATCH * HEADS * length * (2 * window + 2)

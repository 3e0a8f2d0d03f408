"""Writes that must not blow up, and the plain rule beside them, which does."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_config

from titans_scale import TitansLM
from titans_scale.memory import MemoryConfig, MemoryProbe, NeuralMemory, memory_scan

DIM, HIDDEN, TOKENS = 32, 64, 4096
GATES = [(0.1, 0.9), (0.5, 0.9), (1.0, 0.99), (2.0, 0.9), (2.0, 0.999)]
KEYS = ["equal", "alternating", "random"]


def largest_output(*, depth, theta, eta, keys, write_rule, chunk_size=64, length=TOKENS):
    """In float32, nothing forgotten, reading back what was written."""
    generator = torch.Generator().manual_seed(0)
    distinct = {"equal": 1, "alternating": 2, "random": length}[keys]
    k = F.normalize(torch.randn(1, 1, distinct, DIM, generator=generator), dim=-1).repeat(1, 1, length // distinct, 1)
    v = torch.randn(1, 1, distinct, DIM, generator=generator).repeat(1, 1, length // distinct, 1)
    widths = [DIM, *[HIDDEN] * (depth - 1), DIM]
    weights = [torch.randn(1, out, into, generator=generator) / into**0.5 for into, out in itertools.pairwise(widths)]
    gates = [torch.full((1, 1, length), value) for value in (theta, eta, 0.0)]
    with torch.no_grad():
        y, _ = memory_scan(k, k, v, *gates, weights, chunk_size=chunk_size, write_rule=write_rule)
    return y.abs().max().item()


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("theta, eta", GATES)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_normalized_rule_stays_bounded(depth, theta, eta, keys):
    assert largest_output(depth=depth, theta=theta, eta=eta, keys=keys, write_rule="normalized") < 50


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("chunk_size, length", [(1, 512), (16, 4096), (256, 8192)])
def test_the_normalized_rule_stays_bounded_at_any_chunk_size(chunk_size, length, depth):
    for theta, eta in ((2.0, 0.9), (2.0, 0.999)):
        settings = {"depth": depth, "theta": theta, "eta": eta, "chunk_size": chunk_size, "length": length}
        assert largest_output(keys="equal", write_rule="normalized", **settings) < 200


def test_outer_gradients_through_a_long_sequence_stay_small():
    """A new MAC over 4,096 random tokens. With max_step 1 its outputs are as harmless, but chaotic: the gradient is 100 times larger."""

    def gradient_norm(*overrides):
        sizes = ("dim=256", "num_heads=1", "segment_len=512", "memory.num_heads=4", "memory.chunk_size=64", "vocab_size=100")
        sizes += ("mlp_dim=64", "num_persistent_tokens=4")
        model = TitansLM(small_config("mac", *sizes, *overrides))
        model.init_weights(0)
        tokens = torch.randint(100, (1, 4096), generator=torch.Generator().manual_seed(1))
        model(tokens, labels=tokens).loss.backward()
        return torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()

    assert gradient_norm() < 20
    assert gradient_norm("memory.max_step=1") > 100


@pytest.mark.parametrize("keys", KEYS)
def test_the_plain_rule_does_not(keys):
    assert not largest_output(depth=2, theta=0.5, eta=0.9, keys=keys, write_rule="plain") < 1e3


def test_the_normalized_rule_does_not_slow_a_single_fact():
    """A write with theta up to 1/8 is the plain rule's at a chunk of 64, but for the factor 1 - eta of the momentum."""
    k = F.normalize(torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    v, gate = torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1)
    weights = [torch.zeros(1, 8, 8)]
    plain, _ = memory_scan(k, k, v, 0.125 * gate, 0 * gate, 0 * gate, weights)
    normalized, _ = memory_scan(k, k, v, 0.125 * gate, 0 * gate, 0 * gate, weights, write_rule="normalized")
    torch.testing.assert_close(plain, normalized)
    assert normalized[0, 0, 0, 0].item() == pytest.approx(0.25)


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e2, 1e4]),
    gates=st.tuples(*[st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 0.999, 1.0])] * 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    residual=st.booleans(),
    equal=st.booleans(),
)
def test_values_and_gradients_are_finite_whatever_comes_in(depth, scale, gates, dtype, residual, equal):
    torch.manual_seed(0)
    config = MemoryConfig(num_heads=2, depth=depth, chunk_size=8, residual_norm=residual)
    memory = NeuralMemory(16, config).to(dtype)
    x = torch.randn(1, 1 if equal else 64, 16, dtype=dtype).expand(1, 64, 16) * scale
    x = x.detach().clone().requires_grad_()
    with torch.no_grad():
        for projection, value in zip((memory.theta_proj, memory.eta_proj, memory.alpha_proj), gates, strict=True):
            projection.bias.copy_(torch.logit(torch.tensor(value)).clamp(-200, 200))
            projection.weight.zero_()
    y, state = memory(x)
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert all(w.isfinite().all() for w in (*state.scan.weights, *state.scan.momentum))
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in memory.parameters())


def test_the_inner_clip_bounds_what_one_token_can_write():
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 1, 1, 8, generator=generator) * 100 for _ in range(2))
    weights = [torch.zeros(1, 8, 8)]
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    _, state = memory_scan(k, k, v, one, zero, zero, weights, max_inner_grad_norm=0.5)
    assert state.weights[0].norm().item() == pytest.approx(0.5, rel=1e-5)


def test_a_write_lowers_the_inner_loss():
    torch.manual_seed(0)
    memory = NeuralMemory(32, MemoryConfig(num_heads=2, chunk_size=16))
    with torch.no_grad(), MemoryProbe(memory) as probe:
        memory(torch.randn(2, 64, 32))
    metrics = probe.metrics()
    assert 0 < metrics["inner_loss_after"] < metrics["inner_loss_before"]
    assert 0 < metrics["theta_mean"] < 0.1 and 0.8 < metrics["eta_mean"] < 1 and 0 < metrics["alpha_mean"] < 0.02
    assert metrics["surprise_norm"] > 0 and metrics["state_norm"] > 0

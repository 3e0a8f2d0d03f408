"""Writes that must not blow up, and the plain rule beside them, which does."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_models import small_config

from titans_scale import TitansLM
from titans_scale.memory import MemoryConfig, MemoryProbe, NeuralMemory, memory_scan

DIM, HIDDEN, TOKENS = 32, 64, 4096
EXAMPLES = 60
GATES = [(0.1, 0.9), (0.5, 0.9), (1.0, 0.99), (2.0, 0.9), (2.0, 0.999)]
KEYS = ["equal", "alternating", "random"]


def largest_output(*, depth, theta, eta, keys, write_rule, chunk_size=64, length=TOKENS, max_inner_grad_norm=None):
    """In float32, nothing forgotten, reading back what was written."""
    generator = torch.Generator().manual_seed(0)
    distinct = {"equal": 1, "alternating": 2, "random": length}[keys]
    k = F.normalize(torch.randn(1, 1, distinct, DIM, generator=generator), dim=-1).repeat(1, 1, length // distinct, 1)
    v = torch.randn(1, 1, distinct, DIM, generator=generator).repeat(1, 1, length // distinct, 1)
    widths = [DIM, *[HIDDEN] * (depth - 1), DIM]
    weights = [torch.randn(1, out, into, generator=generator) / into**0.5 for into, out in itertools.pairwise(widths)]
    gates = [torch.full((1, 1, length), value) for value in (theta, eta, 0.0)]
    with torch.no_grad():
        options = {"chunk_size": chunk_size, "write_rule": write_rule, "max_inner_grad_norm": max_inner_grad_norm}
        y, _ = memory_scan(k, k, v, *gates, weights, **options)
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
@pytest.mark.parametrize("theta, eta", GATES)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_clipped_online_rule_stays_bounded(depth, theta, eta, keys):
    """Looser than `normalized` where momentum lasts longer than a chunk: docs/stability.md has the numbers."""
    limit = 15 if eta == 0.9 or depth == 1 else {2: 150, 4: 2e4}[depth]
    assert largest_output(depth=depth, theta=theta, eta=eta, keys=keys, write_rule="online", max_inner_grad_norm=1.0) < limit


@pytest.mark.parametrize("keys", KEYS)
def test_the_plain_rule_does_not(keys):
    assert not largest_output(depth=2, theta=0.5, eta=0.9, keys=keys, write_rule="plain") < 1e3


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9])
def test_the_plain_rule_is_stable_on_equal_keys_while_two_theta_c_over_one_minus_eta_is_below_two(eta):
    """The condition of docs/stability.md, for a linear memory. Above 2 momentum lags behind a chunk, so the other side is taken at 4."""

    def largest(condition):
        theta = condition * (1 - eta) / (2 * 64)
        return largest_output(depth=1, theta=theta, eta=eta, keys="equal", write_rule="plain", chunk_size=64, length=8192)

    assert largest(1.9) < 10
    assert not largest(4.0) < 1e6


def test_the_normalized_rule_does_not_slow_a_single_fact():
    """A write with theta up to 1/8 is the plain rule's at a chunk of 64, but for the factor 1 - eta of the momentum."""
    k = F.normalize(torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    v, gate = torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1)
    weights = [torch.zeros(1, 8, 8)]
    plain, _ = memory_scan(k, k, v, 0.125 * gate, 0 * gate, 0 * gate, weights)
    normalized, _ = memory_scan(k, k, v, 0.125 * gate, 0 * gate, 0 * gate, weights, write_rule="normalized")
    torch.testing.assert_close(plain, normalized)
    assert normalized[0, 0, 0, 0].item() == pytest.approx(0.25)


EXTREME = [0.0, 1e-30, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 2**-24, 1.0]
"""Gates at the ends of their ranges and next to them; 1 - 2**-24 is the last float32 before 1."""


def assert_a_scan_is_finite(*, depth, scale, gates, keys, dtype, chunk_size, **rule):
    """Three chunks and a bit: outputs, weights, momentum, and the gradients of their sum in everything that goes in."""
    generator = torch.Generator().manual_seed(0)
    length, dim, hidden = 3 * chunk_size + 1, 8, 16
    distinct = {"equal": 1, "alternating": 2, "random": length, "zero": length}[keys]
    repeats = -(-length // distinct)

    def tokens(size):
        return torch.randn(1, 1, distinct, dim, generator=generator).repeat(1, 1, repeats, 1)[:, :, :length] * size

    q, k = F.normalize(tokens(1.0), dim=-1), F.normalize(tokens(0.0 if keys == "zero" else 1.0), dim=-1)
    inputs = [x.to(dtype) for x in (q, k, tokens(scale))] + [torch.full((1, 1, length), gate) for gate in gates]
    widths = [dim, *[hidden] * (depth - 1), dim]
    inputs += [torch.randn(1, out, into, generator=generator) / into**0.5 for into, out in itertools.pairwise(widths)]
    inputs = [x.requires_grad_() for x in inputs]
    y, state = memory_scan(*inputs[:6], inputs[6:], chunk_size=chunk_size, **rule)
    results = [y, *state.weights, *state.momentum]
    assert all(x.isfinite().all() for x in results)
    gradients = torch.autograd.grad(sum(x.float().sum() for x in results), inputs)
    assert all(x.isfinite().all() for x in gradients)


whatever_comes = {
    "gates": st.tuples(st.sampled_from([*EXTREME, 2.0]), st.sampled_from(EXTREME), st.sampled_from(EXTREME)),
    "keys": st.sampled_from([*KEYS, "zero"]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "chunk_size": st.sampled_from([1, 16, 64]),
}


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    depth=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 1e4, 1e6]),
    rule=st.sampled_from(["normalized", "online"]),
    passes=st.integers(1, 4),
    **whatever_comes,
)
@example(depth=2, scale=1e4, rule="online", passes=2, gates=(1.0, 0.999, 1.0), keys="equal", dtype=torch.float32, chunk_size=64)
@example(depth=4, scale=1e6, rule="online", passes=1, gates=(1.0, 0.999, 1.0), keys="equal", dtype=torch.float32, chunk_size=64)
def test_a_clipped_scan_is_finite_whatever_comes_in(rule, **case):
    assert_a_scan_is_finite(write_rule=rule, max_inner_grad_norm=1.0, **case)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    depth=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1e-20, 1.0]),
    rule=st.sampled_from(["normalized", "online"]),
    passes=st.integers(1, 4),
    **whatever_comes,
)
@example(depth=1, scale=0.0, rule="online", passes=1, gates=(2.0, 0.0, 0.5), keys="equal", dtype=torch.float32, chunk_size=64)
def test_without_the_clip_it_is_finite_for_values_of_order_one(rule, **case):
    assert_a_scan_is_finite(write_rule=rule, **case)


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

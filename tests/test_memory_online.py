"""The online rule: passes over a chunk against the token-by-token definition, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from titans_scale.memory import ResidualNorm, memory_oracle, memory_scan

BATCH, HEADS, DIM, HIDDEN = 2, 2, 16, 32


def inputs(depth, *, theta_up_to, length, residual=False, seed=0):
    """q, k, v, the gates, the weights, then the LayerNorm's scale and shift.

    Unit queries and keys and normal values at random; theta, eta and alpha uniform up to theta_up_to, 0.5 and 0.1; weights normal with
    variance 1 / fan-in.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (randn(BATCH, HEADS, length, DIM) for _ in range(3))
    gates = [torch.rand((BATCH, HEADS, length), generator=generator, dtype=torch.float64) * bound for bound in (theta_up_to, 0.5, 0.1)]
    widths = [DIM, *[HIDDEN] * (depth - 1), DIM]
    weights = [randn(HEADS, out, into) / into**0.5 for into, out in itertools.pairwise(widths)]
    norm = [1 + 0.3 * randn(HEADS, DIM), 0.3 * randn(HEADS, DIM)] if residual else []
    return [x.requires_grad_() for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, *gates, *weights, *norm)]


def split(tensors, depth):
    return tensors[:6], tensors[6 : 6 + depth], ResidualNorm(*tensors[6 + depth :]) if len(tensors) > 6 + depth else None


def online_scan(tensors, *, depth, chunk_size, passes, margin=None, clip=None, activation="silu"):
    tokens, weights, norm = split(tensors, depth)
    options = {"write_rule": "online", "passes": passes, "curvature_margin": margin, "max_inner_grad_norm": clip, "norm": norm}
    return memory_scan(*tokens, weights, activation=activation, chunk_size=chunk_size, **options)[0]


def token_by_token(tensors, *, depth, margin=None, clip=None, activation="silu", write_rule="online", chunk_size=64):
    tokens, weights, norm = split(tensors, depth)
    options = {"write_rule": write_rule, "curvature_margin": margin, "max_inner_grad_norm": clip, "norm": norm}
    return memory_oracle(*tokens, weights, activation=activation, chunk_size=chunk_size, **options)[0]


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


TABLE = [  # depth, theta up to, distance of the plain rule at chunk 64, then after 1, 2, 3, 4 and 8 passes
    (1, 0.4, 8e-1, {1: 1e-15}),
    (2, 0.05, 1.6e-1, {1: 7e-3, 2: 1e-4, 3: 1.5e-6, 4: 1.5e-8, 8: 4e-16}),
    (2, 0.1, 3.6e-1, {1: 5e-2, 2: 3e-3, 3: 1e-4, 4: 4e-6, 8: 3e-12}),
    (2, 0.2, 9.6e-1, {1: 2e-1, 2: 6e-2, 3: 2e-2, 4: 3e-3, 8: 3e-7}),
    (3, 0.1, 2.2e-1, {1: 1e-2, 2: 5e-4, 3: 2e-5, 4: 7e-7, 8: 4e-13}),
]


@torch.no_grad()
@pytest.mark.parametrize(
    ("depth", "theta_up_to", "plain", "after"), TABLE, ids=lambda value: None if isinstance(value, dict) else str(value)
)
def test_a_few_passes_come_close_to_the_token_by_token_rule(depth, theta_up_to, plain, after):
    """The table of docs/memory.md: 256 tokens at chunk 64. A factor of 3 for another draw of the tokens, and rounding."""
    tensors = inputs(depth, theta_up_to=theta_up_to, length=256)
    truth = token_by_token(tensors, depth=depth)
    assert distance(token_by_token(tensors, depth=depth, write_rule="plain"), truth) > plain / 3
    for passes, expected in after.items():
        found = distance(online_scan(tensors, depth=depth, chunk_size=64, passes=passes), truth)
        assert found < max(3 * expected, 1e-14), f"after {passes} passes"


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True], ids=["mlp", "residual_norm"])
@pytest.mark.parametrize("options", [{}, {"margin": 4.0}, {"clip": 1.0}, {"margin": 4.0, "clip": 1.0}], ids=str)
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_after_p_passes_the_first_p_tokens_are_exact(passes, options, residual):
    tensors = inputs(3, theta_up_to=0.4, length=16, residual=residual)
    truth = token_by_token(tensors, depth=3, **options)
    y = online_scan(tensors, depth=3, chunk_size=16, passes=passes, **options)
    torch.testing.assert_close(y[:, :, :passes], truth[:, :, :passes], rtol=1e-10, atol=1e-10)
    if passes == 1:  # five passes may well do for more
        assert distance(y[:, :, passes], truth[:, :, passes]) > 1e-8


@torch.no_grad()
@pytest.mark.parametrize("margin", [None, 4.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 256])
def test_one_pass_is_exact_for_a_linear_memory_at_any_chunk_size(chunk_size, margin):
    tensors = inputs(1, theta_up_to=0.4, length=256)
    y = online_scan(tensors, depth=1, chunk_size=chunk_size, passes=1, margin=margin)
    torch.testing.assert_close(y, token_by_token(tensors, depth=1, margin=margin), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("residual", [False, True], ids=["mlp", "residual_norm"])
@pytest.mark.parametrize("options", [{}, {"margin": 4.0, "activation": "gelu"}, {"clip": 1.0}, {"margin": 4.0, "clip": 1.0}], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_as_many_passes_as_tokens_give_the_rule_and_its_gradients(depth, options, residual):
    tensors = inputs(depth, theta_up_to=0.1, length=14, residual=residual)  # two chunks, so the state's gradient counts
    results = [token_by_token(tensors, depth=depth, **options), online_scan(tensors, depth=depth, chunk_size=7, passes=7, **options)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    weighting = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for slow, fast in zip(*(torch.autograd.grad((weighting * y).sum(), tensors) for y in results), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9 * max(1.0, slow.abs().max().item()))


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_the_definition_knows_no_chunks(chunk_size):
    tensors = inputs(2, theta_up_to=0.4, length=12)
    reference = token_by_token(tensors, depth=2, margin=4.0, clip=1.0, chunk_size=12)
    assert torch.equal(token_by_token(tensors, depth=2, margin=4.0, clip=1.0, chunk_size=chunk_size), reference)


@torch.no_grad()
def test_the_local_factor_holds_a_linear_memory_to_its_share_of_the_curvature():
    """Unit key, zero memory: curvature 1, so the value goes in with 2 theta / max(1, margin theta / (1 - eta))."""
    k, v = F.normalize(torch.randn(1, 1, 1, DIM, dtype=torch.float64), dim=-1), torch.randn(1, 1, 1, DIM, dtype=torch.float64)
    for theta, eta, expected in [(0.1, 0.0, 0.2), (0.5, 0.0, 0.5), (0.5, 0.9, 0.05)]:
        gates = [torch.full((1, 1, 1), gate, dtype=torch.float64) for gate in (theta, eta, 0.3)]
        y, _ = memory_oracle(k, k, v, *gates, [torch.zeros(1, DIM, DIM, dtype=torch.float64)], write_rule="online", curvature_margin=4.0)
        torch.testing.assert_close(y, expected * v)


@pytest.mark.parametrize("depth", [1, 2])
def test_saturated_momentum_and_a_perfect_recall_are_finite_with_their_gradients(depth):
    """At eta = 1 the step in the long run is infinite; where a value is known already the error that curvature is measured by is zero."""
    tensors = inputs(depth, theta_up_to=0.5, length=16)
    with torch.no_grad():
        tensors[4].fill_(1.0)
        tensors[2].zero_()
        tensors[5 + depth].zero_()
    for y in (token_by_token(tensors, depth=depth, margin=4.0), online_scan(tensors, depth=depth, chunk_size=8, passes=2, margin=4.0)):
        assert y.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.square().sum() + y.sum(), tensors))


@pytest.mark.parametrize("residual", [False, True], ids=["mlp", "residual_norm"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_gradient_of_few_passes_is_theirs_not_the_converged_rule_s(depth, passes, residual):
    tensors = [x[:1, :1] if i < 6 else x[:1] for i, x in enumerate(inputs(depth, theta_up_to=0.2, length=7, residual=residual))]
    small = [x[..., :4, :4] if i >= 6 and x.dim() == 3 else (x[..., :4] if i < 3 or x.dim() == 2 else x) for i, x in enumerate(tensors)]
    small = [x.detach().requires_grad_() for x in small]
    assert torch.autograd.gradcheck(lambda *xs: online_scan(xs, depth=depth, chunk_size=4, passes=passes), small, fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("passes", [1, 3])
def test_any_cut_with_the_state_handed_on_equals_one_pass(passes):
    tensors = inputs(2, theta_up_to=0.2, length=21)
    tokens, weights, _ = split(tensors, 2)
    options = {"chunk_size": 8, "write_rule": "online", "passes": passes}
    whole, _ = memory_scan(*tokens, weights, **options)
    for cut in range(1, 21):
        y, state = memory_scan(*(x[:, :, :cut] for x in tokens), weights, **options)
        z, _ = memory_scan(*(x[:, :, cut:] for x in tokens), weights, state, **options)
        torch.testing.assert_close(torch.cat((y, z), dim=2), whole, rtol=1e-10, atol=1e-10)

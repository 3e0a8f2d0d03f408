"""The chunked scan against the token-by-token oracle, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from titans_scale.memory import ResidualNorm, memory_oracle, memory_scan
from titans_scale.memory.coefficients import chunk_coefficients
from titans_scale.memory.scan_op import scan_op

BATCH, HEADS, DIM, HIDDEN, CHUNK = 2, 3, 4, 6, 5
TOKENS = 23  # four chunks and an open one


def inputs(depth, *, residual=False, length=TOKENS, seed=0):
    """Tensors that want gradients: q, k, v, theta, eta, alpha, then the weights, then the LayerNorm's scale and shift."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (randn(BATCH, HEADS, length, DIM) for _ in range(3))
    gates = [torch.sigmoid(randn(BATCH, HEADS, length)) * bound for bound in (0.2, 0.9, 0.2)]
    widths = [DIM, *[HIDDEN] * (depth - 1), DIM]
    weights = [randn(HEADS, out, into) / into**0.5 for into, out in itertools.pairwise(widths)]
    norm = [randn(HEADS, DIM), randn(HEADS, DIM)] if residual else []
    return [x.requires_grad_() for x in (q, F.normalize(k, dim=-1), v, *gates, *weights, *norm)]


def run(function, tensors, *, depth, **options):
    norm = ResidualNorm(*tensors[6 + depth :]) if len(tensors) > 6 + depth else None
    return function(*tensors[:6], tensors[6 : 6 + depth], chunk_size=CHUNK, norm=norm, **options)


def everything(y, state):
    """All results, the momentum and the weights at the open chunk's start among them."""
    return [y, *state.weights, *state.momentum, *state.chunk_weights, *state.chunk_momentum]


OPTIONS = [
    {"write_rule": rule, "activation": activation, "max_inner_grad_norm": clip}
    for rule, activation, clip in itertools.product(("plain", "normalized"), ("silu", "gelu"), (None, 0.7))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("residual", [False, True], ids=["mlp", "residual_norm"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_scan_and_its_gradients_equal_the_oracle(depth, residual, options):
    tensors = inputs(depth, residual=residual)
    results = [everything(*run(function, tensors, depth=depth, **options)) for function in (memory_oracle, memory_scan)]
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    weighting = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) for x in results[0]]
    losses = [sum((w * x).sum() for w, x in zip(weighting, result, strict=True)) for result in results]
    for slow, fast in zip(*(torch.autograd.grad(loss, tensors) for loss in losses), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9 * max(1.0, slow.abs().max().item()))


@pytest.mark.parametrize("state_interval", [None, 1, 2])
@pytest.mark.parametrize("length", [20, TOKENS])
@pytest.mark.parametrize("depth, residual", [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize("rule", [{"write_rule": "plain"}, {"write_rule": "normalized"}, {"write_rule": "online", "passes": CHUNK}])
def test_reset_rows_and_their_gradients_equal_the_oracle_s_pieces(rule, depth, residual, length, state_interval):
    tensors = inputs(depth, residual=residual, length=length)
    resets = torch.tensor([[False, True, True, False, True], [True, False, False, True, False]])[:, : -(-length // CHUNK)]
    of_tokens = torch.zeros(BATCH, length, dtype=torch.bool)
    of_tokens[:, ::CHUNK] = resets
    slow = everything(*run(memory_oracle, tensors, depth=depth, resets=of_tokens, **rule))
    fast = everything(*run(memory_scan, tensors, depth=depth, resets=resets, state_interval=state_interval, **rule))
    for expected, ours in zip(slow, fast, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    weighting = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) for x in slow]
    losses = [sum((w * x).sum() for w, x in zip(weighting, result, strict=True)) for result in (slow, fast)]
    for expected, ours in zip(*(torch.autograd.grad(loss, tensors) for loss in losses), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("residual", [False, True], ids=["mlp", "residual_norm"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradcheck(depth, residual):
    """Against finite differences, along random directions: the full Jacobian costs minutes and the oracle has it already."""
    tensors = inputs(depth, residual=residual, length=7)
    small = [x[:1, :1] if x.dim() > 2 and i < 6 else x[:1] for i, x in enumerate(tensors)]
    small = [x.detach().requires_grad_() for x in small]
    assert torch.autograd.gradcheck(lambda *xs: tuple(everything(*run(memory_scan, xs, depth=depth))), small, fast_mode=True)


@pytest.mark.parametrize("write_rule", ["plain", "normalized"])
@pytest.mark.parametrize("function", [memory_scan, memory_oracle])
@torch.no_grad()
def test_any_cut_with_the_state_handed_on_equals_one_pass(function, write_rule):
    tensors = inputs(2)
    whole = everything(*run(function, tensors, depth=2, write_rule=write_rule))
    for cut in range(1, TOKENS):
        left = [x[:, :, :cut] for x in tensors[:6]] + tensors[6:]
        right = [x[:, :, cut:] for x in tensors[:6]] + tensors[6:]
        y, state = run(function, left, depth=2, write_rule=write_rule)
        z, state = run(function, right, depth=2, write_rule=write_rule, state=state)
        for pieces, one in zip(everything(torch.cat((y, z), dim=2), state), whole, strict=True):
            torch.testing.assert_close(pieces, one, rtol=1e-10, atol=1e-10)


def test_a_gradient_flows_through_the_state():
    tensors = inputs(2)
    y, state = run(memory_scan, [x[:, :, :8] for x in tensors[:6]] + tensors[6:], depth=2)
    z, _ = run(memory_scan, [x[:, :, 8:] for x in tensors[:6]] + tensors[6:], depth=2, state=state)
    cut = torch.autograd.grad(torch.cat((y, z), dim=2).square().sum(), tensors)
    whole = torch.autograd.grad(run(memory_scan, tensors, depth=2)[0].square().sum(), tensors)
    for a, b in zip(cut, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("state_interval", [1, 2, 3, 100])
def test_how_many_states_are_kept_changes_no_bit(state_interval):
    tensors = inputs(2)
    y, _ = run(memory_scan, tensors, depth=2)
    z, _ = run(memory_scan, tensors, depth=2, state_interval=state_interval)
    assert torch.equal(y, z)
    gradients = [torch.autograd.grad(x.square().sum(), tensors) for x in (y, z)]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_few_states_are_kept_for_the_backward_pass():
    """One before each of the sqrt(N) groups; a group's others are there only while its gradients are computed."""
    chunks = 64

    def kept(state_interval):
        shapes = []
        tensors = inputs(2, length=CHUNK * chunks)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
            run(memory_scan, tensors, depth=2, state_interval=state_interval)
        return max(shape[0] for shape in shapes if shape[1:] == (BATCH * HEADS, 2 * HIDDEN, DIM))

    assert kept(1) == chunks
    assert 0.5 * chunks**0.5 < kept(None) < 1.5 * chunks**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta, alpha", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_gates_at_their_limits_give_the_exact_values_and_gradients(eta, alpha, dtype):
    tensors = [x.detach().to(dtype) for x in inputs(2, seed=3)]
    limit = torch.rand(BATCH, HEADS, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.4
    tensors[3] = tensors[3] * 0.3
    tensors[4] = tensors[4].masked_fill(limit, eta)
    tensors[5] = tensors[5].masked_fill(limit, alpha)
    tensors = [x.requires_grad_() for x in tensors]
    tolerance = 2e-5 if dtype == torch.float32 else 1e-10
    results = [run(function, tensors, depth=2)[0] for function in (memory_oracle, memory_scan)]
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    for slow, fast in zip(*(torch.autograd.grad(y.square().sum(), tensors) for y in results), strict=True):
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance * max(1.0, slow.abs().max().item()))


def test_the_coefficients_unroll_the_recurrence():
    theta, eta, alpha = (torch.rand(6, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3))
    c, _ = chunk_coefficients(theta, eta, alpha)
    surprises = torch.randn(6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weight, momentum = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    start, carry = weight, momentum
    for t in range(6):
        momentum = eta[t] * momentum - theta[t] * surprises[t]
        weight = (1 - alpha[t]) * weight + momentum
        torch.testing.assert_close(c.start_C[t] * start + c.carry_C[t] * carry - c.write_CC[t] @ surprises, weight)
    end = c.decay_22 @ torch.stack((start, carry)) - c.into_C2.T @ surprises
    torch.testing.assert_close(end, torch.stack((weight, momentum)))


def test_low_precision_inputs_are_scanned_in_float32():
    tensors = [x.detach() for x in inputs(2)]
    low = [x.bfloat16() for x in tensors]
    y, state = run(memory_scan, low, depth=2)
    assert y.dtype == torch.bfloat16
    assert state.weights[0].dtype == torch.float32
    wide, _ = run(memory_scan, [x.float() for x in low], depth=2)
    assert torch.equal(y, wide.bfloat16())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: {"k": a["k"][:, :, :-1]}, "one shape"),
        (lambda a: {"eta": a["eta"][:, :1]}, "eta has shape"),
        (lambda a: {"weights": a["weights"][:1]}, "do not map"),
        (lambda a: {"weights": []}, "list of"),
        (lambda a: {"backend": "cuda"}, "no backend 'cuda'"),
        (lambda a: {"chunk_size": 0}, "chunk_size is 0"),
        (lambda a: {"write_rule": "onlin"}, "no write_rule 'onlin'"),
        (lambda a: {"write_rule": "online", "passes": 0}, "passes is 0"),
        (lambda a: {"resets": torch.ones(BATCH, 4).bool(), "chunk_size": CHUNK}, "resets have shape"),
        (lambda a: {"resets": torch.ones(BATCH, 5).bool(), "chunk_size": CHUNK, "state": memory_scan(**a)[1]}, "a carried state is not"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(change, words):
    tensors = inputs(2)
    arguments = dict(zip(("q", "k", "v", "theta", "eta", "alpha"), tensors[:6], strict=True)) | {"weights": tensors[6:]}
    with pytest.raises(ValueError, match=words):
        memory_scan(**(arguments | change(arguments)))


@pytest.mark.parametrize("resets", [None, torch.tensor([[True, False], [False, True]])], ids=["", "resets"])
@pytest.mark.parametrize("write_rule", ["plain", "online"])
def test_the_operators_keep_torch_s_contract(write_rule, resets):
    """Schema, shapes without data, autograd registration and tracing: what compile, checkpointing and FSDP2 rely on."""
    tensors = inputs(2, residual=True, length=2 * CHUNK)
    tokens, norm = tensors[:6], tensors[8:]
    states = [torch.randn(BATCH, HEADS, 2 * w.shape[1], w.shape[2], dtype=torch.float64, requires_grad=True) for w in tensors[6:8]]
    torch.library.opcheck(scan_op, (*tokens, states, norm, CHUNK, "silu", write_rule, 0.7, 2, 4.0, "", CHUNK, 1, True, resets))


def test_an_operator_called_twice_gives_the_same_and_changes_nothing():
    tensors = inputs(2)
    before = [x.detach().clone() for x in tensors]
    first, second = (everything(*run(memory_scan, tensors, depth=2)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    gradients = [torch.autograd.grad(result[0].square().sum(), tensors) for result in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))

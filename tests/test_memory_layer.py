"""NeuralMemory alone: state, options, the probe."""

import pytest
import torch

from titans_scale.memory import MemoryConfig, MemoryProbe, NeuralMemory, detach

OPTIONS = [
    {},
    {"depth": 1},
    {"depth": 3, "residual_norm": True, "activation": "gelu"},
    {"momentum": False},
    {"forgetting": False},
    {"momentum": False, "forgetting": False, "conv_kernel": 0},
    {"head_dim": 12, "expansion": 3, "write_rule": "plain", "max_step": 0.05},
    {"max_inner_grad_norm": 0.1, "chunk_size": 1},
]


def memory_and_tokens(options):
    torch.manual_seed(0)
    memory = NeuralMemory(16, MemoryConfig(**{"num_heads": 2, "chunk_size": 8, **options})).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return memory, torch.randn(2, 30, 16, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_streams_and_trains(options):
    memory, x = memory_and_tokens(options)
    whole, _ = memory(x)
    state, pieces = None, []
    for begin, end in ((0, 1), (1, 2), (2, 9), (9, 16), (16, 29), (29, 30)):
        y, state = memory(x[:, begin:end], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
    whole.square().sum().backward()
    assert [name for name, p in memory.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_has_an_initial_value(options):
    memory, _ = memory_and_tokens(options)
    rules = memory.initializers()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in memory.named_parameters():
        assert rules[name](parameter.shape, generator).shape == parameter.shape


def test_heads_forget_at_different_paces_to_begin_with():
    memory = NeuralMemory(64, MemoryConfig(num_heads=8))
    alpha = memory.gates(torch.zeros(1, 1, 64)).alpha.flatten()
    assert (alpha.diff() > 0).all()
    assert 1e-4 < alpha[0] < 3e-4 and 3e-3 < alpha[-1] < 1e-2


def test_a_detached_state_stops_the_gradient():
    memory, x = memory_and_tokens({})
    x.requires_grad_()
    _, state = memory(x[:, :10])
    memory(x[:, 10:], detach(state))[0].sum().backward()
    assert not x.grad[:, :10].any() and x.grad[:, 10:].any()


def test_the_probe_sees_every_memory_and_leaves_no_hook_behind():
    memory, x = memory_and_tokens({"write_rule": "normalized"})
    plain, _ = memory(x)
    with MemoryProbe(memory) as probe:
        probed, _ = memory(x)
    assert torch.equal(plain, probed)
    seen = probe.metrics()
    memory(x)
    assert probe.metrics() == seen
    assert set(seen) == {
        "inner_loss_before",
        "inner_loss_after",
        "surprise_norm",
        "theta_mean",
        "eta_mean",
        "alpha_mean",
        "state_norm",
    }


def test_the_probe_measures_the_inner_loss_it_says():
    """With one head, chunk 1 and the plain rule, from the oracle's weights."""
    memory, x = memory_and_tokens({"num_heads": 1, "chunk_size": 1, "write_rule": "plain", "max_step": 0.05})
    x = x[:1, :6]
    with torch.no_grad(), MemoryProbe(memory) as probe:
        memory(x)
        k, v, gates = memory.keys(x)[0], memory.values(x)[0], memory.gates(x)
        weights, state, before, after, surprises = memory.fresh_weights(1), None, [], [], []
        for t in range(6):
            now = slice(t, t + 1)
            before.append((memory.read(k[:, :, now], weights) - v[:, :, now]).square().sum())
            y, state = memory.scan(*(z[:, :, now] for z in (k, k, v)), type(gates)(*(g[:, :, now] for g in gates)), state)
            after.append((y - v[:, :, now]).square().sum())
            leaves = [w.detach().requires_grad_() for w in weights]
            with torch.enable_grad():
                loss = (memory.read(k[:, :, now], leaves) - v[:, :, now]).square().sum()
                surprises.append(torch.stack([g.square().sum() for g in torch.autograd.grad(loss, leaves)]).sum().sqrt())
            weights = state.weights
    metrics = probe.metrics()
    assert metrics["inner_loss_before"] == pytest.approx(torch.stack(before).mean().item())
    assert metrics["inner_loss_after"] == pytest.approx(torch.stack(after).mean().item())
    assert metrics["surprise_norm"] == pytest.approx(surprises[-1].item())


def test_the_pass_residual_falls_with_the_passes():
    """As many passes as a chunk has tokens are exact, so that one more changes nothing."""
    residuals = []
    for passes in (1, 2, 8):
        memory, x = memory_and_tokens({"write_rule": "online", "chunk_size": 8, "passes": passes, "max_step": 1.0})
        with torch.no_grad(), MemoryProbe(memory) as probe:
            memory(x)
        residuals.append(probe.metrics()["pass_residual"])
    assert residuals[0] > 3 * residuals[1] > 0
    assert residuals[2] < 1e-12


def test_heads_that_do_not_divide_get_a_sentence():
    with pytest.raises(ValueError, match="dim 30 does not divide by num_heads 4"):
        NeuralMemory(30, MemoryConfig(num_heads=4))

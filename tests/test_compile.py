"""Blocks under torch.compile. Their scan is one operator, so a graph is small; inductor still takes a minute to write its C++."""

import pytest
import torch
from small_models import VARIANTS, perturbed_model, random_tokens


def loss_and_gradients(model, tokens):
    loss = model.loss_sum(tokens, tokens)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_compiled_agrees(variant, backend):
    model, tokens = perturbed_model(variant, "num_layers=1"), random_tokens(2, 20)
    eager = loss_and_gradients(model, tokens)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    for result, expected in zip(loss_and_gradients(model, tokens), eager, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("variant", ["mag", *(pytest.param(variant, marks=pytest.mark.slow) for variant in VARIANTS if variant != "mag")])
def test_traced_blocks_give_the_same_loss_and_gradients(variant):
    assert_compiled_agrees(variant, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_blocks_give_the_same_loss_and_gradients(variant):
    assert_compiled_agrees(variant, "inductor")


def test_one_graph_serves_all_layers():
    """More than torch's limit of recompilations, past which blocks would run uncompiled."""
    model, tokens = perturbed_model("lmm", "num_layers=10"), random_tokens(1, 16)
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in model.blocks:
        block.compile(backend=note, fullgraph=True)
    model.loss_sum(tokens, tokens)
    model.loss_sum(tokens, tokens)
    assert len(graphs) == 1

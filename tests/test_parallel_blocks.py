"""What wraps a block: recomputation and compilation, alone and together."""

import pytest
import torch
from training_runs import small_config

from titans_scale import TitansLM
from titans_scale.parallel.apply import checkpoint_blocks

LENGTH = 16


@pytest.fixture
def model():
    model = TitansLM(small_config("data", "run", {"model.variant": "lmm", "model.num_layers": 1}).model)
    model.init_weights(0)
    return model


def gradients(model):
    tokens = torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    model(tokens).logits.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_recomputation_changes_neither_gradients_nor_names(model):
    plain = gradients(model)
    checkpoint_blocks(model)
    calls = []
    model.blocks[0].mlp_norm.register_forward_hook(lambda *_: calls.append(1))
    recomputed = gradients(model)
    assert len(calls) == 2  # in the forward pass, and again in the backward pass
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_block_is_compiled_whole_also_when_it_is_recomputed(model, recomputed):
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if recomputed:
        checkpoint_blocks(model)
    model.blocks[0].compile(backend=note, fullgraph=True)
    model(torch.zeros(1, LENGTH, dtype=torch.int64))
    assert len(graphs) == 1

"""Blocks under torch.compile. Slow: tracing a block takes a minute on a CPU, so the full compiler is left to machines with a GPU."""

import pytest
import torch
from small_models import VARIANTS, perturbed_model, random_tokens


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_blocks_give_the_same_loss_and_gradients(variant):
    model, tokens = perturbed_model(variant, "num_layers=1"), random_tokens(2, 32)
    losses, gradients = [], []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.compile(backend="aot_eager")
        model.zero_grad()
        losses.append(model(tokens, labels=tokens).loss)
        losses[-1].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(losses[0], losses[1])
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-9, atol=1e-9 * max(1.0, eager.abs().max().item()))

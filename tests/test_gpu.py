"""What needs a GPU (`pytest -m gpu`); everything else is tested on a CPU."""

import pytest
import torch
from small_models import VARIANTS, perturbed_model, random_tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_gives_the_losses_of_the_cpu(variant):
    model, tokens = perturbed_model(variant, dtype=torch.float32), random_tokens(2, 64)
    on_cpu = model(tokens, labels=tokens).loss.item()
    on_gpu = model.cuda()(tokens.cuda(), labels=tokens.cuda()).loss.item()
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    in_bfloat16 = model.bfloat16()(tokens.cuda(), labels=tokens.cuda()).loss.item()
    assert in_bfloat16 == pytest.approx(on_cpu, rel=0.1)

"""What needs a GPU (`pytest -m gpu`); everything else is tested on a CPU."""

import itertools

import pytest
import torch
from small_models import VARIANTS, perturbed_model, random_tokens

from titans_scale.memory import memory_oracle, memory_scan


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("write_rule, passes", [("plain", 1), ("normalized", 1), ("online", 16)])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_scan_on_a_gpu_equals_the_oracle_on_the_cpu(depth, write_rule, passes):
    """In float64 to 1e-9: no TF32 and no atomics get in between. With as many passes as a chunk has tokens the online rule is exact."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 70, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    gates = [torch.rand(2, 2, 70, generator=generator, dtype=torch.float64) * bound for bound in (0.1, 0.9, 0.1)]
    widths = [8, *[16] * (depth - 1), 8]
    weights = [torch.randn(2, o, i, generator=generator, dtype=torch.float64) / i**0.5 for i, o in itertools.pairwise(widths)]
    results = []
    for function, device in ((memory_oracle, "cpu"), (memory_scan, "cuda")):
        tensors = [x.to(device).requires_grad_() for x in (q, torch.nn.functional.normalize(k, dim=-1), v, *gates, *weights)]
        y, _ = function(*tensors[:6], tensors[6:], chunk_size=16, write_rule=write_rule, passes=passes)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast.cpu(), slow, rtol=1e-9, atol=1e-9 * max(1.0, slow.abs().max().item()))

"""What needs a GPU (`pytest -m gpu`); everything else is tested on a CPU."""

import itertools
import subprocess
import sys

import pytest
import torch
from small_models import VARIANTS, perturbed_model, random_tokens
from training_runs import arguments, curve, make_data

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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallelism.cpu_offload": "true"},
        {"activation_checkpoint.mode": "selective", "parallelism.reshard_after_forward": "false"},
        {"engine.name": "deepspeed", "engine.zero_stage": 2},
        {"engine.name": "deepspeed", "engine.zero_stage": 3},
    ],
    ids=["fsdp2", "offloaded", "recomputed", "zero 2", "zero 3"],
)
def test_an_engine_on_a_gpu_trains_as_fsdp2_on_the_cpu(changes, tmp_path):
    """In float32: what differs is the order of sums and, where it is on, TF32."""
    if "engine.name" in changes:
        pytest.importorskip("deepspeed")
    data = make_data(tmp_path / "data")
    for device, settings in {"cpu": {}, "cuda": changes}.items():
        run = arguments(data, tmp_path / device, {"training.device": device, "training.dtype": "float32", **settings})
        subprocess.run([sys.executable, "-m", "titans_scale.train", *run], check=True)
    for (_, loss, norm, _), (_, loss_cpu, norm_cpu, _) in zip(curve(tmp_path / "cuda"), curve(tmp_path / "cpu"), strict=True):
        assert loss == pytest.approx(loss_cpu, rel=1e-3)
        assert norm == pytest.approx(norm_cpu, rel=1e-2)

"""Recomputation: none, selective and full train alike, and differ in what is computed twice and in what is kept."""

import gc
from collections import Counter

import pytest
import torch
from distributed import run_ranks
from small_models import VARIANTS, perturbed_model, random_tokens
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import small_config

from titans_scale import TitansLM, load_config
from titans_scale.models.blocks import BLOCKS
from titans_scale.models.plans import keeps_result
from titans_scale.parallel import Mesh, mesh_sizes
from titans_scale.parallel.apply import checkpoint_blocks, parallelize, shard
from titans_scale.parallel.materialize import materialize
from titans_scale.parallel.planning.activations import block_activation_bytes
from titans_scale.parallel.planning.estimate import estimate
from titans_scale.parallel.recompute import recomputed

MODES = ("none", "selective", "full")


def checkpointed(model, mode):
    if mode != "none":
        checkpoint_blocks(model, keeps_result if mode == "selective" else None)
    return model


def loss_and_gradients(model, tokens):
    loss = model.loss_sum(tokens, tokens)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


class Calls(TorchDispatchMode):
    """Counts operators by name, those of the backward pass included."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name().removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_three_give_exactly_the_same_loss_and_gradients(variant):
    tokens = random_tokens(2, 40)
    none, *others = [loss_and_gradients(checkpointed(perturbed_model(variant), mode), tokens) for mode in MODES]
    for results in others:
        assert all(torch.equal(result, expected) for result, expected in zip(results, none, strict=True))


def test_selective_computes_norms_twice_and_products_and_scans_once():
    counts = {}
    for mode in MODES:
        model, tokens = checkpointed(perturbed_model("mag"), mode), random_tokens(2, 40)
        with Calls() as calls:
            loss_and_gradients(model, tokens)
        counts[mode] = calls.count
    scans, products, sigmoids = "titans_scale::memory_scan", "aten::mm", "aten::silu"
    assert counts["none"][scans] > 0
    assert counts["selective"][scans] == counts["none"][scans] and counts["full"][scans] == 2 * counts["none"][scans]
    assert counts["selective"][products] == counts["none"][products] < counts["full"][products]
    assert counts["none"][sigmoids] < counts["selective"][sigmoids] == counts["full"][sigmoids]


def medium_config(*overrides):
    settings = ["model.variant=mag", "model.dim=64", "model.num_layers=8", "model.num_heads=2", "model.vocab_size=500", "model.window=48"]
    settings += ["model.memory.num_heads=2", "model.memory.chunk_size=32", "training.sequence_length=256", "training.micro_batch_size=2"]
    return load_config(None, [*settings, "training.global_batch_tokens=8192", *overrides])


def test_selective_keeps_what_the_estimate_counts():
    """Measured by the allocator, on a CPU, whose norms and attention are not fused and keep a little more than is counted."""
    config = medium_config().model
    block = BLOCKS[config.variant](config)
    x_BTM = torch.randn(2, 256, config.dim, requires_grad=True)
    gc.collect()  # what an earlier test left must not be freed while we measure
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = recomputed(block, keeps_result)(x_BTM)[0]
    allocated = sum(event.self_cpu_memory_usage for event in profiler.events() or [])
    assert output.requires_grad
    counted = block_activation_bytes(config, batch_size=2, sequence_length=256, dtype=torch.float32, keeps=keeps_result)
    assert 0.85 * allocated < counted < 1.05 * allocated


def test_selective_is_estimated_between_none_and_full():
    none, selective, full = (estimate(medium_config(f"activation_checkpoint.mode={mode}")).gpu_bytes["activations"] for mode in MODES)
    assert full < 0.8 * selective < 0.8**2 * none


def sharded_and_compiled(mode):
    """A rank's loss and the gradients under FSDP2, the block compiled as far as takes seconds only."""
    config = small_config("data", "run", {"model.variant": "mag", "model.num_layers": 1})
    with torch.device("meta"):
        model = checkpointed(TitansLM(config.model), mode)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    shard(model, Mesh(mesh_sizes(config.parallelism, 2), "cpu"), precision="float32", reshard_after_forward=True)
    materialize(model, torch.device("cpu"), seed=0)
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    loss = model.loss_sum(tokens, tokens, logits_bytes=10_000)
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])


def in_one_piece():
    model = TitansLM(small_config("data", "run", {"model.variant": "mag", "model.num_layers": 1}).model)
    model.init_weights(0)
    losses = []
    for rank in range(2):
        tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(rank))
        losses.append(model.loss_sum(tokens, tokens))
    sum(losses).backward()
    return [loss.item() for loss in losses], torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("mode", ["selective", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("none", "full"))])
def test_sharded_and_compiled_blocks_train_as_one_eager_model_does(mode):
    losses, gradient = in_one_piece()
    for (loss, of_ranks), expected in zip(run_ranks(sharded_and_compiled, 2, mode), losses, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert (of_ranks - gradient).norm() < 1e-5 * gradient.norm()  # float32 sums in another order


def recomputations(mode):
    """Whether norms of a block run again in the backward pass of a model that training has made."""
    config = small_config("data", "run", {"model.variant": "lmm", "model.num_layers": 1, "activation_checkpoint.mode": mode})
    with torch.device("meta"):
        model = TitansLM(config.model)
    parallelize(model, config, Mesh(mesh_sizes(config.parallelism, 1), "cpu"), torch.device("cpu"))
    tokens = torch.randint(0, 256, (1, 32))
    with Calls() as calls:
        model.loss_sum(tokens, tokens).backward()
    return calls.count["aten::silu"], calls.count["titans_scale::memory_scan"]


def test_training_takes_the_mode_from_its_configuration():
    (none,), (selective,), (full,) = (run_ranks(recomputations, 1, mode) for mode in MODES)
    assert none[0] < selective[0] == full[0]
    assert none[1] == selective[1] < full[1]

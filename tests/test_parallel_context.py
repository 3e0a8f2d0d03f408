"""Ranks with a part of every sequence each: the loss, the gradients and the curves of one rank that has it whole."""

import json

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from small_models import VARIANTS, perturbed_model, random_tokens
from small_models import small_config as small_model_config
from test_benchmarks import assert_well_formed, tool
from torch.utils._pytree import tree_flatten
from training_runs import curve, make_data, records, small_config

from titans_scale.models.blocks import BLOCKS
from titans_scale.models.plans import keeps_result
from titans_scale.parallel import Mesh, build_engine, mesh_sizes
from titans_scale.parallel.apply import checkpoint_blocks
from titans_scale.parallel.sequence import ALIGNMENT, Layout, hand_states_on, what_is_read
from titans_scale.training.trainer import Trainer

LENGTH = 96
"""Of a sequence: 48 tokens a rank on two, 24 on four. The chunk of 8 divides both, but for the 3 persistent tokens of mag, mal, lmm."""
CASES = {
    **{variant: (variant,) for variant in VARIANTS},
    "mag, window of three ranks": ("mag", "window=70"),
    "mal, window of three ranks": ("mal", "window=70"),
    "mac, chunk open at the border": ("mac", "memory.chunk_size=7"),
    "lmm, chunk longer than a part": ("lmm", "memory.chunk_size=40"),
    "mag, plain rule, nothing persistent": ("mag", "memory.write_rule=plain", "num_persistent_tokens=0"),
    "lmm, no convolution": ("lmm", "memory.conv_kernel=0"),
}
MICRO_BATCHES = 2


def case_model(name):
    variant, *overrides = CASES[name]
    return perturbed_model(variant, *overrides)


def part_of(rank, ranks):
    """The tokens of a rank."""
    return slice(rank * LENGTH // ranks, (rank + 1) * LENGTH // ranks)


def losses_and_gradients(model, own):
    """The loss over this rank's tokens, of each micro-batch and without gradients, and the gradients of all micro-batches."""
    losses = []
    for seed in range(MICRO_BATCHES):
        tokens = random_tokens(2, LENGTH + 1, seed)
        loss = model.loss_sum(tokens[:, :-1][:, own], tokens[:, 1:][:, own])
        loss.backward()
        losses.append(loss.detach())
    with torch.no_grad():
        losses.append(model.loss_sum(tokens[:, :-1][:, own], tokens[:, 1:][:, own]))
    return [torch.stack(losses), *(parameter.grad for parameter in model.parameters())]


def gradients_of_first_tokens(model, own, *, counts):
    """Of the embedded tokens of this rank, in the loss of the ranks that count."""
    embedded = []
    model.embedding.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    tokens = random_tokens(2, LENGTH + 1)
    loss = model.loss_sum(tokens[:, :-1][:, own], torch.where(counts, tokens[:, 1:], -100)[:, own])
    return torch.autograd.grad(loss, embedded[0])[0]


def in_parts(runs):
    """Every run by name: sums over ranks, and with "far" the gradient in this rank's tokens of the last rank's loss."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, case, inside in runs:
        model = case_model(case)
        if inside in ("full", "selective"):
            checkpoint_blocks(model, keeps_result if inside == "selective" else None)
        elif inside == "compiled":
            for block in model.blocks:
                block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
        hand_states_on(model, dist.group.WORLD)
        if name == "far":
            found[name] = gradients_of_first_tokens(model, part_of(rank, ranks), counts=last_part(ranks))
            continue
        sums = losses_and_gradients(model, part_of(rank, ranks))
        for x in sums:
            dist.all_reduce(x)
        found[name] = sums if rank == 0 else None
    dist.barrier()  # what is on its way must not be cut off by the end of its sender
    return found


def last_part(ranks):
    return torch.arange(LENGTH) >= part_of(ranks - 1, ranks).start


ON_FOUR = [(case, case, None) for case in CASES] + [("far", "mag", None)]
ON_TWO = [(f"mag, {inside}", "mag", inside) for inside in ("full", "selective")] + [("mac, full", "mac", "full")]


@pytest.fixture(scope="module")
def on_four():
    return run_ranks(in_parts, 4, ON_FOUR)


@pytest.fixture(scope="module")
def on_two():
    return run_ranks(in_parts, 2, ON_TWO)


def assert_equals_one_rank(found, case):
    losses, *gradients = losses_and_gradients(case_model(case), slice(None))
    torch.testing.assert_close(found[0], losses, rtol=1e-10, atol=0)
    for of_ranks, gradient in zip(found[1:], gradients, strict=True):  # sums in another order
        torch.testing.assert_close(of_ranks, gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_four_ranks_have_the_loss_and_the_gradients_of_one(on_four, case):
    assert_equals_one_rank(on_four[0][case], case)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, case, _ in ON_TWO])
def test_recomputed_blocks_on_two_ranks_have_the_loss_and_the_gradients_of_one(on_two, name, case):
    assert_equals_one_rank(on_two[0][name], case)


@pytest.mark.slow
def test_compiled_blocks_on_two_ranks_have_the_loss_and_the_gradients_of_one():
    assert_equals_one_rank(run_ranks(in_parts, 2, [("mag", "mag", "compiled")])[0]["mag"], "mag")


def test_the_loss_of_the_last_rank_reaches_the_tokens_of_the_first(on_four):
    """Past the window of 10 in two layers, so through the memory."""
    expected = gradients_of_first_tokens(case_model("mag"), slice(None), counts=last_part(4))
    first = on_four[0]["far"]
    assert first.norm() > 1e-6 * expected.norm()
    assert torch.cat([found["far"] for found in on_four], dim=1).sub(expected).norm() < 1e-9 * expected.norm()


def state_after(variant, length, device):
    """Of a block, after so many tokens."""
    config = small_model_config(variant)
    with torch.device(device), torch.no_grad():
        return BLOCKS[variant](config)(torch.randn(1, length, config.dim))[1]


def formula(config, *, open_tokens, window_tokens):
    """Of titans_scale/parallel/sequence.py, for a batch of one and 4 bytes a number."""
    memory, head_dim = config.memory, config.dim // config.memory.num_heads
    of_a_head = 2 * head_dim * head_dim * memory.expansion
    size = 8 * memory.num_heads * of_a_head + 4 * memory.num_heads * open_tokens * (2 * head_dim + 3)
    size += (4 if config.variant == "mac" else 3) * (memory.conv_kernel - 1) * config.dim * 4
    if config.variant in ("mag", "mal"):
        size += 2 * config.dim * (window_tokens + config.num_persistent_tokens) * 4
    if config.variant == "mac" and open_tokens:
        size += 4 * memory.num_heads * of_a_head
    return size


@pytest.mark.parametrize(("variant", "length", "open_tokens", "window_tokens"), [
    ("mac", 24, 0, 0), ("mac", 36, 4, 0), ("mag", 6, 1, 6), ("mag", 24, 3, 9), ("mag", 96, 3, 9), ("mal", 21, 0, 9), ("lmm", 30, 1, 0),
])  # fmt: skip
def test_a_layer_hands_on_what_the_formula_says_however_many_tokens_there_are(variant, length, open_tokens, window_tokens):
    """Chunks of 8 begin with the 3 persistent tokens, mac's with the first token; the window is 10."""
    layout, _ = Layout.of(what_is_read(state_after(variant, length, "meta")))
    exact = formula(small_model_config(variant), open_tokens=open_tokens, window_tokens=window_tokens)
    assert exact <= layout.size < exact + ALIGNMENT * len(layout.places)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_message_holds_the_state(variant):
    state = state_after(variant, 30, "cpu")
    layout, tensors = Layout.of(state)
    again = layout.state_of(layout.unpack(layout.pack(tensors)))
    expected, shape = tree_flatten(state)
    found, shape_again = tree_flatten(again)
    assert shape == shape_again
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(expected, found, strict=True))


EVERY_RUN = {"training.steps": 3, "training.micro_batch_size": 2, "eval.interval": 3, "eval.batches": 0, "metrics.memory_interval": 3}
MAG = {"model.variant": "mag", "model.window": 12}
TRAINED = {
    "mac, 2 context": (2, {"parallelism.context_parallel": 2}),
    "mag, 4 context, recomputed": (4, MAG | {"parallelism.context_parallel": 4, "activation_checkpoint.mode": "full"}),
    "mag, 2 shard x 2 context": (4, MAG | {"parallelism.context_parallel": 2, "parallelism.data_parallel_shard": 2}),
    "mag, 2 context x 2 tensor": (4, MAG | {"parallelism.context_parallel": 2, "parallelism.tensor_parallel": 2}),
}


def train_all(data, folder, runs):
    for name, changes in runs.items():
        Trainer(small_config(data, folder / name, {**EVERY_RUN, **changes})).run()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    data = make_data(folder / "data")
    for ranks in (2, 4):
        run_ranks(train_all, ranks, data, folder, {name: changes for name, (size, changes) in TRAINED.items() if size == ranks})
    run_ranks(train_all, 1, data, folder, {"mac": {}, "mag": MAG})
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_ranks_that_share_sequences_train_as_one_does(trained, name):
    alone, together = trained / name[:3], trained / name
    for (step, loss, norm, lr), (step_alone, loss_alone, norm_alone, lr_alone) in zip(curve(together), curve(alone), strict=True):
        assert (step, lr) == (step_alone, lr_alone)
        assert loss == pytest.approx(loss_alone, rel=1e-5)  # float32 sums in another order
        assert norm == pytest.approx(norm_alone, rel=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_they_have_the_validation_loss_of_one(trained, name):
    alone, together = records(trained / name[:3])[-1], records(trained / name)[-1]
    assert together["n_tokens_seen"] == alone["n_tokens_seen"]
    assert together["validation_metrics/loss"] == pytest.approx(alone["validation_metrics/loss"], rel=1e-5)


def test_they_see_in_the_memories_what_one_does(trained):
    """Of mac, whose memory is called segment by segment: an average over calls is the same then, whoever makes them."""
    alone, together = records(trained / "mac")[-1], records(trained / "mac, 2 context")[-1]
    seen = {name: number for name, number in alone.items() if name.startswith("titans/")}
    assert len(seen) >= 7
    assert {name: together[name] for name in seen} == pytest.approx(seen, rel=1e-4)


LONG = 32_768
COARSE = {"model.memory.chunk_size": 128, "model.segment_len": 256, "model.window": 100}
"""As fast as so many tokens go: the grids are as coarse as a model of that context would have them."""


def long_steps(variants):
    """Loss and gradient norm of two steps over one long sequence, of each variant, by the engine that a trainer has."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for variant in variants:
        config = small_config("data", "run", COARSE | {"model.variant": variant, "parallelism.context_parallel": ranks})
        engine = build_engine(config, Mesh(mesh_sizes(config.parallelism, ranks), "cpu"), torch.device("cpu"), sgd)
        tokens = torch.randint(257, (1, LONG + 1), generator=torch.Generator().manual_seed(0))
        own = slice(rank * LONG // ranks, (rank + 1) * LONG // ranks)
        found[variant] = []
        for _ in range(2):
            loss = engine.model.loss_sum(tokens[:, :-1][:, own], tokens[:, 1:][:, own], logits_bytes=2**24) / LONG
            engine.backward(loss, last=True)
            norm = engine.step(lr=0.1, max_norm=1.0)
            dist.all_reduce(loss := loss.detach())
            found[variant] += [loss.item(), norm.item()]
    return found


def sgd(model):
    return torch.optim.SGD(model.parameters())


@pytest.mark.slow
def test_four_ranks_of_8192_tokens_train_as_one_of_32768_does():
    together, alone = (run_ranks(long_steps, ranks, VARIANTS, timeout=600)[0] for ranks in (4, 1))
    for variant in VARIANTS:  # float32
        assert together[variant][::2] == pytest.approx(alone[variant][::2], rel=1e-5)
        assert together[variant][1::2] == pytest.approx(alone[variant][1::2], rel=1e-4)


@pytest.mark.slow
def test_bench_context_prints_and_writes_a_row_for_each_form_and_depth(tmp_path, capsys):
    assert tool("bench_context")(["--quick", "--layers", "1", "--json", tmp_path / "context.json"]) == 0
    report = json.loads((tmp_path / "context.json").read_text())
    assert_well_formed(report, {"Blocks alone": 1, "Through fully_shard": 1})
    assert report["tables"]["Blocks alone"][0]["KiB handed on a layer"] > 100
    assert "times as fast" in capsys.readouterr().out

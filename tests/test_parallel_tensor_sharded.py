"""Tensor parallelism under `fully_shard`: the initial values, the step and the checkpoint of one rank, in float32."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed import run_ranks
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from training_runs import small_config

from titans_scale import TitansLM
from titans_scale.parallel import Mesh, MeshSizes, build_engine
from titans_scale.training.optimizer import build_optimizer

CHANGES = {
    "model.vocab_size": 257,  # over two ranks and two more: 65, 64, 64 and 64 words
    "model.num_layers": 1,
    "model.memory.chunk_size": 8,
    "optimizer.eps": 1e-4,  # at 1e-8 Adam's first step is the gradients' sign, of those too that are rounding errors
}
LAYOUTS = {
    "fsdp x tp": {"model.variant": "mac", "activation_checkpoint.mode": "selective"},
    "fsdp x tp, hidden": {"model.variant": "mag", "model.memory.num_heads": 1, "parallelism.memory_split": "hidden"},
    "fsdp x tp, untied": {"model.variant": "mal", "model.tie_embeddings": "false", "activation_checkpoint.mode": "full"},
    "hsdp x tp": {"model.variant": "lmm"},
}
DATA_RANKS, MICRO_BATCHES, LENGTH = 2, 2, 32
LEARNING_RATE, MAX_NORM = 0.01, 0.1


def config_of(layout, further=None):
    return small_config("data", "run", {**CHANGES, **LAYOUTS[layout], **(further or {})})


def batch(data_rank, number):
    generator = torch.Generator().manual_seed(10 * data_rank + number)
    return torch.randint(0, 257, (2, LENGTH), generator=generator)


def part_of_loss(model, tokens):
    targets = tokens.roll(-1, 1)
    return model.loss_sum(tokens, targets, logits_bytes=100_000) / (DATA_RANKS * MICRO_BATCHES * tokens.numel())


def whole_values(model):
    return {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}


def trained(layout, folder, further=None):
    """A step of two micro-batches. This rank's part of the loss, the gradients' norm, and the weights before and after."""
    config = config_of(layout, further)
    replicas = DATA_RANKS if layout == "hsdp x tp" else 1
    mesh = Mesh(MeshSizes(replicate=replicas, shard=DATA_RANKS // replicas, tensor=2), "cpu")
    engine = build_engine(config, mesh, torch.device("cpu"), lambda model: build_optimizer(model, config.optimizer))
    before, total = whole_values(engine.model), 0.0
    for number in range(MICRO_BATCHES):
        loss = part_of_loss(engine.model, batch(mesh.data_rank, number))
        engine.backward(loss, last=number == MICRO_BATCHES - 1)
        total += loss.item()
    norm = engine.step(lr=LEARNING_RATE, max_norm=MAX_NORM)
    if folder is not None:
        dcp.save(engine.state(), checkpoint_id=folder / layout)
    return total, norm.item(), before, whole_values(engine.model)


def on_four_ranks(folder):
    found = {layout: trained(layout, folder) for layout in LAYOUTS}
    return found, trained("fsdp x tp", None, {"training.dtype": "bfloat16"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def four_ranks(folder):
    return run_ranks(on_four_ranks, 4, folder, timeout=300)


def on_one_rank(layout):
    """The same step by plain autograd."""
    config = config_of(layout)
    model = TitansLM(config.model)
    model.init_weights(config.training.seed)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config.optimizer)
    loss = sum(part_of_loss(model, batch(rank, number)) for rank in range(DATA_RANKS) for number in range(MICRO_BATCHES))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    optimizer.step()
    return loss.item(), norm.item(), before, model, optimizer


@pytest.fixture(scope="module")
def one_rank():
    return {layout: on_one_rank(layout) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_fills_its_part_of_its_part_with_the_same_weights(four_ranks, one_rank, layout):
    for found, _ in four_ranks:
        before = found[layout][2]
        assert list(before) == list(one_rank[layout][2])
        assert all(torch.equal(before[name], value) for name, value in one_rank[layout][2].items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_norm_and_step_are_those_of_one_rank(four_ranks, one_rank, layout):
    loss, norm, before, model, _ = one_rank[layout]
    assert norm > 2 * MAX_NORM  # or nothing is clipped
    losses = [found[layout][0] for found, _ in four_ranks]
    assert losses[0] == losses[1] and losses[2] == losses[3]  # ranks that share layers and data
    assert losses[0] + losses[2] == pytest.approx(loss, rel=1e-6)
    for found, _ in four_ranks:
        _, sharded_norm, _, after = found[layout]
        assert sharded_norm == pytest.approx(norm, rel=1e-5)
        for name, parameter in model.named_parameters():
            assert (parameter - before[name]).abs().max() > 1e-5, name
            assert (after[name] - parameter).abs().max() < 3e-6, name  # what a gradient's rounding comes to, of a step of 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_checkpoint_is_that_of_one_rank(four_ranks, one_rank, folder, layout):
    _, _, _, trained_model, optimizer = one_rank[layout]
    loaded = TitansLM(config_of(layout).model)
    moments = {name: torch.empty_like(parameter) for name, parameter in loaded.named_parameters()}
    state = {"model": get_model_state_dict(loaded), "optimizer": {name: {"exp_avg": moment} for name, moment in moments.items()}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder / layout, no_dist=True)
    for name, parameter in trained_model.named_parameters():
        assert (state["model"][name] - parameter).abs().max() < 1e-5, name
        moment = optimizer.state[parameter]["exp_avg"]
        assert (moments[name] - moment).norm() < 1e-4 * moment.norm(), name


def test_in_bfloat16_it_trains_to_a_few_roundings(four_ranks, one_rank):
    loss, norm, *_ = one_rank["fsdp x tp"]
    parts = [of_bfloat16 for _, of_bfloat16 in four_ranks]
    assert parts[0][0] + parts[2][0] == pytest.approx(loss, rel=1e-3)
    assert parts[0][1] == pytest.approx(norm, rel=2e-2)  # a rounding is 4e-3 of a number, and a layer has a dozen in a row


@pytest.mark.slow
def test_compiled_it_takes_the_same_step(one_rank):
    layout = "fsdp x tp, hidden"
    loss, norm, _, model, _ = one_rank[layout]
    changes = {"compile.enabled": "true", "activation_checkpoint.mode": "selective"}
    ranks = run_ranks(trained, 4, layout, None, changes, timeout=900)
    assert ranks[0][0] + ranks[2][0] == pytest.approx(loss, rel=1e-6)
    for _, sharded_norm, _, after in ranks:
        assert sharded_norm == pytest.approx(norm, rel=1e-5)
        assert all((after[name] - parameter).abs().max() < 1e-5 for name, parameter in model.named_parameters())

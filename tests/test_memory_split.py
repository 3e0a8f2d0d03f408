"""The memory in parts: the scan split by hidden width over ranks, and a layer that holds some of its heads. Float64 over gloo."""

import copy
import itertools
import math
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from titans_scale.memory import MemoryConfig, MemoryProbe, NeuralMemory, ResidualNorm, memory_scan, ranks
from titans_scale.memory.flops import chunk_flops, split_sums
from titans_scale.memory.groups import Rule, scan_chunks, scan_chunks_vjp

BATCH, HEADS, DIM, HIDDEN, CHUNK = 2, 2, 4, 8, 4
TOKENS = 14  # three chunks and an open one
LONGER = 26  # more chunks than are read at once

MAX_STEP = {"plain": 0.2, "normalized": 3.0, "online": 0.2}
"""Such that every factor of a rule is below 1 somewhere."""
RULES = [{"write_rule": "plain"}, {"write_rule": "normalized"}, *({"write_rule": "online", "passes": passes} for passes in (1, 2))]
EVERY_OPTION = [
    {**rule, "residual": residual, "max_inner_grad_norm": clip, "activation": activation}
    for rule, residual, clip, activation in itertools.product(RULES, (False, True), (None, 0.7), ("silu", "gelu"))
]
UNUSUAL = [
    {"write_rule": "online", "curvature_margin": None, "residual": False, "max_inner_grad_norm": None},
    {"write_rule": "online", "passes": 3, "curvature_margin": None, "residual": True, "max_inner_grad_norm": 0.7},
    {"write_rule": "online", "residual": False, "state_interval": 1, "cut": 9},
    {"write_rule": "online", "passes": 2, "max_inner_grad_norm": 0.7, "residual": True, "cut": 9},
    {"write_rule": "plain", "residual": True, "max_inner_grad_norm": 0.7, "cut": 8},
    {"write_rule": "online", "residual": False, "resets": True},
    {"write_rule": "normalized", "residual": True, "resets": True},
]
SCANS = {2: EVERY_OPTION + UNUSUAL, 4: EVERY_OPTION[::5] + UNUSUAL[-3:]}
"""By the number of ranks."""


def tensors(*, residual=False, max_step=0.2, length=TOKENS):
    """q, k, v, the gates; the two layers' weights; the norm."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (randn(BATCH, HEADS, length, DIM) for _ in range(3))
    gates = [torch.sigmoid(randn(BATCH, HEADS, length)) * bound for bound in (max_step, 0.9, 0.2)]
    weights = [randn(HEADS, HIDDEN, DIM) / DIM**0.5, randn(HEADS, DIM, HIDDEN) / HIDDEN**0.5]
    return [q, F.normalize(k, dim=-1), v, *gates], weights, [randn(HEADS, DIM), randn(HEADS, DIM)] if residual else []


def part(layers):
    """This rank's part of weights, or of gradients in them, two layers after two: rows of the first, columns of the second."""
    return [x.chunk(dist.get_world_size(), dim=-1 if number % 2 else -2)[dist.get_rank()] for number, x in enumerate(layers)]


def scan(tokens, weights, norm, group, *, residual, resets=False, cut=None, **options):
    """y, then the weights and the momentum after the last token and before the open chunk, two layers each."""
    options |= {"norm": ResidualNorm(*norm) if residual else None, "chunk_size": CHUNK, "group": group}
    if resets:
        options["resets"] = torch.tensor([[False, True, False, True], [True, False, True, False]])
    pieces, state = [], None
    for begin, end in itertools.pairwise([0, *([cut] if cut else []), TOKENS]):
        y, state = memory_scan(*(x[:, :, begin:end] for x in tokens), weights, state, **options)
        pieces.append(y)
    return torch.cat(pieces, dim=2), [*state.weights, *state.momentum, *state.chunk_weights, *state.chunk_momentum]


def relative(found, expected):
    """Largest difference, relative to the largest entry; infinite where something is not a number."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).nan_to_num(nan=math.inf).item()


def distance_to_one_rank(options):
    """Largest relative difference to the scan that is not split, in the results and in the gradients."""
    size, rank = dist.get_world_size(), dist.get_rank()
    tokens, weights, norm = tensors(residual=options["residual"], max_step=MAX_STEP[options["write_rule"]])
    whole = [x.clone().requires_grad_() for x in (*tokens, *weights, *norm)]
    y, states = scan(whole[:6], whole[6:8], whole[8:], "", **options)
    generator = torch.Generator().manual_seed(1)
    by_rank = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for _ in range(size)]  # gradients in what is alike come in parts
    of_states = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in states]
    loss = (sum(by_rank) * y).sum() + sum((a * b).sum() for a, b in zip(of_states, states, strict=True))
    gradients = torch.autograd.grad(loss, whole)

    mine = [x.clone().requires_grad_() for x in (*tokens, *part(weights), *norm)]
    my_y, my_states = scan(mine[:6], mine[6:8], mine[8:], dist.group.WORLD.group_name, **options)
    my_loss = (by_rank[rank] * my_y).sum() + sum((a * b).sum() for a, b in zip(part(of_states), my_states, strict=True))
    my_gradients = list(torch.autograd.grad(my_loss, mine))
    for alike in my_gradients[:6] + my_gradients[8:]:
        dist.all_reduce(alike)
    expected = [*gradients[:6], *part(gradients[6:8]), *gradients[8:]]
    results = [relative(a, b) for a, b in zip((my_y, *my_states), (y, *part(states)), strict=True)]
    return max(results), max(relative(a, b) for a, b in zip(my_gradients, expected, strict=True))


def sums_left_out(cases):
    """For every place in the scan that sums over ranks: its function, and how far off the first case that comes by is without it."""
    all_reduce, places, seen, left_out = ranks._all_reduce_, {}, [], None

    def watched(x, group):
        caller = sys._getframe(2)
        seen.append((caller.f_code.co_name, caller.f_lineno))
        return x if seen[-1] == left_out else all_reduce(x, group)

    with mock.patch.object(ranks, "_all_reduce_", watched):
        for options in cases:
            seen, left_out = [], None
            distance_to_one_rank(options)
            for place in dict.fromkeys(seen):
                if place not in places:
                    left_out = place
                    places[place] = max(distance_to_one_rank(options))
    return [(name, distance) for (name, _), distance in places.items()]


class CountSums(TorchDispatchMode):
    """Counts real all-reduces and what is in them."""

    def __init__(self):
        super().__init__()
        self.collectives = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_reduce_.default:
            self.collectives += 1
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def cost(rule, interval):
    """Of a rank's scan: collectives and elements forward, the same backward, FLOPs of the forward pass over whole chunks."""
    rule = rule._replace(group=dist.group.WORLD.group_name)
    tokens, weights, _ = tensors(length=LONGER)
    states = [torch.cat((w, w), dim=-2).expand(BATCH, *([-1] * 3)) for w in part(weights)]
    whole = LONGER - LONGER % CHUNK
    forward, backward = CountSums(), CountSums()
    in_place = {torch.ops.aten.baddbmm_: lambda out, a, b, *_, **__: 2 * a[0] * a[1] * a[2] * b[2]}  # torch counts baddbmm alone
    with FlopCounterMode(display=False, custom_mapping=in_place) as flops:
        for begin, end, length in ((0, whole, CHUNK), (whole, LONGER, LONGER - whole)):
            piece = [x[:, :, begin:end] for x in tokens]
            with forward:
                y, after, kept = scan_chunks(piece, states, None, rule, length, interval, keep=True)
            if length == CHUNK:
                counted = flops.get_total_flops()
            with backward:
                scan_chunks_vjp(torch.ones_like(y), after, piece, kept, None, rule, length, interval)
    return (forward.collectives, forward.elements), (backward.collectives, backward.elements), counted


def layer(options):
    torch.manual_seed(0)
    memory = NeuralMemory(16, MemoryConfig(**{"num_heads": 2, "chunk_size": 8, **options})).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return memory, torch.randn(2, 22, 16, dtype=torch.float64, requires_grad=True)


def used(memory, x):
    """Two calls with the state handed on, then a read as MAC does it."""
    first, state = memory(x[:, :9])
    second, state = memory(x[:, 9:], state)
    return torch.cat((first, second, memory.retrieve(memory.queries(x)[0], state.scan.weights, x)), dim=1)


def probed(memory, x):
    with torch.no_grad(), MemoryProbe(memory) as probe:
        memory(x)
    return probe.metrics()


def layer_in_parts(options):
    """Largest relative difference of a split layer to a whole one: outputs, gradients, and what the probe sees."""
    size, rank = dist.get_world_size(), dist.get_rank()
    whole, x = layer(options)
    mine, x_mine = copy.deepcopy(whole), x.detach().clone().requires_grad_()
    mine.split_hidden(dist.group.WORLD.group_name, rank, size)
    own = {"initial_weights.0": 1, "initial_weights.1": 2, "out_proj.weight": 1}
    for i in (0, 1):
        mine.initial_weights[i] = nn.Parameter(part(whole.initial_weights)[i].detach().clone())
    mine.out_proj.weight = nn.Parameter(whole.out_proj.weight.chunk(size, dim=1)[rank].detach().clone())
    y, my_y = used(whole, x), used(mine, x_mine)
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (weighting * y).sum().backward()
    (weighting * my_y).sum().backward()  # the block adds the parts up, so each of them gets the whole gradient
    my_y = my_y.detach()
    pairs = [(my_y, y), (x_mine.grad, x.grad)]
    for (name, ours), one in zip(mine.named_parameters(), whole.parameters(), strict=True):
        pairs.append((ours.grad, one.grad.chunk(size, dim=own[name])[rank] if name in own else one.grad))
        if name not in own:
            dist.all_reduce(ours.grad)
    dist.all_reduce(my_y)
    dist.all_reduce(x_mine.grad)
    seen, expected = probed(mine, x.detach()), probed(whole, x.detach())
    of_probe = max(abs(seen[name] / expected[name] - 1) for name in expected if expected[name])
    return max(relative(ours, one) for ours, one in pairs), of_probe


COSTS = [
    (Rule(CHUNK, "silu", "plain", None, 1, None), 2),
    (Rule(CHUNK, "silu", "normalized", 0.7, 1, None), 100),
    (Rule(CHUNK, "silu", "online", None, 1, None), 1),
    (Rule(CHUNK, "silu", "online", 0.7, 3, 4.0), 2),
]
LAYERS = [{}, {"write_rule": "normalized", "residual_norm": True, "conv_kernel": 0}, {"passes": 2, "momentum": False, "num_heads": 1}]
BINDING = [{"write_rule": rule, "passes": 2, "residual": False, "max_inner_grad_norm": 0.7} for rule in MAX_STEP]


def of_every_test(scans, layers, binding, costs):
    """All that ranks have to do, in one launch."""
    return {
        "scans": [distance_to_one_rank(options) for options in scans],
        "layers": [layer_in_parts(options) for options in layers],
        "left out": sums_left_out(binding),
        "costs": [cost(*case) for case in costs],
    }


@pytest.fixture(scope="module")
def on_ranks():
    """What each rank found, by the number of ranks."""
    return {2: run_ranks(of_every_test, 2, SCANS[2], LAYERS, BINDING, COSTS), 4: run_ranks(of_every_test, 4, SCANS[4], LAYERS[:1], [], [])}


@pytest.mark.parametrize("size, number", [(size, number) for size, scans in SCANS.items() for number in range(len(scans))])
def test_a_split_scan_and_its_gradients_equal_the_whole_one(on_ranks, size, number):
    """Sums in another order leave rounding; the LayerNorm of a nearly constant output makes more of it, up to 1e-12."""
    for of_rank in on_ranks[size]:
        results, gradients = of_rank["scans"][number]
        assert results < 1e-10, SCANS[size][number]
        assert gradients < 1e-9, SCANS[size][number]


def test_no_sum_can_be_left_out(on_ranks):
    left_out = on_ranks[2][0]["left out"]
    once = ["read", "read_vjp", "surprise", "surprise_vjp", "squared_norm", "gram", "scale_vjp", "_one_pass_vjp"]
    assert sorted(name for name, _ in left_out) == sorted([*once, "_one_pass", "_one_pass"])
    assert [name for name, distance in left_out if distance < 1e-4] == []


@pytest.mark.parametrize("number", range(len(COSTS)))
def test_the_formulas_of_sums_and_flops_are_what_a_rank_does(on_ranks, number):
    rule, interval = COSTS[number]
    forward, backward, flops = on_ranks[2][0]["costs"][number]
    memories = BATCH * HEADS
    expected = split_sums(rule, DIM, LONGER, interval)
    assert [forward, backward] == [(sums.collectives, sums.elements * memories) for sums in expected]
    of_chunk = chunk_flops([(DIM, HIDDEN // 2), (HIDDEN // 2, DIM)], CHUNK, rule.write_rule, rule.passes)
    assert flops == memories * (LONGER // CHUNK) * of_chunk.forward


@pytest.mark.parametrize("size, number", [*((2, number) for number in range(len(LAYERS))), (4, 0)])
def test_a_split_layer_adds_up_to_the_whole_one_and_the_probe_sees_no_difference(on_ranks, size, number):
    for of_rank in on_ranks[size]:
        results, of_probe = of_rank["layers"][number]
        assert results < 1e-10
        assert of_probe < 1e-8, "a small difference between passes, relative to itself"


def test_what_cannot_be_split_gets_a_sentence():
    tokens, _, _ = tensors()
    square = [torch.eye(DIM, dtype=torch.float64).expand(HEADS, DIM, DIM)] * 3
    with pytest.raises(ValueError, match="depth 3 has no one hidden width to split over a group"):
        memory_scan(*tokens, square, group="tensor")
    with pytest.raises(ValueError, match="depth 1 has no one hidden width to split; set"):
        NeuralMemory(16, MemoryConfig(depth=1, num_heads=2)).split_hidden("tensor", 0, 2)
    with pytest.raises(ValueError, match="over 3 ranks: hidden width 16, num_heads"):
        NeuralMemory(16, MemoryConfig(num_heads=2)).split_hidden("tensor", 0, 3)


HEADS_OPTIONS = [
    {"residual_norm": True},
    {"momentum": False, "forgetting": False, "conv_kernel": 0},
    {"write_rule": "normalized", "head_dim": 6, "depth": 1},
]


@pytest.mark.parametrize("options", HEADS_OPTIONS, ids=str)
def test_layers_with_some_of_the_heads_add_up_to_the_layer(options):
    whole, x = layer({"num_heads": 4, **options})
    y = 0
    for number in range(2):
        half = copy.deepcopy(whole)
        for name, parameter in list(half.named_parameters()):
            dim = 1 if name == "out_proj.weight" else 0  # all others have heads, or heads side by side, first
            owner, _, last = name.rpartition(".")
            setattr(half.get_submodule(owner), last, nn.Parameter(parameter.detach().chunk(2, dim=dim)[number]))
        y = y + used(half, x)
    torch.testing.assert_close(y, used(whole, x), rtol=1e-10, atol=1e-10)


def test_a_split_scan_has_shapes_without_ranks():
    """On the meta device nobody is asked: a model is planned, and compiled, without a process group."""
    tokens, weights, norm = tensors(residual=True)
    inputs = [x.to("meta").requires_grad_() for x in (*tokens, *weights, *norm)]
    y, states = scan(inputs[:6], inputs[6:8], inputs[8:], "tensor", residual=True)
    y.sum().backward()
    assert y.shape == tokens[0].shape and [x.shape[1:] for x in states[:2]] == [weight.shape for weight in weights]
    assert all(x.grad.shape == x.shape for x in inputs)

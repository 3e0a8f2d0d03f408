"""A step rehearsed in a fake world: it peaks where a real one does, sends what formulas say, and gives a time that follows the links."""

import gc
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from distributed import run_ranks
from small_models import VARIANTS
from torch.profiler import ProfilerActivity, profile

from titans_scale import TitansLM, load_config
from titans_scale.config import ConfigError, TitansConfig
from titans_scale.models.flops import memory_widths
from titans_scale.parallel import Mesh, mesh_sizes
from titans_scale.parallel.engine import build_engine
from titans_scale.parallel.planning import rehearsal
from titans_scale.parallel.planning.rehearsal import Rehearsal, rehearse
from titans_scale.parallel.planning.sharding_traffic import sharding_passes
from titans_scale.parallel.planning.step_time import NETWORK_HOP_SECONDS, NVLINK_HOP_SECONDS, START_SECONDS, Links, predict
from titans_scale.parallel.planning.traffic import Collective


def run_config(variant: str = "lmm", *overrides: str) -> TitansConfig:
    settings = [f"model.variant={variant}", "model.dim=128", "model.num_layers=2", "model.num_heads=4", "model.vocab_size=2000"]
    settings += ["model.segment_len=128", "model.window=128", "model.memory.num_heads=2", "model.memory.chunk_size=64"]
    settings += ["training.sequence_length=256", "training.micro_batch_size=4", "training.global_batch_tokens=4096"]
    return load_config(None, [*settings, *overrides])


def peaks_of_real_steps(variants: tuple[str, ...], accumulation_steps: int) -> list[int]:
    """Bytes that forward and backward of one step add at their peak, by the allocator."""
    return [peak_of_a_real_step(run_config(variant, *IN_FLOAT32), accumulation_steps) for variant in variants]


def peak_of_a_real_step(config: TitansConfig, accumulation_steps: int) -> int:
    mesh = Mesh(mesh_sizes(config.parallelism, 1), "cpu")
    engine = build_engine(config, mesh, torch.device("cpu"), lambda model: torch.optim.AdamW(model.parameters()))
    tokens = torch.zeros(config.training.micro_batch_size, config.training.sequence_length, dtype=torch.int64)

    def forward_and_backward() -> None:
        for number in range(1, accumulation_steps + 1):
            loss = engine.model.loss_sum(tokens, tokens, logits_bytes=config.training.logits_bytes)
            engine.backward(loss, last=number == accumulation_steps)

    forward_and_backward()
    engine.step(lr=1e-3, max_norm=1.0)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_and_backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


IN_FLOAT32 = ("training.dtype=float32", "parallelism.reshard_after_forward=false")


def rehearsed_peak(variant: str, accumulation_steps: int) -> int:
    """As on a CPU, whose norms are many small operators."""
    config = run_config(variant, *IN_FLOAT32)
    return sum(rehearse(config, world_size=1, accumulation_steps=accumulation_steps, surroundings=nullcontext()).peak_bytes.values())


def test_a_rehearsed_step_peaks_where_a_real_one_does():
    """The issue asks for 10%. What is left is a few numbers of no size, so 1% tells a tensor that is missed."""
    real = run_ranks(peaks_of_real_steps, 1, VARIANTS, 1)[0]
    assert [rehearsed_peak(variant, 1) for variant in VARIANTS] == pytest.approx(real, rel=0.01)


def test_so_does_one_with_accumulated_gradients():
    assert [rehearsed_peak("lmm", 2)] == pytest.approx(run_ranks(peaks_of_real_steps, 1, ("lmm",), 2)[0], rel=0.01)


@cache
def rehearsed(*overrides: str, world_size: int = 8, rank: int = 0, accumulation_steps: int = 1) -> Rehearsal:
    return rehearse(run_config("lmm", *overrides), world_size=world_size, rank=rank, accumulation_steps=accumulation_steps)


def bytes_sent(result: Rehearsal) -> dict[tuple[str, str], float]:
    return {(one.kind, one.dimension): one.bytes for one in result.traffic if one.bytes > 1000}  # not the gradients' norm


def padded_parameters(shards: int) -> int:
    """Numbers that FSDP2 gathers: dimension 0 of every parameter is filled up to a multiple of the shards."""
    with torch.device("meta"):
        model = TitansLM(run_config().model)
    return sum(-(-x.shape[0] // shards) * shards * x[0].numel() for x in model.parameters())


KEPT = "parallelism.reshard_after_forward=false"


@pytest.mark.parametrize(
    ("accumulation_steps", "overrides"),
    [
        (3, (KEPT,)),
        (3, ()),
        (1, (KEPT, "parallelism.data_parallel_replicate=2")),
        (1, ("model.tie_embeddings=false",)),
    ],
)
def test_the_formulas_are_what_a_rehearsed_step_sends(accumulation_steps, overrides):
    """Byte for byte, pass by pass."""
    config = run_config("lmm", *overrides, "training.dtype=bfloat16")
    formulas = sharding_passes(config, mesh_sizes(config.parallelism, 8), accumulation_steps)
    rehearsed_passes = rehearsed(*overrides, accumulation_steps=accumulation_steps).passes
    assert [(list(one.forward), list(one.backward)) for one in formulas] == [
        (list(one.forward), list(one.backward)) for one in rehearsed_passes
    ]


def test_fsdp_on_512_ranks_gathers_once_and_reduces_once():
    """Parameters in bfloat16, gradients in float32."""
    numbers = padded_parameters(512)
    assert bytes_sent(rehearsed(KEPT, world_size=512)) == {("all-gather", "shard"): 2 * numbers, ("reduce-scatter", "shard"): 4 * numbers}


def test_hsdp_on_512_ranks_reduces_each_shard_over_the_replicas_too():
    numbers = padded_parameters(8)
    expected = {
        ("all-gather", "shard"): 2 * numbers,
        ("reduce-scatter", "shard"): 4 * numbers,
        ("all-reduce", "replicate"): 4 * numbers // 8,
    }
    assert bytes_sent(rehearsed(KEPT, "parallelism.data_parallel_replicate=64", world_size=512)) == expected


def test_one_rank_sends_nothing():
    assert not list(rehearsed(world_size=1).traffic)


def test_the_ranks_shards_are_the_whole_model():
    """Of 3 ranks, over which nothing divides."""
    here = [rehearsed("model.num_layers=1", world_size=3, rank=rank).parameters_here for rank in range(3)]
    with torch.device("meta"):
        whole = sum(x.numel() for x in TitansLM(run_config("lmm", "model.num_layers=1").model).parameters())
    assert sum(here) == whole and len(set(here)) > 1


@pytest.mark.parametrize(("layers", "reshard"), [(4, "false"), pytest.param(6, "true", marks=pytest.mark.slow)])
def test_more_blocks_add_what_the_last_one_did(layers, reshard, monkeypatch):
    overrides = (f"model.num_layers={layers}", f"parallelism.reshard_after_forward={reshard}", "training.micro_batch_size=1")
    from_two = rehearse(run_config("lmm", *overrides), world_size=8, accumulation_steps=2)
    monkeypatch.setattr(rehearsal, "depths_rehearsed", lambda config: [layers])
    whole = rehearse(run_config("lmm", *overrides), world_size=8, accumulation_steps=2)
    assert from_two.total_bytes == pytest.approx(whole.total_bytes, rel=0.01)
    assert bytes_sent(from_two) == bytes_sent(whole)


def test_tensor_ranks_hold_a_part_of_every_layer_and_talk_in_every_layer():
    alone, split = rehearsed(world_size=1), rehearsed("parallelism.tensor_parallel=2", world_size=2)
    assert 0.5 * alone.parameters_here < split.parameters_here < 0.6 * alone.parameters_here
    assert {dimension for _, dimension in bytes_sent(split)} == {"tensor"}


def test_sums_inside_the_scan_are_counted():
    """A memory split by hidden width adds up over ranks at each chunk, inside an operator."""
    heads, hidden = (
        rehearsed("parallelism.tensor_parallel=2", f"parallelism.memory_split={split}", world_size=2) for split in ("heads", "hidden")
    )
    assert bytes_sent(hidden)["all-reduce", "tensor"] > 2 * bytes_sent(heads).get(("all-reduce", "tensor"), 0)


def test_context_ranks_send_the_memory_on_in_every_layer():
    """Weights and momentum in float32, 8 bytes a number and sequence, and little besides: tails of convolutions."""
    config = run_config("lmm", "model.num_persistent_tokens=0")
    memory = config.training.micro_batch_size * 2 * sum(into * out for into, out in memory_widths(config.model))
    sent = bytes_sent(rehearsed("model.num_persistent_tokens=0", "parallelism.context_parallel=2", world_size=2))
    assert 1 < sent["send", "context"] / (config.model.num_layers * 8 * memory) < 1.05
    assert sent["receive", "context"] == sent["send", "context"]


@pytest.mark.parametrize(
    ("overrides", "rank", "told"),
    [
        ((), 8, "the rank is 8; of 8 ranks it must be 0 to 7"),
        (("parallelism.context_parallel=4", "parallelism.tensor_parallel=2"), 5, "rehearse rank 1, which has the first tokens"),
        (("parallelism.tensor_parallel=8",), 0, "does not divide by parallelism.tensor_parallel 8"),
    ],
)
def test_ranks_and_layouts_that_cannot_be_are_told(overrides, rank, told):
    with pytest.raises(ConfigError, match=told):
        rehearsed(*overrides, rank=rank)


def seconds(kind: str, ranks: range, links: Links) -> float:
    return links.seconds(Collective(kind=kind, dimension="shard", ranks=tuple(ranks), calls=2, bytes=8e9))


def test_a_ring_goes_at_the_rate_of_the_links_that_it_crosses():
    links = Links(nvlink_gbs=400, network_gbs=25)
    hops = 2 * START_SECONDS + 2 * 7 * NVLINK_HOP_SECONDS
    assert seconds("all-gather", range(8), links) == pytest.approx(hops + 7 / 400)
    over_network = 2 * START_SECONDS + 2 * 2 * 7 * NETWORK_HOP_SECONDS
    assert seconds("all-reduce", range(0, 64, 8), links) == pytest.approx(over_network + 2 * 7 / 25)
    # Both GPUs of each node have a card of their own.
    two_a_node = Links(nvlink_gbs=400, network_gbs=25, gpus_per_node=2)
    assert seconds("all-gather", range(8), two_a_node) == pytest.approx(
        2 * START_SECONDS + 2 * (4 * NVLINK_HOP_SECONDS + 3 * NETWORK_HOP_SECONDS) + 7 / 50
    )


def predicted(links: Links, *, flops: float = 1e9, context: int = 1) -> float:
    result = rehearsed(KEPT, "parallelism.data_parallel_replicate=64", world_size=512)
    time = predict(
        result.passes, result.optimizer, links, micro_batch_flops=flops, flops_per_second=4e14, layers=2, context=context, root_share=0.3
    )
    assert time.step > 0.999999 * (time.compute + time.bubble + time.in_the_way)  # rounding apart
    return time.step


def test_faster_links_never_make_a_step_slower():
    by_network = [predicted(Links(network_gbs=rate)) for rate in (0.1, 1, 10, 100)]
    assert by_network == sorted(by_network, reverse=True) and by_network[0] > 2 * by_network[-1]
    by_nvlink = [predicted(Links(nvlink_gbs=rate)) for rate in (0.1, 1, 10, 100)]
    assert by_nvlink == sorted(by_nvlink, reverse=True) and by_nvlink[0] > 2 * by_nvlink[-1]


def test_much_computation_hides_what_runs_beside_it():
    few, many = predicted(Links(), flops=1e9), predicted(Links(), flops=1e13)
    assert few > 10 * 1e9 / 4e14  # all of it communication
    assert many < 1.1 * 1e13 / 4e14


def test_context_ranks_wait_for_each_other():
    """4 ranks over 2 layers: 5 layer times in place of 2."""
    assert predicted(Links(), flops=1e15, context=4) == pytest.approx(2.5 * predicted(Links(), flops=1e15), rel=0.01)

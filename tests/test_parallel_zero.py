"""DeepSpeed's ZeRO behind the same trainer: the curve of one process under FSDP2, and checkpoints that either engine goes on from."""

import importlib.util
import json
import shutil
from functools import partial

import pytest
import torch
from distributed import run_ranks
from training_runs import SEQUENCE_LENGTH, curve, make_data, records, small_config

from titans_scale import TitansLM
from titans_scale.config import ConfigError
from titans_scale.data import IGNORED, Batch
from titans_scale.training.trainer import Trainer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra [deepspeed]")

TIMEOUT = 400
"""Seconds for a launch, which has some twenty runs in it."""
EVERY_RUN = {"training.steps": 3, "checkpoint.interval": 1, "checkpoint.keep_last": 0}
LOOKS = {"eval.interval": 3, "eval.batches": 0, "metrics.memory_interval": 3}
SHARD_EVERYTHING = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
"""By default stage 3 keeps parameters as small as all of these are."""

ONE_RANK = {
    "plain": LOOKS,
    "mag": {"model.variant": "mag"},
    "mal": {"model.variant": "mal"},
    "lmm": {"model.variant": "lmm"},
    "untied": {"model.tie_embeddings": "false"},
    "bfloat16": {"training.dtype": "bfloat16"},
}
TWO_RANKS = {
    # First: DeepSpeed's stage 3 replaces torch's linear layer for the rest of the process, and this run must do without.
    "zero 3, recomputed in part": {"activation_checkpoint.mode": "selective"},
    "zero 3": LOOKS,
    "zero 3, small parameters whole": {"engine.config": "null"},
    "zero 2": LOOKS,
    "zero 1": {},
    "zero 3, one micro-batch": {"training.micro_batch_size": 4},
    "zero 2, four micro-batches": {"training.micro_batch_size": 1},
    "zero 1, four micro-batches": {"training.micro_batch_size": 1},
    "zero 3, offloaded": {"parallelism.cpu_offload": "true"},
    "zero 2, offloaded, two micro-batches": {"parallelism.cpu_offload": "true"},
    "zero 2, mag": ONE_RANK["mag"],
    "zero 3, mal": ONE_RANK["mal"],
    "zero 3, lmm": ONE_RANK["lmm"],
    "zero 3, untied": ONE_RANK["untied"],
    "zero 1, bfloat16": ONE_RANK["bfloat16"],
    "zero 2, bfloat16": ONE_RANK["bfloat16"],
    "zero 3, bfloat16": ONE_RANK["bfloat16"],
}
GONE_ON = {
    # from -> to, by engine; the ranks are those of the launch
    2: {("one", "plain"): "zero 3", ("two", "zero 2"): "zero 3", ("two", "zero 3"): "zero 1", ("two", "zero 1"): "zero 2"},
    1: {("two", "zero 3"): "fsdp2", ("two", "zero 2, four micro-batches"): "zero 2"},
}


def zero(name, folder):
    """Settings for an engine that is called "zero STAGE, and so on", or anything else for FSDP2."""
    if not name.startswith("zero"):
        return {}
    stage = int(name[5])
    settings = {"engine.name": "deepspeed", "engine.zero_stage": stage}
    return settings | ({"engine.config": folder / "all.json"} if stage == 3 else {})


def write_settings(folder):
    (folder / "all.json").write_text(json.dumps({"gradient_clipping": "auto", "zero_optimization": {"stage": 3, **SHARD_EVERYTHING}}))


def train_all(data, folder, place, runs):
    for name, changes in runs.items():
        Trainer(small_config(data, folder / place / name, {**EVERY_RUN, **zero(name, folder), **changes})).run()


def go_on(data, folder, place):
    """Take up copies of other runs after their first step. The loss of the third tells of the moments, which the second moved by."""
    ranks = torch.distributed.get_world_size()
    for source, engine in GONE_ON[ranks].items():
        run = folder / place / f"{'/'.join(source)} -> {engine}"
        if torch.distributed.get_rank() == 0:
            shutil.copytree(folder / source[0] / source[1], run)
            for step in (2, 3):
                shutil.rmtree(run / "checkpoint" / f"step-{step}")
        torch.distributed.barrier()
        Trainer(small_config(data, run, {**EVERY_RUN, **zero(engine, folder)})).run()


def train_compiled(data, folder):
    """Traced, that is; inductor would take a minute to write its C++. Returns the number of graphs."""
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=note))
        train_all(data, folder, "two", {"zero 3, lmm, compiled": {**ONE_RANK["lmm"], "compile.enabled": "true"}})
    return len(graphs)


def on_two_ranks(data, folder):
    train_all(data, folder, "two", TWO_RANKS)
    go_on(data, folder, "gone on, 2")
    (folder / f"graphs of rank {torch.distributed.get_rank()}").write_text(str(train_compiled(data, folder)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    write_settings(folder)
    data = make_data(folder / "data")
    run_ranks(train_all, 1, data, folder, "one", ONE_RANK, timeout=TIMEOUT)
    run_ranks(on_two_ranks, 2, data, folder, timeout=TIMEOUT)
    run_ranks(go_on, 1, data, folder, "gone on, 1", timeout=TIMEOUT)
    return folder


def assert_same_curve(run, reference, *, loss_tolerance=1e-5, norm_tolerance=1e-4):
    """float32 sums in another order, as a rule; and learning rates that are the same."""
    for (step, loss, norm, lr), (its_step, its_loss, its_norm, its_lr) in zip(curve(run), curve(reference), strict=True):
        assert (step, lr) == (its_step, its_lr)
        assert loss == pytest.approx(its_loss, rel=loss_tolerance)
        assert norm == pytest.approx(its_norm, rel=norm_tolerance)


def alone(name):
    """The run on one rank that a run on two compares with."""
    return next((part for part in name.split(", ") if part in ONE_RANK), "plain")


@pytest.mark.parametrize("name", [name for name in TWO_RANKS if "bfloat16" not in name])
def test_every_stage_trains_as_one_process_does(runs, name):
    assert_same_curve(runs / "two" / name, runs / "one" / alone(name))


def test_compiled_blocks_train_alike_in_one_graph_with_the_gathering_outside(runs):
    assert_same_curve(runs / "two" / "zero 3, lmm, compiled", runs / "one" / "lmm")
    assert [(runs / f"graphs of rank {rank}").read_text() for rank in (0, 1)] == ["1", "1"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_stays_near_fsdp2_s(runs, stage):
    """Gradients of a weight are rounded to bfloat16 (2**-9) once a micro-batch, and the micro-batches are others; the loss hardly moves."""
    name = f"zero {stage}, bfloat16"
    assert_same_curve(runs / "two" / name, runs / "one" / "bfloat16", loss_tolerance=2e-4, norm_tolerance=1e-2)


def test_bfloat16_is_not_float32_so_it_was_really_used(runs):
    assert curve(runs / "two" / "zero 2, bfloat16")[-1][1] != pytest.approx(curve(runs / "one" / "plain")[-1][1], rel=1e-7)


@pytest.mark.parametrize("name", ["zero 2", "zero 3"])
def test_validation_and_the_look_into_the_memories_work_on_shards(runs, name):
    there, here = records(runs / "one" / "plain")[-1], records(runs / "two" / name)[-1]
    assert here["validation_metrics/loss"] == pytest.approx(there["validation_metrics/loss"], rel=1e-5)
    assert here["titans/state_norm"] == pytest.approx(there["titans/state_norm"], rel=1e-2)  # of other rows


@pytest.mark.parametrize(
    ("ranks", "run"), [(ranks, f"{'/'.join(source)} -> {to}") for ranks, pairs in GONE_ON.items() for source, to in pairs.items()]
)
def test_either_engine_goes_on_from_the_other_s_checkpoint(runs, ranks, run):
    assert_same_curve(runs / f"gone on, {ranks}" / run, runs / "one" / "plain")


RANKS, ROWS = 3, 2
UNEVEN = {"training.global_batch_tokens": SEQUENCE_LENGTH * RANKS * ROWS * 2}


def uneven_batches():
    """Two micro-batches for each rank, with fewer and fewer targets: rank 2 has next to none."""
    generator = torch.Generator().manual_seed(0)
    for number in range(RANKS * 2):
        tokens = torch.randint(0, 256, (ROWS, SEQUENCE_LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[:, max(0, 30 - 6 * number) :] = IGNORED
        yield Batch(inputs=tokens[:, :-1], targets=targets)


def whole_weights(trainer):
    weights = trainer.engine.state()["model"] if trainer.config.engine.name == "deepspeed" else dict(trainer.model.named_parameters())
    return {name: weight.full_tensor().detach().clone() for name, weight in weights.items()}


def one_step(data, folder, engine):
    trainer = Trainer(small_config(data, folder / engine, {**UNEVEN, **zero(engine, folder)}))
    before = whole_weights(trainer)
    batches = list(uneven_batches())
    targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    result = trainer.train_step(batches[trainer.context.rank :: RANKS], targets)
    outcome = {"loss": trainer.context.sum(result.loss).item(), "norm": result.grad_norm.item()}
    outcome |= {"before": before, "after": whole_weights(trainer)}
    if engine.startswith("zero"):
        # A weight that is not a number, on the rank that holds it alone in stage 3.
        trainer.engine._weights.set_weight("norm.weight", torch.full((32,), float("nan")))
        outcome["found"] = not all(shard.isfinite().all() for shard in trainer.engine.shards())
        result = trainer.train_step(batches[trainer.context.rank :: RANKS], targets)
        outcome["first bad step"] = trainer.watch.first_bad_step()
    trainer.close()
    return outcome


def on_three_ranks(data, folder):
    (folder / "mistyped.json").write_text(json.dumps({"zero_optimization": {"stage3_prefetch_bucket": 1}}))
    with pytest.raises(ConfigError) as refused:
        Trainer(small_config(data, folder / "refused", {**UNEVEN, **zero("zero 2", folder), "engine.config": folder / "mistyped.json"}))
    outcomes = {engine: one_step(data, folder, engine) for engine in ("fsdp2", "zero 1", "zero 2", "zero 3")}
    return {"sentence": str(refused.value), **outcomes}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    write_settings(folder)
    return run_ranks(on_three_ranks, RANKS, make_data(folder / "data"), folder, timeout=TIMEOUT)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_initial_weights_are_those_of_any_layout_where_ranks_do_not_divide_them(steps, stage):
    for name, value in TitansLM(small_config("data", "run").model).initial_values(0):
        for outcomes in steps:
            assert torch.equal(outcomes[f"zero {stage}"]["before"][name], value), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_with_fewer_targets_weighs_less(steps, stage):
    for outcomes in steps:
        mine, fsdp2 = outcomes[f"zero {stage}"], outcomes["fsdp2"]
        assert mine["loss"] == pytest.approx(fsdp2["loss"], rel=1e-5)
        assert mine["norm"] == pytest.approx(fsdp2["norm"], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_weights_move_as_under_fsdp2(steps, stage):
    """Adam's first step is the gradient's sign: where that is noise a weight may go the other way, which few do."""
    mine, fsdp2 = steps[0][f"zero {stage}"], steps[0]["fsdp2"]
    for name, weight in fsdp2["after"].items():
        assert (weight - fsdp2["before"][name]).abs().max() > 0, name
        off = (mine["after"][name] - weight).abs() > 1e-5
        assert off.float().mean() < 1e-2, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_numbers_that_are_not_finite_are_seen(steps, stage):
    assert any(outcomes[f"zero {stage}"]["found"] for outcomes in steps)
    assert [outcomes[f"zero {stage}"]["first bad step"] for outcomes in steps] == [2] * RANKS


def test_what_deepspeed_itself_refuses_is_told_in_one_sentence_on_every_rank(steps):
    for outcomes in steps:
        sentence = outcomes["sentence"]
        assert "mistyped.json" in sentence and "stage3_prefetch_bucket" in sentence and "\n" not in sentence

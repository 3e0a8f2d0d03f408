"""Every layout trains the same model: from one seed checkpoint, the losses, gradient norms and weights of a single process.

Twenty steps of mac and four of the others, and twenty of those too among the slow tests. One launch for each number of ranks runs all
its layouts one after the other, since starting the processes is what costs.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from small_models import VARIANTS
from torch.distributed.tensor import DTensor
from training_runs import SEQUENCE_LENGTH, curve, make_data, small_config

from titans_scale.data import IGNORED
from titans_scale.training.trainer import Trainer

STEPS = {"mac": 20, "mag": 4, "mal": 4, "lmm": 4}
MANY_STEPS = {"mag": 20, "mal": 20, "lmm": 20}
EVERY_RUN = {
    "training.max_grad_norm": 0.5,  # less than every norm here: the clip is at work in each step
    "model.window": 10,
    "model.memory.chunk_size": 8,
    "lr_scheduler.name": "wsd",
    "optimizer.eps": 1e-4,  # at 1e-8 Adam's first steps are the gradients' signs, of those too that are rounding errors
}
WHOLE, HALF, QUARTER = ({"training.micro_batch_size": size} for size in (8, 4, 2))
"""One micro-batch a step on 1, 2 and 4 data ranks."""
TENSOR, CONTEXT, ZERO = {"parallelism.tensor_parallel": 2}, {"parallelism.context_parallel": 2}, {"engine.name": "deepspeed"}
BY_WORLD = {
    1: {"single": WHOLE, "four micro-batches": {"training.micro_batch_size": 2}},
    2: {
        "fsdp2": HALF,
        "fsdp2, four micro-batches": {"training.micro_batch_size": 1, "parallelism.prefetch": 0},
        "fsdp2, offloaded": {**HALF, "parallelism.cpu_offload": "true"},
        "tp 2": {**WHOLE, **TENSOR},
        "tp 2, hidden": {**WHOLE, **TENSOR, "parallelism.memory_split": "hidden"},
        "cp 2": {**WHOLE, **CONTEXT},
        "zero 1": {**HALF, **ZERO, "engine.zero_stage": 1},
        "zero 2": {**HALF, **ZERO, "engine.zero_stage": 2},
        "zero 3": {**HALF, **ZERO, "engine.zero_stage": 3},
    },
    4: {
        "hsdp 2x2": {**QUARTER, "parallelism.data_parallel_replicate": 2},
        "fsdp 2 x tp 2": {**HALF, **TENSOR},
        "fsdp 2 x cp 2": {**HALF, **CONTEXT},
        "cp 2 x tp 2": {**WHOLE, **CONTEXT, **TENSOR},
    },
}
LAYOUTS = [(world, name) for world, layouts in BY_WORLD.items() for name in layouts]
AGAIN = {2: ["tp 2", "cp 2"], 4: ["fsdp 2 x tp 2"]}
"""Layouts that are run a second time, for one variant."""
BFLOAT16 = {2: ["fsdp2", "tp 2", "cp 2", "zero 2"]}
"""Likewise, in bfloat16."""


class Watched(Trainer):
    """Trains on samples of which each has another number of targets, and remembers the weights after its first step."""

    def next_global_batch(self, batches, *arguments):
        return super().next_global_batch(map(with_fewer_targets, batches), *arguments)

    def train_step(self, *arguments):
        result = super().train_step(*arguments)
        if self.step == 1:
            self.after_one_step = whole(self.engine.state()["model"])
        return result


def with_fewer_targets(batch):
    """From all to an eighth of the targets, by the row's first token: some ranks have more than others, whatever the layout."""
    kept = SEQUENCE_LENGTH >> (batch.inputs[:, :1] % 4)
    return replace(batch, targets=batch.targets.masked_fill(torch.arange(SEQUENCE_LENGTH) >= kept, IGNORED))


def whole(weights):
    return {name: weight.full_tensor().clone() if isinstance(weight, DTensor) else weight.clone() for name, weight in weights.items()}


def config_of(data, run, variant, changes, steps=1):
    return small_config(data, run, {**EVERY_RUN, "model.variant": variant, "training.steps": steps, **changes})


def write_seed(data, run, variant):
    """A checkpoint before the first step, of weights at which nothing is neutral: gates and norms of a new model hide mistakes."""
    trainer = Trainer(config_of(data, run, variant, {}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            local = parameter.to_local()
            local.add_(torch.randn(local.shape, generator=generator) * 0.1)
    trainer.checkpoints.save(0, trainer.engine, trainer._counters(), trainer.config)
    trainer.close()


def write_seeds(data, folder):
    for variant in VARIANTS:
        write_seed(data, folder / variant, variant)


def train_all(data, folder, world, steps):
    """Every layout and variant: the loss curve is in the run's files, on rank 0 the weights after one step are returned."""
    weights = {}
    for name, changes in BY_WORLD[world].items():
        for variant, count in steps.items():
            weights[name, variant] = train(data, folder / name / variant, variant, changes, count)
    return weights if torch.distributed.get_rank() == 0 else None


def train_again_and_in_bfloat16(data, folder, world):
    for name in AGAIN.get(world, []):
        train(data, folder / f"{name} again" / "mac", "mac", BY_WORLD[world][name], STEPS["mac"])
    for name in BFLOAT16.get(world, []):
        train(data, folder / f"{name} bfloat16" / "mac", "mac", {**BY_WORLD[world][name], "training.dtype": "bfloat16"}, STEPS["mac"])


def train(data, run, variant, changes, steps):
    trainer = Watched(config_of(data, run, variant, changes, steps))
    trainer.run()
    return trainer.after_one_step


def make_folder(folder, runs):
    """Data, seed checkpoints, and a copy of these for each run."""
    data = make_data(folder / "data", documents=30)  # an epoch and a little more: the one short sample is met on the way
    run_ranks(write_seeds, 1, data, folder / "seed")
    for name in runs:
        shutil.copytree(folder / "seed", folder / "runs" / name)
    return folder


def weights_of_all(folder, steps):
    """After one step, by number of ranks."""
    return {world: run_ranks(train_all, world, folder / "data", folder / "runs", world, steps, timeout=900)[0] for world in BY_WORLD}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    again = [f"{name} again" for names in AGAIN.values() for name in names]
    bfloat16 = [f"{name} bfloat16" for names in BFLOAT16.values() for name in names]
    return make_folder(tmp_path_factory.mktemp("parity"), [*(name for _, name in LAYOUTS), *again, *bfloat16])


@pytest.fixture(scope="module")
def weights(folder):
    return weights_of_all(folder, STEPS)


@pytest.fixture(scope="module")
def others(folder, weights):
    """The runs a second time, and those in bfloat16."""
    for world in {*AGAIN, *BFLOAT16}:
        run_ranks(train_again_and_in_bfloat16, world, folder / "data", folder / "runs", world, timeout=600)
    return folder / "runs"


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("longer"), [name for _, name in LAYOUTS])
    return folder, weights_of_all(folder, MANY_STEPS)


def check_parity(folder, weights, world, name, variant, steps):
    alone, together = (curve(folder / "runs" / layout / variant) for layout in ("single", name))
    assert [step for step, *_ in together] == list(range(1, steps + 1))
    for (step, loss, norm, _), (_, loss_alone, norm_alone, _) in zip(together, alone, strict=True):
        assert loss == pytest.approx(loss_alone, rel=1e-5), step  # float32 sums in another order
        assert norm == pytest.approx(norm_alone, rel=1e-4), step
        assert norm > EVERY_RUN["training.max_grad_norm"]
    for weight_name, weight in weights[1]["single", variant].items():
        torch.testing.assert_close(weights[world][name, variant][weight_name], weight, rtol=1e-5, atol=1e-5)


with_every_layout = pytest.mark.parametrize(("world", "name"), LAYOUTS[1:], ids=[name for _, name in LAYOUTS[1:]])


@pytest.mark.parametrize("variant", STEPS)
@with_every_layout
def test_a_layout_trains_as_a_single_process_does(folder, weights, world, name, variant):
    check_parity(folder, weights, world, name, variant, STEPS[variant])


@pytest.mark.slow
@pytest.mark.parametrize("variant", MANY_STEPS)
@with_every_layout
def test_so_it_does_for_twenty_steps_of_the_other_variants(longer, world, name, variant):
    check_parity(*longer, world, name, variant, MANY_STEPS[variant])


@pytest.mark.parametrize("name", [name for names in AGAIN.values() for name in names])
def test_a_layout_repeats_itself_bit_for_bit(others, name):
    assert curve(others / f"{name} again" / "mac") == curve(others / name / "mac")


@pytest.mark.parametrize("name", BFLOAT16[2])
def test_in_bfloat16_a_layout_stays_near_the_float32_curve(others, name):
    exact, rounded = (curve(others / run / "mac") for run in ("single", f"{name} bfloat16"))
    for (_, loss, norm, _), (_, loss_exact, norm_exact, _) in zip(rounded, exact, strict=True):
        assert loss == pytest.approx(loss_exact, rel=1e-2)
        assert norm == pytest.approx(norm_exact, rel=0.2)
    assert rounded != exact

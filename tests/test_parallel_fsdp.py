"""What `fully_shard` is made to do: reduce once a step, gather ahead, keep what is asked for."""

from functools import partial

import pytest
import torch
from distributed import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import small_config

from titans_scale.parallel import Mesh, build_engine, mesh_sizes
from titans_scale.training.optimizer import build_optimizer

LAYERS = 4


class Collectives(TorchDispatchMode):
    """Notes the names of collectives in the order in which they are issued."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace in ("c10d", "_c10d_functional"):
            self.seen.append(operator._schema.name.split("::")[1].strip("_"))
        return operator(*arguments, **(options or {}))


def note_collectives(cases):
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    seen = {}
    for name, changes in cases.items():
        config = small_config("data", "run", {"model.variant": "lmm", "model.num_layers": LAYERS, **changes})
        mesh = Mesh(mesh_sizes(config.parallelism, torch.distributed.get_world_size()), "cpu")
        engine = build_engine(config, mesh, torch.device("cpu"), partial(build_optimizer, config=config.optimizer))
        with Collectives() as collectives:
            for block in engine.model.blocks:
                block.register_forward_hook(lambda *_, noted=collectives.seen: noted.append("block"))
            for number in range(3):
                engine.backward(engine.model.loss_sum(tokens, tokens), last=number == 2)
        seen[name] = collectives.seen
    return seen


@pytest.fixture(scope="module")
def seen():
    cases = {
        "sharded": {},
        "kept": {"parallelism.reshard_after_forward": "false"},
        "one ahead": {"parallelism.prefetch": 1},
        "three ahead": {"parallelism.prefetch": 3},
        "replicas": {"parallelism.data_parallel_replicate": 2, "parallelism.data_parallel_shard": 1},
    }
    return run_ranks(note_collectives, 2, cases)[0]


def count(names, kind):
    return sum(kind in name for name in names)


@pytest.mark.parametrize("case", ["sharded", "kept"])
def test_gradients_of_three_micro_batches_are_reduced_once(seen, case):
    assert count(seen[case], "reduce_scatter") == LAYERS + 1  # a block each, and the root


def test_parameters_that_are_kept_are_gathered_once_a_step(seen):
    assert count(seen["kept"], "allgather") == LAYERS + 1
    assert count(seen["sharded"], "allgather") > 3 * LAYERS


def test_replicas_alone_sum_their_gradients_once(seen):
    assert count(seen["replicas"], "allreduce") == LAYERS + 1


@pytest.mark.parametrize(("case", "ahead"), [("one ahead", 1), ("three ahead", 3)])
def test_blocks_are_gathered_ahead_of_the_one_at_work(seen, case, ahead):
    before_first = seen[case][: seen[case].index("block")]
    assert count(before_first, "allgather") == 1 + 1 + ahead  # the root's, the first block's, and those ahead

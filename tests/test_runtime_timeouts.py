"""How long ranks wait for each other: in all groups of a run, and when."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from titans_scale.config import CommConfig, ConfigError
from titans_scale.parallel import DistributedContext, Mesh, MeshSizes
from titans_scale.parallel.context import FILES_TIMEOUT, LostRank, RunError

INIT, TRAIN = 60, 2
COMM = CommConfig(init_timeout_seconds=INIT, train_timeout_seconds=TRAIN)


def timeout_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout


def scenario():
    """Two replicas: timeouts of the default group, those of the mesh and that for files, at several moments; and a group that hangs."""
    context = DistributedContext(COMM, device="cpu")
    context._owns_group = True  # as it does where no test has made one
    mesh = Mesh(MeshSizes(replicate=2, shard=1), "cpu")
    of_mesh = mesh.fsdp["shard"].get_group(), mesh.fsdp["replicate"].get_group()
    groups = (dist.group.WORLD, *of_mesh, context.files_group)

    def timeouts():
        return [timeout_of(group).total_seconds() for group in groups]

    at = {"made": timeouts()}
    context.expect_slow_start()
    at["slow start"] = timeouts()
    context.expect_steady_pace()
    at["steady"] = timeouts()
    with context.unhurried():
        at["unhurried"] = timeouts()
    at["after"] = timeouts()
    alone = dist.new_group([0, 1], timeout=timedelta(seconds=INIT))
    context.expect_steady_pace()
    context.sum_on_host(0)
    seconds, said = 0.0, ""
    if context.is_main:
        start = time.monotonic()
        with pytest.raises(LostRank) as raised, context.naming_the_lost():
            dist.all_reduce(torch.zeros(1), group=alone)
        seconds, said = time.monotonic() - start, str(raised.value)
    else:
        time.sleep(2 * TRAIN)
    return at, seconds, said


@pytest.fixture(scope="module")
def results():
    return run_ranks(scenario, 2)


def test_the_groups_of_the_mesh_wait_as_long_as_the_whole_and_files_longer(results):
    files = FILES_TIMEOUT.total_seconds()
    for at, _, _ in results:
        assert at["made"] == [files] * 4  # torch's own default, of the tests' group as well
        assert at["slow start"] == at["unhurried"] == [INIT, INIT, INIT, files]
        assert at["steady"] == at["after"] == [TRAIN, TRAIN, TRAIN, files]


def test_a_group_that_was_made_with_more_patience_gives_up_when_the_whole_does(results):
    _, seconds, said = results[0]
    assert TRAIN <= seconds < 2 * TRAIN  # the other rank comes after that
    assert said.startswith("lost contact with the other ranks before the run began")  # no heartbeats here


def test_a_world_that_does_not_come_together_is_one_sentence(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    with pytest.raises(LostRank, match=r"2 ranks did not find each other within comm.init_timeout_seconds 1 s: "):
        DistributedContext(CommConfig(init_timeout_seconds=1), device="cpu")


@pytest.mark.parametrize("error", [ConfigError("wrong"), RunError("full"), RuntimeError("shape mismatch"), ValueError("bad")])
def test_errors_of_a_rank_itself_stay_what_they_are(error):
    context = DistributedContext(COMM, device="cpu")
    try:
        with pytest.raises(type(error), match=str(error)), context.naming_the_lost():
            raise error
    finally:
        context.destroy()

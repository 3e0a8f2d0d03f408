"""The environment, garbage collection, and the line that says what a run has chosen."""

import gc
import os
import re

import pytest
import torch
from training_runs import make_data, small_config

from titans_scale.parallel import MeshSizes
from titans_scale.parallel.runtime.environment import environment_of, set_environment, unset_environment
from titans_scale.parallel.runtime.whereabouts import read_beats
from titans_scale.training.garbage import ScheduledCollection
from titans_scale.training.reporting import Chosen, plan
from titans_scale.training.trainer import Trainer


def table(config):
    return {variable.name: variable.value for variable in environment_of(config)}


def test_the_flight_recorder_is_on_and_writes_into_the_run_s_folder(tmp_path):
    values = table(small_config(tmp_path, tmp_path / "run", {"comm.trace_collectives": 321}))
    assert values["TORCH_FR_BUFFER_SIZE"] == "321" and values["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert values["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/run/traces/nccl-rank-"
    values = table(small_config(tmp_path, tmp_path / "run", {"comm.trace_collectives": 0}))
    assert values["TORCH_FR_BUFFER_SIZE"] == values["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert "CUBLAS_WORKSPACE_CONFIG" not in values
    assert "CUBLAS_WORKSPACE_CONFIG" in table(small_config(tmp_path, tmp_path, {"training.deterministic": "true"}))


def test_what_the_user_has_set_stays_under_its_older_name_too(tmp_path, monkeypatch):
    for name in table(small_config(tmp_path, tmp_path)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    before = dict(os.environ)
    names = set_environment(small_config(tmp_path, tmp_path))
    assert os.environ["NCCL_DEBUG"] == "INFO" and "PYTORCH_ALLOC_CONF" not in os.environ
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "2000"
    unset_environment(names)
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", ["TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_ASYNC_ERROR_HANDLING"])
def test_this_torch_knows_the_variable(name):
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    if not os.path.exists(library):
        pytest.skip("torch's library lies elsewhere")
    with open(library, "rb") as file:
        assert name.encode() in file.read()


@pytest.fixture
def collections(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda *generation: collected.append(generation))
    return collected


def test_garbage_is_collected_at_set_steps_and_at_no_others(collections):
    with ScheduledCollection(3) as garbage:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        collections.clear()
        due = []
        for step in range(1, 10):
            before = len(collections)
            garbage.after_step(step)
            due += [step] if len(collections) > before else []
    assert due == [3, 6, 9]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_interval_0_leaves_python_alone(collections):
    with ScheduledCollection(0) as garbage:
        assert gc.isenabled()
        garbage.after_step(1)
    assert collections == []


def test_one_that_was_off_before_stays_off():
    gc.disable()
    try:
        with ScheduledCollection(1):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


class Machine:
    """As much of a DistributedContext as the line looks at."""

    device, backend, world_size = torch.device("cuda", 0), "nccl", 64


def test_the_line_says_what_was_chosen(tmp_path):
    changes = {"activation_checkpoint.mode": "selective", "compile.enabled": "true", "parallelism.reshard_after_forward": "false"}
    config = small_config(tmp_path, tmp_path / "run", {**changes, "training.global_batch_tokens": 8192, "model.variant": "lmm"})
    chosen = Chosen(precision="bfloat16", sizes=MeshSizes(replicate=2, shard=16, tensor=2), attention=None)
    line = plan(config, Machine(), chosen, 10)
    assert "\n" not in line and "attention" not in line
    for said in (
        f"{tmp_path}/run: lmm with ",
        " parameters in bfloat16 (gradients summed in float32) on 64 ranks (cuda, nccl, replicate 2 x shard 16 x tensor 2)",
        "8,192 tokens a step = 32 ranks * 4 micro-batches * 2 sequences * 32",
        f"engine fsdp2 of torch {torch.__version__}, parameters kept after forward, 1 blocks ahead",
        "memory online, chunks of 16, scan on torch",
        "blocks compiled",
        "activation checkpoints selective",
        "ranks wait 300 s in the first step and 100 s then",
        "steps 11 to 4",
    ):
        assert said in line, line


def test_a_run_says_it_in_one_line_and_leaves_the_process_as_it_was(tmp_path, capsys):
    data = make_data(tmp_path / "data", documents=10)
    before = dict(os.environ)
    Trainer(small_config(data, tmp_path / "run", {"training.steps": 1})).run()
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "attention on sdpa (" in line and "tokens a step" in line]) == 1
    assert [line for line in said if line.startswith("step: 1")] == said[1:2]
    assert dict(os.environ) == before and gc.isenabled() and gc.get_freeze_count() == 0
    assert [(beat.rank, beat.phase, beat.ended) for beat in read_beats(tmp_path / "run")] == [(0, "checkpoint", "finished")]
    assert re.fullmatch(r"[\w.-]+", read_beats(tmp_path / "run")[0].host)

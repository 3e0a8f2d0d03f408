"""The command line: what cannot work is one sentence on stderr and exit code 2, before anything is written."""

import os
import subprocess
import sys

import pytest
import torch
from training_runs import SEQUENCE_LENGTH, arguments, make_data

from titans_scale.train import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("cli") / "data", documents=10)


WRONG = {
    "no data": ({"data.path": "nowhere"}, "there are no token shards in nowhere"),
    "other length": ({"training.sequence_length": 64}, f"hold sequences of {SEQUENCE_LENGTH} tokens, training.sequence_length is 64"),
    "small vocabulary": ({"model.vocab_size": 100}, "a vocabulary of 257, model.vocab_size is 100"),
    "unknown key": ({"training.step": 3}, "did you mean 'training.steps'?"),
    "uneven heads": ({"model.num_heads": 3}, "model.dim 32 does not divide by model.num_heads 3"),
    "too many shards": ({"parallelism.data_parallel_shard": 2}, "data_parallel_shard 2 does not fit 1 rank"),
    "not a folder": ({"training.output_dir": "/dev/null/run"}, "Not a directory: /dev/null/run"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_work_is_one_sentence(data, tmp_path, capsys, wrong):
    changes, sentence = WRONG[wrong]
    assert main(arguments(data, tmp_path / "run", changes)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "run").exists()
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_asked_for_where_there_is_none_is_one_sentence(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path, {"training.device": "cuda"})) == 2
    assert "training.device is cuda, but torch" in capsys.readouterr().err


def test_it_trains_without_torchrun_and_with_tensorboard(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path, {"training.steps": 1, "metrics.tensorboard": "true"})) == 0
    output = capsys.readouterr().out
    assert "with 57,100 parameters in float32 on 1 rank (cpu, gloo, shard 1); 256 tokens a step" in output
    assert "step: 1  loss: " in output and "grad_norm: " in output and "tps: " in output and "mfu: " in output
    assert {path.name for path in tmp_path.iterdir()} >= {"checkpoint", "config.yaml", "metrics.jsonl", "tensorboard"}
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_under_torchrun_one_rank_speaks_and_is_heard(data, tmp_path):
    """The ranks fail at the same moment; torchrun ends them all at the first that is gone, which must not be before the sentence."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "titans_scale.train"]
    wrong = arguments(data, tmp_path, {"training.global_batch_tokens": 3 * SEQUENCE_LENGTH, "training.micro_batch_size": 1})
    result = subprocess.run([*command, *wrong], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert said == [
        f"error: training.global_batch_tokens {3 * SEQUENCE_LENGTH} is not a multiple of sequence_length {SEQUENCE_LENGTH}"
        f" * micro_batch_size 1 * 2 ranks = {2 * SEQUENCE_LENGTH}; the nearest that is: {4 * SEQUENCE_LENGTH}"
    ]

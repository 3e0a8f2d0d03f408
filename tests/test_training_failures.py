"""What goes wrong in the middle of a run ends it on all ranks with one sentence, and the last good checkpoint stays."""

import errno
import os
import re
import resource
import shutil
import signal

import pytest
import torch
from distributed import run_ranks
from training_runs import make_data, records, small_config

from titans_scale.config import ConfigError
from titans_scale.parallel.context import RunError
from titans_scale.training.checkpoint_folder import CheckpointFolder
from titans_scale.training.metrics import JsonLines
from titans_scale.training.trainer import Trainer

RUN = {"training.steps": 3, "checkpoint.interval": 1, "checkpoint.keep_last": 0}
SMALLER_THAN_A_CHECKPOINT = 50_000


class FullDisk(Trainer):
    """From step 2 on, rank 1 cannot write a file of more than a few bytes: the write itself fails, as it does on a full disk."""

    def train_step(self, micro_batches, target_tokens):
        result = super().train_step(micro_batches, target_tokens)
        if self.step == 2 and self.context.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLER_THAN_A_CHECKPOINT, resource.RLIM_INFINITY))
        return result


class LostNumbers(Trainer):
    """After step 2 a weight of rank 1 is no number any more."""

    def train_step(self, micro_batches, target_tokens):
        result = super().train_step(micro_batches, target_tokens)
        if self.step == 2 and self.context.rank == 1:
            with torch.no_grad():
                next(self.model.blocks.parameters()).to_local().fill_(float("nan"))
        return result


class KilledInSave(Trainer):
    """The second checkpoint is all written, and the process is gone before it gets its name."""

    def save(self, report):
        if self.step == 2:
            self.checkpoints.folder.commit = lambda step, entries: os.kill(os.getpid(), signal.SIGKILL)
        super().save(report)


def sentence_of(trainer):
    with pytest.raises(RunError) as raised:
        trainer.run()
    return str(raised.value)


def fail_with(error):
    def failing(*arguments):
        raise error

    return failing


def scenario(data, folder):
    rank = torch.distributed.get_rank()
    said = {"full disk": sentence_of(FullDisk(small_config(data, folder / "full disk", RUN)))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rank == 0:
            monkeypatch.setattr(JsonLines, "write", fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")))
        said["no room for metrics"] = sentence_of(Trainer(small_config(data, folder / "metrics", RUN)))
        said["no room at the end"] = sentence_of(Trainer(small_config(data, folder / "last", {**RUN, "training.steps": 1})))
    own = shutil.copytree(data, folder / f"data of rank {rank}")
    trainer = Trainer(small_config(own, folder / "data lost", {**RUN, "data.num_workers": 1}))
    if rank == 1:
        os.truncate(own / "train" / "000000.tar", 1)
    said["data lost"] = sentence_of(trainer)
    again = shutil.copytree(data, folder / "validation" / f"data of rank {rank}")
    trainer = Trainer(small_config(again, folder / "validation lost", {**RUN, "eval.interval": 1, "data.retries": 0}))
    if rank == 1:
        os.truncate(again / "validation" / "000000.tar", 1)
    said["validation lost"] = sentence_of(trainer)
    other = make_data(folder / f"other data of rank {rank}", documents=30 + rank)
    with pytest.raises(ConfigError) as raised:
        Trainer(small_config(other, folder / "other data", RUN))
    said["other data"] = str(raised.value)
    said["weights not finite"] = sentence_of(LostNumbers(small_config(data, folder / "weights", RUN)))
    said["loss not finite"] = sentence_of(LostNumbers(small_config(data, folder / "loss", {**RUN, "checkpoint.interval": 0})))
    LostNumbers(small_config(data, folder / "going on", {**RUN, "stability.stop_on_nonfinite": "false"})).run()
    return said


def killed_in_save(data, output):
    KilledInSave(small_config(data, output, RUN)).run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def said(folder):
    return run_ranks(scenario, 2, make_data(folder / "data"), folder)


def entries(run):
    return sorted(path.name for path in (run / "checkpoint").iterdir())


def test_a_full_disk_on_one_rank_is_one_sentence_on_all_and_leaves_the_last_checkpoint(said, folder):
    for of_rank in said:
        assert "could not save" in of_rank["full disk"] and "step-2: rank 1: File too large" in of_rank["full disk"]
        assert f"the newest whole checkpoint is {folder / 'full disk' / 'checkpoint' / 'step-1'}" in of_rank["full disk"]
    assert entries(folder / "full disk") == ["step-1"]
    assert CheckpointFolder(folder / "full disk" / "checkpoint").newest_whole() == (1, [])


def test_metrics_that_cannot_be_written_end_the_run_on_all_ranks(said):
    for when in ("no room for metrics", "no room at the end"):
        assert {of_rank[when] for of_rank in said} == {"No space left on device: metrics.jsonl"}


def test_data_that_cannot_be_read_on_one_rank_is_told_on_all(said):
    for of_rank in said:
        assert re.fullmatch(
            r"rank 1: sample \d+ cannot be read: shard .*/data of rank 1/train/000000.tar ends inside sample \d+; .* data.on_error skip",
            of_rank["data lost"],
        )
        assert re.match(r"rank 1: sample \d+ cannot be read: shard .*/data of rank 1/validation/000000.tar", of_rank["validation lost"])
        assert re.match(r"rank 1 reads other data than rank 0 \(num_samples \d+ -> \d+, fingerprint", of_rank["other data"])


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_step_and_the_last_good_checkpoint(said, folder):
    for of_rank in said:
        assert "weights after step 2 are not finite" in of_rank["weights not finite"]
        assert "gradient norm of step 3 is not finite" in of_rank["loss not finite"]
        assert str(folder / "weights" / "checkpoint" / "step-1") in of_rank["weights not finite"]
        assert "there is no checkpoint yet" in of_rank["loss not finite"]
    assert entries(folder / "weights") == ["step-1"]


def test_weights_that_are_not_finite_are_never_saved_even_if_the_run_goes_on(said, folder):
    assert entries(folder / "going on") == ["step-1"]
    assert records(folder / "going on")[-1]["loss_metrics/global_avg_loss"] is None


def test_a_process_killed_in_a_save_leaves_the_checkpoint_before_it(tmp_path):
    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    with pytest.raises(AssertionError, match="ended without a result"):
        run_ranks(killed_in_save, 1, data, run)
    assert entries(run) == [".step-2.incomplete", "step-1"]
    Trainer(small_config(data, run, RUN)).run()
    assert entries(run) == ["step-1", "step-2", "step-3"]
    assert [record["step"] for record in records(run)] == [1, 2, 3]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    data = make_data(tmp_path / "data", documents=10)
    first = Trainer(small_config(data, tmp_path / "run", RUN))
    with pytest.raises(RunError, match="another run is writing to"):
        Trainer(small_config(data, tmp_path / "run", RUN))
    first.close()
    Trainer(small_config(data, tmp_path / "run", RUN)).close()

"""A run that was broken off and resumed is the run that never was; and what may not be resumed is said."""

import contextlib
import io
import json
import shutil
import signal

import pytest
import torch
from distributed import run_ranks
from training_runs import curve, make_data, records, small_config

from titans_scale.config import ConfigError
from titans_scale.parallel.context import RunError
from titans_scale.training.checkpoint import load_model_for_inference
from titans_scale.training.trainer import Trainer

RUN = {"training.steps": 5, "checkpoint.interval": 2, "checkpoint.keep_last": 2}


class Crash(Exception):
    pass


class StoppedAfterStep3(Trainer):
    """Rank 1 alone gets a signal."""

    def train_step(self, micro_batches, target_tokens):
        result = super().train_step(micro_batches, target_tokens)
        if self.step == 3 and self.context.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return result


class CrashedAfterStep3(Trainer):
    def next_global_batch(self, *arguments):
        if self.step == 3:
            raise Crash
        return super().next_global_batch(*arguments)


def output_of(trainer, config):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        trainer(config).run()
    return output.getvalue()


def sentence_of(config):
    with pytest.raises((RunError, ConfigError)) as raised:
        Trainer(config).run()
    return str(raised.value)


def spoil(run, checkpoint, rank):
    """Change one byte in the middle of a checkpoint's file."""
    torch.distributed.barrier()
    if rank == 0:
        file = run / "checkpoint" / checkpoint / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    torch.distributed.barrier()


def scenario(data, folder):
    rank = torch.distributed.get_rank()
    said = {"uninterrupted": output_of(Trainer, small_config(data, folder / "uninterrupted", RUN))}

    stopped = small_config(data, folder / "stopped", RUN)
    said["stopped"] = output_of(StoppedAfterStep3, stopped)
    said["gone on"] = output_of(Trainer, stopped)

    crashed = small_config(data, folder / "crashed", {**RUN, "data.num_workers": 1})
    with contextlib.suppress(Crash):
        CrashedAfterStep3(crashed).run()
    said["after the crash"] = output_of(Trainer, crashed)

    said["already done"] = output_of(Trainer, stopped)
    said["other model"] = sentence_of(small_config(data, folder / "stopped", {**RUN, "model.dim": 64, "data.seed": 3}))
    said["not to be resumed"] = sentence_of(small_config(data, folder / "stopped", {**RUN, "checkpoint.resume": "false"}))
    said["two more"] = output_of(Trainer, small_config(data, folder / "stopped", {**RUN, "training.steps": 7, "checkpoint.keep_last": 0}))

    spoil(folder / "crashed", "step-5", rank)
    said["newest spoilt"] = output_of(Trainer, crashed)
    spoil(folder / "crashed", "step-5", rank)
    spoil(folder / "crashed", "step-4", rank)
    said["all spoilt"] = sentence_of(crashed)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def said(folder):
    return run_ranks(scenario, 2, make_data(folder / "data"), folder)[0]


@pytest.mark.parametrize("run", ["stopped", "crashed"])
def test_broken_off_and_resumed_is_the_same_curve_bit_for_bit(said, folder, run):
    assert curve(folder / run)[:5] == curve(folder / "uninterrupted")
    model, _ = load_model_for_inference(folder / "uninterrupted" / "checkpoint" / "step-5")
    again, _ = load_model_for_inference(folder / run / "checkpoint" / "step-5")
    for (name, weight), (_, weight_again) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(weight, weight_again), name


def test_a_signal_to_one_rank_stops_all_and_says_how_to_go_on(said):
    assert "stopped by a signal to another rank at step 3; saved in" in said["stopped"]
    assert "step-3, run the same command again to go on" in said["stopped"]
    assert "resumed from" in said["gone on"] and "step: 4" in said["gone on"] and "step: 3 " not in said["gone on"]


def test_steps_taken_twice_are_recorded_once(said, folder):
    assert "step: 3 " in said["after the crash"]
    assert [record["step"] for record in records(folder / "crashed")] == [1, 2, 3, 4, 5]


def test_only_the_last_checkpoints_are_kept(said, folder):
    assert sorted(path.name for path in (folder / "uninterrupted" / "checkpoint").iterdir()) == ["step-4", "step-5"]


def test_a_finished_run_says_so(said):
    assert "nothing left to do" in said["already done"] and "step-5" in said["already done"]
    assert "steps 6 to 5" not in said["already done"]


def test_another_model_is_refused_naming_each_key_with_both_values(said):
    assert "model.dim is 64 here and 32 there" in said["other model"]
    assert "data.seed is 3 here and 0 there" in said["other model"]


def test_an_existing_run_is_not_written_over_when_resume_is_off(said):
    assert "checkpoint.resume is false" in said["not to be resumed"]


def test_a_change_that_does_no_harm_is_told(said):
    assert "settings that changed since" in said["two more"] and "training.steps 5 -> 7, checkpoint.keep_last 2 -> 0" in said["two more"]
    assert "step: 7" in said["two more"]


def test_a_damaged_checkpoint_is_passed_over_and_written_again(said, folder):
    assert "step-5 is damaged (the contents of __1_0.distcp have changed" in said["newest spoilt"]
    assert "resumed from" in said["newest spoilt"] and "done: step 5" in said["newest spoilt"]


def test_with_no_whole_checkpoint_left_the_run_does_not_start_over(said):
    assert "no whole checkpoint is left" in said["all spoilt"]


def test_a_checkpoint_is_whole_with_its_config_and_a_manifest_of_its_files(said, folder):
    checkpoint = folder / "uninterrupted" / "checkpoint" / "step-5"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert set(manifest["files"]) == {".metadata", "__0_0.distcp", "__1_0.distcp", "config.yaml"}


def test_what_a_killed_save_left_is_neither_loaded_nor_kept(said, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "uninterrupted", run)
    (run / "checkpoint" / "step-5").rename(run / "checkpoint" / ".step-5.incomplete")
    shutil.copytree(run / "checkpoint" / "step-4", run / "checkpoint" / "step-9")
    (run / "checkpoint" / "step-9" / "__0_0.distcp").unlink()
    with pytest.raises(ConfigError, match="step-9 is not a whole checkpoint"):
        load_model_for_inference(run / "checkpoint" / "step-9")
    output = output_of(Trainer, small_config(folder / "data", run, RUN))
    assert "step-9 is damaged (__0_0.distcp is missing)" in output and "resumed from" in output and "step-4" in output
    assert not (run / "checkpoint" / ".step-5.incomplete").exists()


def test_two_ranks_may_become_one(said, folder, tmp_path):
    """The curve is the same up to the order of float32 sums."""
    run = tmp_path / "run"
    shutil.copytree(folder / "uninterrupted", run)
    shutil.rmtree(run / "checkpoint" / "step-5")
    Trainer(small_config(folder / "data", run, RUN)).run()
    assert curve(run)[-1][1] == pytest.approx(curve(folder / "uninterrupted")[-1][1], rel=1e-5)

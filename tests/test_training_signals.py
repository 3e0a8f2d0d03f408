"""Asked to stop, a run saves first: with real signals to a real torchrun, and press by press for the handler."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from training_runs import arguments, curve, make_data

from titans_scale.training import signals
from titans_scale.training.checkpoint_folder import CheckpointFolder
from titans_scale.training.signals import FORCED_EXIT, StopSignals

TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "titans_scale.train"]
ENDLESS = {"training.steps": 100_000, "data.num_workers": 1}
PATIENCE_SECONDS = 90


def start(data, output):
    """torchrun in a process group of its own, as a terminal would start it, once it has taken three steps."""
    process = subprocess.Popen(
        [*TWO_RANKS, *arguments(data, output, ENDLESS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step: 3 "):
            return process
    raise AssertionError("the run ended before its third step:\n" + "".join(lines))


def end_of(process):
    try:
        return process.communicate(timeout=PATIENCE_SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("signals") / "data")


def saved_step(output, folder):
    found = re.search(r"stopped by (\w+) at step (\d+); saved in .*/step-\2, run the same command again to go on", output)
    assert found, output
    assert CheckpointFolder(folder / "checkpoint").newest_whole() == (int(found[2]), [])
    return found[1], int(found[2])


def test_a_sigterm_to_torchrun_saves_on_all_ranks(data, tmp_path):
    process = start(data, tmp_path)
    process.send_signal(signal.SIGTERM)
    name, step = saved_step(end_of(process), tmp_path)
    assert name == "SIGTERM" and step >= 3


def test_ctrl_c_twice_under_torchrun_saves_on_all_ranks(data, tmp_path):
    process = start(data, tmp_path)
    for _ in range(2):  # at the second, torchrun turns to SIGTERM
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
    name, step = saved_step(end_of(process), tmp_path)
    assert name == "SIGINT"
    assert [record[0] for record in curve(tmp_path)] == list(range(1, step + 1))


def test_a_second_ctrl_c_changes_nothing_and_a_third_ends_the_process(monkeypatch):
    clock, exits = [0.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(signals.os, "_exit", exits.append)
    with StopSignals(speaks=False) as stop:
        for _ in range(2):  # the terminal's, and torchrun's right after it
            signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"
        clock[0] = 5.0
        signal.raise_signal(signal.SIGINT)
        assert exits == []
        clock[0] = 9.0
        signal.raise_signal(signal.SIGINT)
        assert exits == [FORCED_EXIT]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_every_stop_signal_is_noted_and_the_handlers_before_come_back(number):
    before = signal.getsignal(number)
    with StopSignals(speaks=False) as stop:
        assert stop.received is None
        signal.raise_signal(number)
    assert stop.received == signal.Signals(number).name
    assert signal.getsignal(number) is before

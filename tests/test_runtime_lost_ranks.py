"""A rank that dies, stands still or hangs is named: in a real torchrun, by one sentence, and by tools/hang_report.py afterwards."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import SEQUENCE_LENGTH, arguments, make_data

from titans_scale.evaluation.hang_report import report_of_run
from titans_scale.parallel.runtime.whereabouts import read_beats
from titans_scale.train import LOST_RANK

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
PATIENCE_SECONDS = 5
"""comm.train_timeout_seconds of the runs."""
RUN = {
    "training.steps": 100_000,
    "training.global_batch_tokens": 6 * SEQUENCE_LENGTH,
    "training.micro_batch_size": 1,
    "metrics.log_interval": 1000,
    "comm.train_timeout_seconds": PATIENCE_SECONDS,
}
HANGING = """
import os, sys, time
from titans_scale.train import main
from titans_scale.training.trainer import Trainer

train_step = Trainer.train_step

def step_that_hangs(self, micro_batches, target_tokens):
    while self.context.rank == 1 and self.step == 3:
        time.sleep(1)
    return train_step(self, micro_batches, target_tokens)

Trainer.train_step = step_that_hangs
sys.exit(main())
"""
"""Rank 1 comes to step 4 and never to its first collective."""


class Run:
    """torchrun on some ranks, from its start to their third step."""

    def __init__(self, data, folder, program, *, ranks):
        self.folder = folder
        self.torchrun = subprocess.Popen(
            [*TORCHRUN, str(ranks), *program, *arguments(data, folder, RUN)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        while len(beats := read_beats(folder)) < ranks or min(beat.step for beat in beats) < 3:
            assert self.torchrun.poll() is None, self.torchrun.communicate()[1]
            time.sleep(0.1)
        self.pids = [beat.pid for beat in beats]

    def send(self, rank, number):
        """A signal to a rank; returns the time."""
        os.kill(self.pids[rank], number)
        return time.monotonic()

    def wait_for_the_end_of(self, ranks):
        while any(is_running(self.pids[rank]) for rank in ranks):
            time.sleep(0.05)
        return time.monotonic()

    def said(self):
        """What the ranks said on stderr, without torchrun's own report, and the exit codes in that."""
        error = self.torchrun.communicate(timeout=60)[1]
        lines = [line for line in error.splitlines() if re.match(r"error: |rank \d+ on ", line)]
        assert self.torchrun.returncode != 0
        return lines, re.findall(r"rank      : (\d).*\n  exitcode  : (-?\d+)", error), error


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("lost") / "data")


def test_a_rank_that_is_killed_is_named_at_once_in_one_sentence(data, tmp_path):
    run = Run(data, tmp_path, ["-m", "titans_scale.train"], ranks=3)
    killed = run.send(1, signal.SIGKILL)
    seconds = run.wait_for_the_end_of([0, 2]) - killed
    lines, codes, error = run.said()
    assert seconds < 2 * PATIENCE_SECONDS, error
    assert len(lines) == 1, error  # and none of a rank that had waited long enough to tell
    assert re.match(
        rf"error: rank 1 on \S+ is gone; its last heartbeat, \d+ s ago, was in \w+ of step \d+; tools/hang_report.py {tmp_path}", lines[0]
    )
    assert ("1", "-9") in codes and {code for rank, code in codes if rank != "1"} <= {str(LOST_RANK), "-15"}  # or torchrun was faster
    report = report_of_run(tmp_path)
    assert [re.match(r"rank 1 on \S+ is gone", sentence) is not None for sentence in report.at_fault] == [True]
    assert report.waits and all(1 in wait.missing and wait.waiting for wait in report.waits)


def test_a_rank_that_is_stopped_is_named_before_the_others_give_up(data, tmp_path):
    run = Run(data, tmp_path, ["-m", "titans_scale.train"], ranks=2)
    stopped = run.send(1, signal.SIGSTOP)
    seconds = run.wait_for_the_end_of([0]) - stopped
    run.send(1, signal.SIGKILL)
    lines, _, error = run.said()
    assert 0.8 * PATIENCE_SECONDS < seconds < 4 * PATIENCE_SECONDS, error
    assert len(lines) == 2, error
    assert re.match(r"rank 0 on \S+: no progress for \d s, in \w+ of step \d+; rank 1 on \S+ is stopped", lines[0])
    assert re.match(r"error: rank 1 on \S+ is stopped \(process \d+\); its last heartbeat, \d+ s ago, was in \w+ of step \d+", lines[1])
    assert re.search(r"MainThread\n(.*\n)+.*in (backward|loss_sum|sum_on_host)", (tmp_path / "traces" / "rank-0.txt").read_text())


def test_a_rank_that_hangs_names_itself_and_where_it_stands(data, tmp_path):
    program = tmp_path / "hanging.py"
    program.write_text(HANGING)
    run = Run(data, tmp_path / "run", [str(program)], ranks=2)
    while not (tmp_path / "run" / "traces" / "alarm").exists():
        time.sleep(0.1)
    alive = report_of_run(tmp_path / "run")
    assert [rank.condition for rank in alive.ranks][1] == "running"
    run.wait_for_the_end_of([0])
    run.send(1, signal.SIGKILL)
    lines, _, error = run.said()
    stacks = f"its stacks are in {tmp_path / 'run' / 'traces' / 'rank-1.txt'}"
    *early, last = lines
    assert early, error
    itself, the_other = r"rank 1 on \S+: no progress for \d s, in agreement", r"rank 0 on .* rank 1 on \S+ has been in agreement"
    for line in early:  # whichever looked at its clock first, or both at once
        assert re.match(rf"({itself}|{the_other}) of step 4", line), error
    assert re.match(rf"error: rank 1 on \S+ has been in agreement of step 4 for \d+ s; {stacks}; ", last), error
    assert "step_that_hangs" in (tmp_path / "run" / "traces" / "rank-1.txt").read_text()
    report = json.loads(json.dumps(report_of_run(tmp_path / "run").as_json()))
    assert re.match(r"rank 1 on ", report["at_fault"][0])
    assert {"waiting": [0], "missing": [1]} in [{key: wait[key] for key in ("waiting", "missing")} for wait in report["waits"]]

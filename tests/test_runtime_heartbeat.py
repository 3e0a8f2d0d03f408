"""Heartbeats tell who is at fault; a rank that stands too long says so, and nobody says so too early."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
from test_tools import tool

from titans_scale.evaluation.hang_report import report_of_run
from titans_scale.parallel.context import FILES_TIMEOUT, SLOW_PHASES
from titans_scale.parallel.runtime import heartbeat
from titans_scale.parallel.runtime.heartbeat import Heartbeat
from titans_scale.parallel.runtime.traces import alarm_of, raise_alarm
from titans_scale.parallel.runtime.whereabouts import Beat, faults, read_beats, remove_beats, sentence_of_fault, write_beat

NOW = 1_000_000.0


def beat(rank, **changes):
    """A rank on a machine that is not this one, well, in the middle of step 5."""
    usual = {"host": "far", "pid": 1, "interval": 5.0, "started": NOW - 900, "alive": NOW, "phase": "backward", "step": 5}
    return Beat(**{"rank": rank, "world_size": 4, "since": NOW - 90, "passed": 40, "collectives": 70, **usual, **changes})


def others(*, without, **changes):
    return [beat(rank, **changes) for rank in range(4) if rank != without]


FAULTS = {
    "no sign of life": ({"alive": NOW - 13}, "silent"),
    "a milestone behind": ({"passed": 39}, "behind"),
    "a collective behind": ({"collectives": 69}, "behind"),
    "an error of its own": ({"ended": "the GPU's memory is full"}, "ended"),
    "an error of its own, long ago": ({"ended": "the GPU's memory is full", "alive": NOW - 60, "passed": 39}, "ended"),
}


@pytest.mark.parametrize("changes, fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("bereft", [False, True])
def test_the_rank_at_fault_is_found(changes, fault, bereft):
    """Whether the others still wait or have given up."""
    given_up = {"ended": "lost the others", "bereft": True} if bereft else {}
    beats = sorted([*others(without=2, **given_up), beat(2, **changes)], key=lambda beat: beat.rank)
    assert [(found.rank, kind) for found, kind in faults(beats)] == [(2, fault)]


def test_ranks_at_the_same_place_are_not_at_fault():
    assert faults([beat(rank) for rank in range(4)]) == []
    assert faults([beat(rank, alive=NOW - rank * 4) for rank in range(4)]) == []  # beats come every 5 s
    assert faults([beat(rank, ended="finished") for rank in range(4)]) == []


def test_of_a_run_that_was_killed_as_a_whole_the_one_that_had_stopped_before_is_found():
    import socket

    gone = {"host": socket.gethostname(), "pid": 2**22 + 1}  # above the largest number that Linux gives
    beats = [*others(without=1, **gone), beat(1, alive=NOW - 60, **gone)]
    assert [(found.rank, kind) for found, kind in faults(beats)] == [(1, "silent")]


def test_processes_of_this_machine_are_looked_at(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        mine = dataclasses.replace(beat(3), host=os.uname().nodename, pid=sleeper.pid)
        assert faults([*others(without=3), mine]) == []
        os.kill(sleeper.pid, 19)
        time.sleep(0.2)
        assert [kind for _, kind in faults([*others(without=3), mine])] == ["stopped"]
    finally:
        sleeper.kill()
    time.sleep(0.2)  # dead and not yet waited for
    assert [kind for _, kind in faults([*others(without=3), mine])] == ["gone"]


def test_the_sentence_says_since_when_and_where_the_stacks_are(tmp_path):
    silent = beat(2, step=41, alive=NOW - 103)
    assert sentence_of_fault(silent, "silent", tmp_path, NOW) == "rank 2 on far has not been heard of since backward of step 41, 103 s ago"
    (tmp_path / "traces").mkdir()
    stacks = tmp_path / "traces" / "rank-2.txt"
    stacks.write_text("")
    os.utime(stacks, (NOW - 1000, NOW - 1000))
    assert "stacks" not in sentence_of_fault(silent, "silent", tmp_path, NOW)  # those are of an earlier run
    os.utime(stacks, (NOW, NOW))
    assert sentence_of_fault(silent, "silent", tmp_path, NOW).endswith(f"; its stacks are in {stacks}")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "SHORTEST_BEAT", 0.02)


def started(run, patience):
    return Heartbeat(run, rank=0, world_size=2, patience=lambda phase: patience.get(phase), shortest_patience=0.4)


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_that_stands_longer_than_its_patience_says_so_once_and_leaves_its_stacks(tmp_path, quick, capfd):
    pulse = started(tmp_path, {"forward": 0.4})
    pulse.enter("forward", 7)
    until((tmp_path / "traces" / "rank-0.json").exists)
    time.sleep(0.5)
    pulse.close("finished")
    said = capfd.readouterr().err.splitlines()
    assert (
        len(said) == 1 and said[0].startswith("rank 0 on ") and ": no progress for 0 s, in forward of step 7; its stacks are in" in said[0]
    )
    assert "test_a_rank_that_stands_longer" in (tmp_path / "traces" / "rank-0.txt").read_text()
    assert [(beat.phase, beat.step, beat.ended) for beat in read_beats(tmp_path)] == [("forward", 7, "finished")]


def test_a_rank_that_moves_or_may_take_its_time_says_nothing(tmp_path, quick, capfd):
    pulse = started(tmp_path, {"forward": 1.0, "checkpoint": 1000.0})
    for step in range(20):
        pulse.enter("forward", step)
        time.sleep(0.1)
    pulse.enter("checkpoint", 20)
    time.sleep(1.5)
    pulse.close("finished")
    assert capfd.readouterr().err == ""
    assert alarm_of(tmp_path) == 0


def test_saving_and_loading_have_the_patience_of_files():
    assert set(SLOW_PHASES) == {"loading", "checkpoint"}
    assert FILES_TIMEOUT.total_seconds() == 1800


def test_a_rank_that_lost_the_others_waits_until_it_knows_which_is_silent(tmp_path, quick):
    """Rank 1, on another machine, has just been heard of; it takes two and a half beats to know that it is gone."""
    pulse = started(tmp_path, {})
    now = time.time()
    write_beat(tmp_path, beat(1, started=now - 900, alive=now, since=now, interval=0.4, passed=0, collectives=0))
    pulse._interval = 0.4
    found = pulse.lose_others(RuntimeError("Connection closed by peer"))
    waited = time.time() - now
    pulse.close("finished")
    assert [(beat.rank, fault) for beat, fault in found] == [(1, "silent")]
    assert waited >= 1.0
    assert next((beat.ended, beat.bereft) for beat in read_beats(tmp_path)) == ("lost the others", True)
    assert "Connection closed by peer" in (tmp_path / "traces" / "rank-0.txt").read_text()


def test_an_alarm_makes_every_rank_leave_its_traces(tmp_path, quick):
    pulse = started(tmp_path, {})
    pulse.enter("data", 3)
    assert not (tmp_path / "traces" / "rank-0.json").exists()
    report = report_of_run(tmp_path)  # the tool raises it: this rank lives
    assert "test_an_alarm_makes" in (tmp_path / "traces" / "rank-0.txt").read_text()
    assert [(rank.phase, rank.step, rank.condition) for rank in report.ranks] == [("data", 3, "running")]
    pulse.close("finished")


@pytest.mark.parametrize("by, lines", [("rank", 0), ("user", 1)])
def test_where_another_rank_has_told_already_this_one_only_leaves_its_traces(by, lines, tmp_path, quick, capfd):
    pulse = started(tmp_path, {"forward": 0.6})
    pulse.enter("forward", 7)
    time.sleep(0.1)
    raise_alarm(tmp_path, by=by)
    time.sleep(1.0)
    pulse.close("finished")
    assert (tmp_path / "traces" / "rank-0.txt").exists()
    assert len(capfd.readouterr().err.splitlines()) == lines


def test_an_alarm_of_an_earlier_run_is_over(tmp_path, quick):
    raise_alarm(tmp_path, by="rank")
    pulse = started(tmp_path, {})
    time.sleep(0.3)
    pulse.close("finished")
    assert not (tmp_path / "traces" / "rank-0.json").exists()


def test_heartbeats_of_an_earlier_run_with_more_ranks_are_removed(tmp_path):
    (tmp_path / "ranks").mkdir()
    for rank in range(3):
        write_beat(tmp_path, beat(rank))
    (tmp_path / "ranks" / "rank-3.json").write_text('{"rank": 3')  # cut off: passed over
    assert [beat.rank for beat in read_beats(tmp_path)] == [0, 1, 2]
    remove_beats(tmp_path)
    assert list((tmp_path / "ranks").iterdir()) == []


def trace(rank, *, number, over, **changes):
    collective = {"operation": "gloo:all_reduce", "group": "1", "is": "mesh_shard", "number": number, "between_two": False, "sizes": [[8]]}
    entry = {**collective, "dtypes": ["Float"], "begun": NOW, "over": over, "from": "model.py:1 forward"}
    groups = {"1": {"is": "mesh_shard", "ranks": [0, 1, 2, 3]}}
    return {"rank": rank, "time": NOW, "reason": "", "at": "model.py:1 forward", "groups": groups, "collectives": [entry], **changes}


@pytest.fixture
def hung(tmp_path):
    """Ranks 0, 1 and 3 are in all_reduce 71, rank 2 has come to 70; its machine does not answer."""
    (tmp_path / "ranks").mkdir()
    (tmp_path / "traces").mkdir()
    for rank in range(4):
        write_beat(tmp_path, beat(rank, alive=NOW - 60 if rank == 2 else NOW))
        left = trace(rank, number=70, over=True) if rank == 2 else trace(rank, number=71, over=False)
        (tmp_path / "traces" / f"rank-{rank}.json").write_text(json.dumps(left))
    return tmp_path


def test_the_report_tells_who_waits_for_whom(hung, capsys):
    assert tool("hang_report")([hung]) == 0
    shown = capsys.readouterr().out
    assert "rank 2 on far: backward of step 5 for 90 s, silent" in shown
    assert "    last gloo:all_reduce 71 of mesh_shard on [[8]], not over, from model.py:1 forward" in shown
    assert "gloo:all_reduce 71 of mesh_shard of ranks 0-3, on [[8]]: 0-1, 3 in it, 2 missing" in shown
    assert shown.splitlines()[-1] == "rank 2 on far has not been heard of since backward of step 5, 60 s ago"


def test_the_report_as_json(hung, capsys):
    assert tool("hang_report")([hung, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(wait["waiting"], wait["missing"]) for wait in report["waits"]] == [([0, 1, 3], [2])]
    assert [rank["condition"] for rank in report["ranks"]] == ["running", "running", "silent", "running"]


def test_traces_of_an_earlier_run_do_not_count(hung):
    left = trace(0, number=71, over=False, time=NOW - 10_000)
    (hung / "traces" / "rank-0.json").write_text(json.dumps(left))
    assert [wait.waiting for wait in report_of_run(hung).waits] == [[1, 3]]


def test_the_tool_explains_its_options(capsys):
    with pytest.raises(SystemExit):
        tool("hang_report")(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--json print JSON" in shown and "run folder of the run (training.output_dir)" in shown


def test_a_folder_without_heartbeats_is_one_sentence(tmp_path, capsys):
    assert tool("hang_report")([tmp_path]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hang_report: no run has left heartbeats in ") and error.count("\n") == 1

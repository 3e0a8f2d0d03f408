"""A rank's heartbeat: a file that says where it stands, written by a thread that also notices when it stands too long.

The main thread only notes a milestone (an assignment); nothing here waits for other ranks or for the GPU, whose queue the host may be
ahead of.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from titans_scale.parallel.runtime.traces import a_rank_raised_alarm, alarm_of, collectives_begun, raise_alarm, traces_folder, write_traces
from titans_scale.parallel.runtime.whereabouts import (
    SILENT_BEATS,
    Beat,
    Fault,
    beats_folder,
    faults,
    read_beats,
    sentence_of_fault,
    write_beat,
)

Phase = Literal["building", "loading", "data", "agreement", "forward", "backward", "optimizer", "validation", "log", "checkpoint"]

SHARE_OF_PATIENCE = 0.8
"""Of the time that ranks wait for each other: after so much of it a rank tells that it stands, before the process group gives up."""
SHORTEST_BEAT, LONGEST_BEAT = 0.5, 5.0
"""Seconds between two beats, a twentieth of the shortest time-out: often enough to see who stopped first, seldom enough for a shared
file system with hundreds of ranks."""


class Heartbeat:
    """Says where this rank stands, until `close`.

    Args:
        run: folder of the run, the same on all ranks.
        patience: seconds that others wait for this rank in a phase, as things are now; None: there are no others.
        shortest_patience: of those there will be.
    """

    def __init__(
        self, run: Path, *, rank: int, world_size: int, patience: Callable[[Phase], float | None], shortest_patience: float
    ) -> None:
        self._run = run
        self._rank = rank
        self._world_size = world_size
        self._patience = patience
        self._interval = min(max(shortest_patience / 20, SHORTEST_BEAT), LONGEST_BEAT)
        self._started = time.time()
        self._at: tuple[Phase, int, float, int] = ("building", 0, self._started, 0)
        self._ended: str | None = None
        self._bereft = False
        self._alarm = alarm_of(run)
        self._told: int | None = None
        """The milestone after which this rank has told that it stands."""
        self._traced: int | None = None
        """The milestone after which it has last left its traces."""
        self._writing = threading.Lock()
        self._stop = threading.Event()
        with suppress(OSError):
            traces_folder(run).mkdir(parents=True, exist_ok=True)  # NCCL's watchdog would not make it
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: Phase, step: int) -> None:
        """The main thread begins something."""
        self._at = (phase, step, time.time(), self._at[3] + 1)

    def pass_milestone(self) -> None:
        """The main thread is on in what it does: all ranks have agreed on something."""
        phase, step, _, passed = self._at
        self._at = (phase, step, time.time(), passed + 1)

    def fail(self, why: str) -> None:
        """This rank is about to end, by an error of its own."""
        self._ended = why
        self._write()

    def lose_others(self, failed: Exception) -> list[tuple[Beat, Fault]]:
        """This rank's collective failed: have all ranks write their traces, wait until those that live had time to, and tell who is at
        fault. At most three heartbeats' time.
        """
        since = time.time()
        self._ended, self._bereft = "lost the others", True
        if self._traced != self._at[3]:  # else those tell more: the collective had not failed yet
            write_traces(self._run, self._rank, f"a collective failed: {failed}", failed=failed)
        raise_alarm(self._run, by="rank")
        pause = max(0.2, self._world_size / 100)  # every rank reads the files of all
        while True:
            self._write()  # silence is measured against the newest beat
            beats = read_beats(self._run)
            found = faults(beats)
            others_were_heard = all(beat.alive > since or beat.ended is not None for beat in beats if beat.rank != self._rank)
            certain = bool(found) and found[0][1] != "behind"
            if certain or others_were_heard or time.time() - since > (SILENT_BEATS + 0.5) * self._interval:
                return found
            time.sleep(pause)

    def close(self, ended: str) -> None:
        """Stop; the last beat stays in the run's folder and says why, unless it did already."""
        self._ended = self._ended or ended
        self._stop.set()
        self._thread.join()
        self._write()

    def _beat(self) -> None:
        while not self._stop.wait(self._interval):
            self._write()
            if (alarm := alarm_of(self._run)) != self._alarm:
                self._alarm = alarm
                if not self._bereft:
                    self._traced = self._at[3]
                    write_traces(self._run, self._rank, "asked for")
            self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        """Once for each milestone that is not followed by another in time."""
        phase, step, since, passed = self._at
        patience = self._patience(phase)
        stood = time.time() - since
        if self._ended or patience is None or self._told == passed or stood < SHARE_OF_PATIENCE * patience:
            return
        self._told = passed
        if a_rank_raised_alarm(self._run, since=since):
            return  # and has told of all; with hundreds of ranks, each would read the files of hundreds
        raise_alarm(self._run, by="rank")
        self._alarm = alarm_of(self._run)
        self._traced = passed
        reason = f"no progress for {stood:.0f} s, in {phase} of step {step}"
        write_traces(self._run, self._rank, reason)
        told = f"rank {self._rank} on {socket.gethostname()}: {reason}; {self._who_is_at_fault()}"
        print(told, file=sys.stderr, flush=True)

    def _who_is_at_fault(self) -> str:
        """This rank names itself, or the one it waits for, which may no longer be able to."""
        found = faults(read_beats(self._run))
        if not found or self._rank in {beat.rank for beat, _ in found}:
            return f"its stacks are in {traces_folder(self._run) / f'rank-{self._rank}.txt'}"
        return sentence_of_fault(*found[0], self._run, time.time())

    def _write(self) -> None:
        phase, step, since, passed = self._at
        beat = Beat(
            rank=self._rank,
            world_size=self._world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            interval=self._interval,
            started=self._started,
            alive=time.time(),
            phase=phase,
            step=step,
            since=since,
            passed=passed,
            collectives=collectives_begun(),
            ended=self._ended,
            bereft=self._bereft,
        )
        with self._writing, suppress(OSError):  # a full disk is told of by what has to be written
            beats_folder(self._run).mkdir(parents=True, exist_ok=True)
            write_beat(self._run, beat)

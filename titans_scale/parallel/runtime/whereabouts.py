"""What the ranks' heartbeats tell: who is gone, who is stuck, and since when.

Every rank passes the same milestones in the same order, so the one that has passed the fewest is the one the others wait for. Times are
those of each rank's own clock; machines whose clocks differ by seconds shift what is said by as much.
"""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

SILENT_BEATS = 2.5
"""Heartbeats that fail to come before a rank counts as silent."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One rank, as it last wrote of itself. Times in seconds since 1970."""

    rank: int
    world_size: int
    host: str
    pid: int
    interval: float
    """Seconds between two beats."""
    started: float
    alive: float
    """When this was written: the process was running."""
    phase: str
    step: int
    """The step it is taking."""
    since: float
    """Of the last milestone."""
    passed: int
    """Milestones so far: phases entered, agreements reached."""
    collectives: int
    """Collectives begun so far; 0 where the flight recorder is off."""
    ended: str | None = None
    """Why it is over; None while it runs."""
    bereft: bool = False
    """It ended because it lost the others."""


Fault = Literal["ended", "gone", "stopped", "silent", "behind"]


def beats_folder(run: Path) -> Path:
    """Where a run's heartbeats are."""
    return run / "ranks"


def write_beat(run: Path, beat: Beat) -> None:
    """Whole or not at all, and not forced to the disk: it is of no use after a machine's crash."""
    file = beats_folder(run) / f"rank-{beat.rank}.json"
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(json.dumps(asdict(beat)))
    unfinished.replace(file)


def read_beats(run: Path) -> list[Beat]:
    """Of every rank that has left one, by rank; one that is not readable is passed over."""
    beats = []
    for file in beats_folder(run).glob("rank-*.json"):
        try:
            beats.append(Beat(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(beats, key=lambda beat: beat.rank)


def remove_beats(run: Path) -> None:
    """Those of an earlier run in the same folder, which may have had more ranks."""
    for file in beats_folder(run).glob("*rank-*.json*"):
        file.unlink(missing_ok=True)


def faults(beats: Sequence[Beat]) -> list[tuple[Beat, Fault]]:
    """The ranks that the others wait for, worst kind first: those that ended by themselves; those whose process is gone or stopped, or
    of which nothing is heard; those that have fallen behind. Empty where all stand at the same place.
    """
    ended: list[tuple[Beat, Fault]] = [(beat, "ended") for beat in beats if beat.ended is not None and not beat.bereft]
    if ended:
        return [] if len(ended) == len(beats) else ended
    newest = max((beat.alive for beat in beats), default=0.0)
    for only_by_silence in (False, True):  # after a run that was killed as a whole all processes are gone
        missing = [(beat, fault) for beat in beats if (fault := _absence(beat, newest, only_by_silence)) is not None]
        if missing and len(missing) < len(beats):
            return missing
    places = {(beat.passed, beat.collectives) for beat in beats}
    return [(beat, "behind") for beat in beats if len(places) > 1 and (beat.passed, beat.collectives) == min(places)]


def sentence_of_fault(beat: Beat, fault: Fault, run: Path, now: float) -> str:
    """One rank's fault in words, and where its stacks are."""
    who, where = f"rank {beat.rank} on {beat.host}", f"{beat.phase} of step {beat.step}"
    last = f"its last heartbeat, {now - beat.alive:.0f} s ago, was in {where}"
    said = {
        "ended": f"{who} ended in {where}: {beat.ended}",
        "gone": f"{who} is gone; {last}",
        "stopped": f"{who} is stopped (process {beat.pid}); {last}",
        "silent": f"{who} has not been heard of since {where}, {now - beat.alive:.0f} s ago",
        "behind": f"{who} has been in {where} for {now - beat.since:.0f} s",
    }[fault]
    stacks = run / "traces" / f"rank-{beat.rank}.txt"
    fresh = stacks.exists() and stacks.stat().st_mtime >= beat.started
    return f"{said}; its stacks are in {stacks}" if fresh else said


def _absence(beat: Beat, newest: float, only_by_silence: bool) -> Fault | None:
    if beat.ended is not None:
        return None
    if not only_by_silence and beat.host == socket.gethostname() and (state := _process_state(beat.pid)) is not None:
        return state
    return "silent" if newest - beat.alive > SILENT_BEATS * beat.interval else None


def _process_state(pid: int) -> Literal["gone", "stopped"] | None:
    """Of a process on this machine; None: it runs, or the system does not say."""
    if not os.path.isdir("/proc/self"):
        return None
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except (OSError, IndexError):
        return None
    return "gone" if state in "ZX" else "stopped" if state in "Tt" else None

"""Who waits for whom in a run that hangs or has died: the ranks' heartbeats, stacks and collectives side by side."""

import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titans_scale.parallel.runtime.traces import raise_alarm, traces_folder
from titans_scale.parallel.runtime.whereabouts import SILENT_BEATS, Beat, faults, read_beats, sentence_of_fault

Trace = dict[str, Any]
"""What `write_traces` left of one rank."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank."""

    rank: int
    host: str
    phase: str
    step: int
    seconds: float
    """Since its last milestone, at the time of the newest heartbeat of all."""
    condition: str
    """running, or how it ended."""
    last_collective: str | None
    """The newest that it began, and whether it is over."""
    stands_at: str | None
    """The innermost line of this package that its main thread was in."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """A collective that some ranks of a group are in, and others have not come to."""

    collective: str
    waiting: list[int]
    missing: list[int]


@dataclass(frozen=True, kw_only=True)
class HangReport:
    """Of a whole run."""

    run: str
    at_fault: list[str]
    """A sentence for each rank that the others wait for; empty: none stands out."""
    ranks: list[RankReport]
    waits: list[Wait]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.run}: {len(self.ranks)} ranks", ""]
        for rank in self.ranks:
            lines.append(f"rank {rank.rank} on {rank.host}: {rank.phase} of step {rank.step} for {rank.seconds:.0f} s, {rank.condition}")
            lines += [f"    {what} {value}" for what, value in (("last", rank.last_collective), ("at  ", rank.stands_at)) if value]
        lines += ["", *(f"{wait.collective}: {_listed(wait.waiting)} in it, {_listed(wait.missing)} missing" for wait in self.waits)]
        lines += ["", *(self.at_fault or ["no rank stands out"])]
        return "\n".join(lines)


def report_of_run(run: Path) -> HangReport:
    """Of a run that hangs, is over or goes on; ranks that live are asked for their traces first, which takes some seconds.

    Raises:
        ValueError: no run has left heartbeats there.
    """
    beats = read_beats(run)
    if not beats:
        raise ValueError(f"no run has left heartbeats in {run / 'ranks'}; name the folder of a run (training.output_dir)")
    if any(_lives(beat) for beat in beats):
        _ask(run, beats)
        beats = read_beats(run)
    traces = {beat.rank: trace for beat in beats if (trace := _trace(run, beat)) is not None}
    newest = max(beat.alive for beat in beats)
    found = faults(beats)
    conditions: dict[int, str] = {beat.rank: fault for beat, fault in found if fault != "behind"}
    ranks = [
        RankReport(
            rank=beat.rank,
            host=beat.host,
            phase=beat.phase,
            step=beat.step,
            seconds=newest - beat.since,
            condition=beat.ended or conditions.get(beat.rank, "running"),
            last_collective=_newest(traces.get(beat.rank)),
            stands_at=traces.get(beat.rank, {}).get("at"),
        )
        for beat in beats
    ]
    sentences = [sentence_of_fault(beat, fault, run, newest) for beat, fault in found]
    return HangReport(run=str(run), at_fault=sentences, ranks=ranks, waits=_waits(traces))


def _lives(beat: Beat) -> bool:
    return beat.ended is None and time.time() - beat.alive < SILENT_BEATS * beat.interval


def _ask(run: Path, beats: list[Beat]) -> None:
    """Until all that live have answered, or had the time to."""
    asked = time.time()
    raise_alarm(run, by="user")
    living = [beat for beat in beats if _lives(beat)]
    deadline = asked + 2 * max(beat.interval for beat in living)
    while time.time() < deadline and not all((trace := _trace(run, beat)) and trace["time"] > asked for beat in living):
        time.sleep(0.2)


def _trace(run: Path, beat: Beat) -> Trace | None:
    """None: it left none, or they are of an earlier run in the same folder."""
    try:
        trace: Trace = json.loads((traces_folder(run) / f"rank-{beat.rank}.json").read_text())
    except (OSError, ValueError):
        return None
    return trace if trace["time"] >= beat.started else None


def _newest(trace: Trace | None) -> str | None:
    if not trace or not trace["collectives"]:
        return None
    entry = trace["collectives"][-1]
    return f"{_name(entry)} on {entry['sizes']}, {'over' if entry['over'] else 'not over'}, from {entry['from']}"


def _waits(traces: dict[int, Trace]) -> list[Wait]:
    """A collective counts by its group and its number there; a rank that left no traces has come to none."""
    waiting, begun, names = defaultdict(set), defaultdict(set), {}
    for rank, trace in traces.items():
        for entry in trace["collectives"]:
            members = tuple(trace["groups"].get(entry["group"], {}).get("ranks", ()))
            if entry["between_two"] or not members:
                continue
            key = (entry["is"], members, entry["number"])
            begun[key].add(rank)
            if not entry["over"]:
                waiting[key].add(rank)
                names[key] = f"{_name(entry)} of ranks {_listed(list(members))}, on {entry['sizes']}"
    return [
        Wait(collective=names[key], waiting=sorted(ranks), missing=sorted(set(key[1]) - begun[key]))
        for key, ranks in sorted(waiting.items())
    ]


def _name(entry: dict[str, Any]) -> str:
    return f"{entry['operation']} {entry['number']} of {entry['is']}"


def _listed(ranks: list[int]) -> str:
    """Runs of numbers as such: 0-6, 8."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"

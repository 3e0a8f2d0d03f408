"""What a rank leaves when something hangs: where every thread of it stands, and the collectives it took part in.

One rank raises the alarm, a file in the run's folder, and all that still can write their traces: only side by side do they tell
who waits for whom.
"""

import json
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

PACKAGE = Path(__file__).parents[1]
RECORDERS = ("_dump_nccl_trace", "_dump_fr_trace")
"""NCCL keeps a flight recorder of its own beside the one of all other backends; a build without NCCL has the second alone."""


def traces_folder(run: Path) -> Path:
    """Where the alarm and all traces of a run are."""
    return run / "traces"


def raise_alarm(run: Path, *, by: str) -> None:
    """Ask every rank for its traces.

    Args:
        by: "rank" or "user".
    """
    with suppress(OSError):
        traces_folder(run).mkdir(parents=True, exist_ok=True)
        (traces_folder(run) / "alarm").write_text(by)


def alarm_of(run: Path) -> int:
    """When it was last raised, in nanoseconds; 0: never."""
    try:
        return os.stat(traces_folder(run) / "alarm").st_mtime_ns
    except OSError:
        return 0


def a_rank_raised_alarm(run: Path, *, since: float) -> bool:
    """Whether the last alarm is younger than a time, in seconds since 1970, and a rank's."""
    try:
        return alarm_of(run) / 1e9 > since and (traces_folder(run) / "alarm").read_text() == "rank"
    except OSError:
        return False


def write_traces(run: Path, rank: int, reason: str, *, failed: BaseException | None = None) -> None:
    """This rank's stacks as text (rank-N.txt) and, with its collectives, for tools (rank-N.json). From any thread; a full disk is no error.

    Args:
        failed: the error of a collective that the main thread has just left, in place of where it is now.
    """
    folder = traces_folder(run)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        stacks, collectives = _stacks(), _collectives()
        if failed is not None:
            stacks["MainThread"] = traceback.extract_tb(failed.__traceback__)
            for entry in collectives[-1:]:
                entry["over"] = False  # gloo calls it so, but it ended in the error
        headline = f"rank {rank} on {socket.gethostname()}, process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {reason}\n"
        text = "\n".join(f"{name}\n{''.join(traceback.format_list(stack))}" for name, stack in stacks.items())
        (folder / f"rank-{rank}.txt").write_text(f"{headline}\n{text}")
        trace = {"rank": rank, "time": time.time(), "reason": reason, "at": _stand(stacks), "groups": _groups(), "collectives": collectives}
        unfinished = folder / f".rank-{rank}.json.unfinished"
        unfinished.write_text(json.dumps(trace))
        unfinished.replace(folder / f"rank-{rank}.json")


def collectives_begun() -> int:
    """How many collectives this rank has begun in all its groups; ranks that do the same work in step have begun equally many."""
    begun = 0
    for dump in _recorders():
        status = pickle.loads(dump(includeCollectives=False, includeStackTraces=False, onlyActive=False)).get("pg_status", {})
        begun += sum(max(0, int(of_group["last_enqueued_collective"])) for of_group in status.values())
    return begun


def _stacks() -> dict[str, traceback.StackSummary]:
    """Of all threads but the heartbeat's, by name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {ident: frame for ident, frame in sys._current_frames().items() if names.get(ident) != "heartbeat"}
    return {names.get(ident, f"thread {ident}"): traceback.extract_stack(frame) for ident, frame in frames.items()}


def _stand(stacks: dict[str, traceback.StackSummary]) -> str | None:
    """The innermost line of this package that the main thread is in."""
    ours = [frame for frame in stacks.get("MainThread", []) if Path(frame.filename).is_relative_to(PACKAGE)]
    return f"{ours[-1].filename}:{ours[-1].lineno} {ours[-1].name}" if ours else None


def _groups() -> dict[str, dict[str, Any]]:
    """By torch's name for it: what each of this rank's groups is, and which ranks are in it."""
    if not dist.is_initialized():
        return {}
    return {group.group_name: {"is": group.group_desc, "ranks": dist.get_process_group_ranks(group)} for group in list(_world.pg_map)}


def _collectives() -> list[dict[str, Any]]:
    """What the flight recorders hold, oldest first: which operation of which group, on what sizes, from where, and whether it is over."""
    found = []
    for dump in _recorders():
        for entry in pickle.loads(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False)).get("entries", []):
            name, what = entry["process_group"]
            found.append(
                {
                    "operation": entry["profiling_name"],
                    "group": name,
                    "is": what,
                    "number": entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
                    "between_two": entry["is_p2p"],
                    "sizes": entry["input_sizes"],
                    "dtypes": entry["input_dtypes"],
                    "begun": entry["time_created_ns"] / 1e9,
                    "over": bool(entry["retired"]) or entry["state"] == "completed",
                    "from": _place(entry.get("frames", [])),
                }
            )
    return sorted(found, key=lambda entry: entry["begun"])


def _place(frames: list[dict[str, Any]]) -> str | None:
    """The innermost line of a stack, innermost first, that is not torch's."""
    inside_torch = os.path.dirname(torch.__file__)
    for frame in frames:
        if os.path.isabs(frame["filename"]) and not frame["filename"].startswith(inside_torch):
            return f"{frame['filename']}:{frame['line']} {frame['name']}"
    return None


def _recorders() -> list[Callable[..., bytes]]:
    c10d = torch._C._distributed_c10d
    return [getattr(c10d, name) for name in RECORDERS if hasattr(c10d, name)]

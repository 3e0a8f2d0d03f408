"""Runs one command after the other, skips what is done, and hands signals on to the one that runs."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

Command = list[str | Path]


class StageFailed(RuntimeError):
    """A command of the quickstart ended badly; it has said why itself."""

    def __init__(self, stage: str, exit_code: int) -> None:
        super().__init__(f"the stage {stage!r} failed (exit code {exit_code}); what is done stays done, so mend it and run this again")


class Stopped(Exception):
    """The user asked to stop, and the running command has ended."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command and what it leaves."""

    name: str
    command: Command
    results: Sequence[Path]
    """All there: the stage is done."""


class Runner:
    """Runs stages one after the other and hands signals on to the one that runs."""

    def __init__(self, *, cores: int) -> None:
        self._threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, min(8, cores))))}
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, stage: Stage) -> None:
        if all(result.exists() for result in stage.results):
            print(f"[{stage.name}] done already: {', '.join(map(str, stage.results))}", flush=True)
            return
        print(f"[{stage.name}] {command_line(stage.command, self._threads)}", flush=True)
        start = time.monotonic()
        code = self._wait(stage.command)
        if self._stopped:
            raise Stopped
        if code != 0:
            raise StageFailed(stage.name, code)
        missing = [result for result in stage.results if not result.exists()]
        if missing:
            raise StageFailed(f"{stage.name}, which left no {missing[0]}", code)
        print(f"[{stage.name}] {time.monotonic() - start:.0f} s", flush=True)

    def _wait(self, command: Command) -> int:
        """The command's exit code, once it has ended: after a signal it saves first, and is not to be cut off in that."""
        before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            self._process = subprocess.Popen([str(part) for part in command], env={**os.environ, **self._threads})
            return self._process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        from_terminal = number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()
        if self._process is not None and not from_terminal:  # a terminal sends Ctrl-C to the command as well
            self._process.send_signal(number)


def command_line(command: Command, environment: Mapping[str, str]) -> str:
    settings = " ".join(f"{name}={value}" for name, value in environment.items())
    return f"{settings} {shlex.join(shown(part) for part in command)}"


def shown(part: str | Path) -> str:
    path = Path(part)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(part)

"""Asked to stop: a signal sets a flag, the main loop looks at it between two steps."""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Ctrl-C; what a scheduler and torchrun send; what `sbatch --signal=USR2@180` sends ahead of the time limit."""
SAME_PRESS_SECONDS = 1.0
"""One Ctrl-C may arrive twice, from the terminal and from a launcher that passes it on; signals this close together are one."""
FORCED_EXIT = 128 + signal.SIGINT


class StopSignals:
    """Context in which SIGINT, SIGTERM and SIGUSR2 ask for a stop instead of breaking off.

    A second Ctrl-C changes nothing, for it may come in the middle of the save that the first one asked for; a third one ends the
    process at once. Outside the main thread, where Python cannot set handlers, nothing is caught.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self.received: str | None = None
        """Name of the first signal, or None: the wish to stop."""
        self._speaks = speaks
        self._interrupts = 0
        self._last_interrupt = -SAME_PRESS_SECONDS
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            self._say(f"{self.received}: finishing this step, then saving and stopping (Ctrl-C twice more stops at once, unsaved)")
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        self._interrupts += now - self._last_interrupt >= SAME_PRESS_SECONDS
        self._last_interrupt = now
        if self._interrupts >= 3:
            self._say("third Ctrl-C: stopping at once")
            os._exit(FORCED_EXIT)

    def _say(self, sentence: str) -> None:
        if self._speaks:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{sentence}\n".encode())  # safe inside a handler, unlike print

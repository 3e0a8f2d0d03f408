"""Python's garbage collection at set steps, on all ranks at once."""

import gc
from types import TracebackType


class ScheduledCollection:
    """Context without automatic collection. Left to Python, each rank would stop at a moment of its own, and each time all the others
    would wait for it.

    Args:
        interval: steps between two collections; 0: leave it to Python.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._was_on = False

    def __enter__(self) -> "ScheduledCollection":
        self._was_on = gc.isenabled()
        if self._interval:
            gc.collect()
            gc.freeze()  # what is there now stays to the end: later collections need not look at it
            gc.disable()
        return self

    def after_step(self, step: int) -> None:
        """Collect if it is due; the same on every rank."""
        if self._interval and step % self._interval == 0:
            gc.collect()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._interval:
            gc.unfreeze()
            if self._was_on:
                gc.enable()

"""A function over many items in several processes, results in the order of the items."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

UNDER_WAY = 4
"""Items for each process, so that none waits while the results before are worked on."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores this process may use: its affinity, and the share that a container gives it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Generator[tuple[Item, Result], None, None]:
    """Each item with its result, by so many processes; 1: by this one. Close it to end them; they end with this process, too.

    Args:
        function: picklable; each process is given it once.   items: read no further ahead than needed to keep all processes busy.
    Raises:
        ValueError: workers below 1.   ChildProcessError: a process was killed.   What the function raises, at its item's turn.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if workers == 1:
        for item in items:
            yield item, function(item)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(function,))
    under_way: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            with _no_ctrl_c_for_children():
                under_way.append((item, pool.submit(_call, item)))
            if len(under_way) >= UNDER_WAY * workers:
                item, future = under_way.popleft()
                yield item, future.result()
        while under_way:
            item, future = under_way.popleft()
            yield item, future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of {workers} worker processes was killed, perhaps for want of memory;"
            " run the same again, with fewer workers if that happens again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _no_ctrl_c_for_children() -> Iterator[None]:
    """Ctrl-C goes to every process of a terminal; those that are started here leave it to this one, from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_function: Callable[[Any], Any]
"""Of a worker process, which does nothing else."""


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of that package would fight with the processes for their cores
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """However the parent ends: one that is killed cannot tell."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)

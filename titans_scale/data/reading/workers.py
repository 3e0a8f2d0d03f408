"""Processes that read ahead, and the signals that they leave to the trainer."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. Its workers are born with the trainer's signals held back: none of them dies of one before it is set up.

    Raises:
        ChildProcessError: a worker is gone, when its batch is asked for. torch would break into whatever runs when a worker dies; an error
            between two steps can be told to the other ranks, one amid their collectives cannot.
    """
    mask, on_death = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS), signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if _is_torch_s(on_death) else on_death)
    try:
        yield from batches
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise ChildProcessError(f"a process that reads data ahead is gone ({error}); if memory ran out, lower data.num_workers") from error


def _is_torch_s(handler: object) -> bool:
    """Whether a loader that was used before, by whomever, has left its handler."""
    return getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach all processes of a group; a worker that died of one would take the last checkpoint with it.

    A worker obeys its trainer's SIGTERM alone. It must obey that one: a trainer that ends badly waits for the workers it terminates.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()  # not os.getppid(): under forkserver that is the server
    if hasattr(signal, "sigwaitinfo") and trainer is not None:
        threading.Thread(target=_end_when_the_trainer_says_so, args=(trainer.pid,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    else:  # macOS does not tell who sent a signal; torch's own handler there is the better half of it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _end_when_the_trainer_says_so(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)

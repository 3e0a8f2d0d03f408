"""Run a function on N processes that are joined over gloo, on this machine's CPU."""

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TIMEOUT_SECONDS = 120
PRELOADED = ["torch", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "titans_scale.training.trainer"]


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: int = TIMEOUT_SECONDS) -> list[Any]:
    """What function(*arguments) returned on each rank, by rank; the process group is there when it is called.

    Args:
        function: of a module's top level, so that the processes can import it.   arguments, results: picklable.   timeout: seconds.
    Raises:
        AssertionError: a rank failed (with its traceback), or did not end in time.
    """
    # Children of a server that has torch loaded already start in a tenth of a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(function, arguments, rank, world_size, folder, timeout)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in stuck:
            processes[rank].kill()
        results = [_read(Path(folder) / f"rank{rank}") for rank in range(world_size)]
    failures = [f"rank {rank}:\n{result}" for rank, (ok, result) in enumerate(results) if not ok]
    assert not failures and not stuck, "\n".join([*failures, f"ranks still running after {timeout} s: {stuck}"])
    return [result for _, result in results]


def _rank(function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world_size: int, folder: str, timeout: int) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(timeout - 10)  # where a rank hangs, on stderr
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        result = (True, function(*arguments))
    except BaseException:
        result = (False, traceback.format_exc())
    (Path(folder) / f"rank{rank}").write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()


def _read(file: Path) -> tuple[bool, Any]:
    return pickle.loads(file.read_bytes()) if file.exists() else (False, "the process ended without a result")

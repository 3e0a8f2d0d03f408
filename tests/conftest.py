"""Shared by all tests: one thread a process, and GPU tests skipped where there is none."""

import os
import signal

import pytest

# Before torch is imported anywhere: tests start processes of their own, and more threads than cores make each of them crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# A shell that starts a job in the background lets it ignore Ctrl-C, and every process below it too; tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` and `multi_gpu` tests need what they say."""
    needs = {"gpu": 1, "multi_gpu": 2}
    marked = [(item, name) for item in items for name in needs if item.get_closest_marker(name)]
    if not marked:
        return
    import torch

    found = torch.cuda.device_count()
    for item, name in marked:
        if found < needs[name]:
            item.add_marker(pytest.mark.skip(reason=f"needs {needs[name]} CUDA device(s), found {found}"))

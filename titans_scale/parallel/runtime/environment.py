"""The environment variables that torch and NCCL read, in one place: what each is set to, and why.

They are read when a process group or the GPU's allocator is made, so they come before both. What the user has set stays.
"""

import os
from pathlib import Path
from typing import NamedTuple

from titans_scale.config import TitansConfig


class Variable(NamedTuple):
    """One line of the table."""

    name: str
    value: str
    why: str
    older_name: str | None = None
    """Read by torch too; a user who set it has decided."""


def environment_of(config: TitansConfig) -> list[Variable]:
    """The table for a run."""
    remembered = config.comm.trace_collectives
    variables = [
        Variable(
            "TORCH_FR_BUFFER_SIZE",
            str(remembered),
            "collectives that the flight recorder remembers, of gloo and NCCL alike (comm.trace_collectives)",
            "TORCH_NCCL_TRACE_BUFFER_SIZE",
        ),
        Variable(
            "TORCH_FR_DUMP_TEMP_FILE",
            str((Path(config.training.output_dir) / "traces" / "nccl-rank-").absolute()),
            "where NCCL's watchdog writes them when a collective times out; the rank's number is added",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
        ),
        Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", "1" if remembered else "0", "that it does so at all"),
        Variable(
            "TORCH_NCCL_ASYNC_ERROR_HANDLING",
            "3",
            "after a timeout end the process, without an attempt to end NCCL first, which can hang as well",
        ),
        Variable("NCCL_DEBUG", "WARN", "NCCL says which of its own calls failed, and is silent otherwise"),
        Variable(
            "PYTORCH_ALLOC_CONF",
            "expandable_segments:True",
            "rows of many lengths would leave the GPU's memory in pieces too small for the next one",
            "PYTORCH_CUDA_ALLOC_CONF",
        ),
    ]
    if config.training.deterministic:
        variables.append(Variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "cuBLAS repeats its sums in one order only with a fixed workspace"))
    return variables


def set_environment(config: TitansConfig) -> list[str]:
    """Set what the user has not. Before a process group is made, or a GPU touched.

    Returns:
        The names that were set, for `unset_environment`.
    """
    ours = [
        variable for variable in environment_of(config) if variable.name not in os.environ and (variable.older_name or "") not in os.environ
    ]
    os.environ.update({variable.name: variable.value for variable in ours})
    return [variable.name for variable in ours]


def unset_environment(names: list[str]) -> None:
    """Take back what a run has set: the next one in this process, or what it starts, has its own."""
    for name in names:
        os.environ.pop(name, None)

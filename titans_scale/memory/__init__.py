"""The neural long-term memory of Titans, usable alone: `from titans_scale.memory import NeuralMemory`."""

from titans_scale.config import MemoryConfig
from titans_scale.memory.layer import MemoryState, NeuralMemory
from titans_scale.memory.mlp import ResidualNorm
from titans_scale.memory.oracle import memory_oracle
from titans_scale.memory.probe import MemoryProbe
from titans_scale.memory.scan import memory_scan
from titans_scale.memory.state import ScanState, detach

__all__ = [
    "MemoryConfig",
    "MemoryProbe",
    "MemoryState",
    "NeuralMemory",
    "ResidualNorm",
    "ScanState",
    "detach",
    "memory_oracle",
    "memory_scan",
]

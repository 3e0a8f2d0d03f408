"""What a benchmark found: tables of numbers, targets met or missed, and remarks, for people (Markdown) and for machines (JSON)."""

import importlib.util
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from titans_scale.data.files import atomic_write

INSTALL_PEERS = "titans-pytorch is not installed, so only our own columns are here; `pip install -e .[bench]` brings it."
Row = dict[str, Any]
"""Column heading -> text or number; None where nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A number, and what it was to be."""

    claim: str
    value: float
    at_least: float = float("-inf")
    at_most: float = float("inf")

    @property
    def met(self) -> bool:
        return self.at_least <= self.value <= self.at_most

    def row(self) -> Row:
        bound = f"at least {shown(self.at_least)}" if self.at_least > float("-inf") else f"at most {shown(self.at_most)}"
        return {"target": self.claim, "wanted": bound, "measured": self.value, "result": "met" if self.met else "missed"}


@dataclass(kw_only=True)
class Report:
    """A benchmark's whole result."""

    title: str
    machine: Row
    tables: dict[str, list[Row]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "machine": self.machine,
            "tables": self.tables,
            "targets": [target.row() | {"met": target.met} for target in self.targets],
            "notes": self.notes,
        }

    def publish(self, file: Path | None) -> None:
        """Print it, and write the numbers to a JSON file, if one is wanted."""
        print(self.markdown())
        if file is not None:
            write_json(file, self.to_dict())

    def markdown(self) -> str:
        """The same as text that can go into a page of docs/ as it is."""
        machine = "; ".join(f"{name}: {shown(value)}" for name, value in self.machine.items())
        parts = [f"{self.title}\n{machine}"]
        parts += [f"**{heading}**\n\n{table(rows)}" for heading, rows in self.tables.items()]
        if self.targets:
            parts.append(f"**Targets**\n\n{table([target.row() for target in self.targets])}")
        return "\n\n".join([*parts, *self.notes])


def write_json(file: Path, numbers: dict[str, Any]) -> None:
    """Whole or not at all. Where it cannot be written, one sentence ends the program: the numbers have been printed by then."""
    try:
        with atomic_write(file) as whole:
            whole.write(json.dumps(numbers, indent=2).encode())
    except OSError as error:
        raise SystemExit(f"cannot write {file}: {error.strerror}; the numbers are above") from error


def table(rows: Sequence[Row]) -> str:
    """A Markdown table whose columns also stand in line on a terminal."""
    columns = list(rows[0])
    lines = [columns, *([shown(row[column]) for column in columns] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    right = [all(not isinstance(row[column], str) for row in rows) for column in columns]
    padded = [
        [cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in zip(line, widths, right, strict=True)]
        for line in lines
    ]
    rule = ["-" * (width - 1) + ":" if to_right else "-" * width for width, to_right in zip(widths, right, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def shown(value: object) -> str:
    """A cell: whole numbers in groups of three, others to three digits, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    digits = next((digits for digits, least in enumerate((100, 10, 1, 0.1)) if abs(value) >= least), 4)
    return f"{value:,.{digits}f}"


def doublings(longest: int) -> list[int]:
    """1,024, 2,048, 4,096, ... up to `longest`; that alone where it is less."""
    return [1024 << power for power in range((longest // 1024).bit_length())] or [longest]


def peers_installed() -> bool:
    return importlib.util.find_spec("titans_pytorch") is not None


def this_machine(*, threads: int) -> Row:
    """What the numbers were measured on."""
    return {"cpu": _cpu_name(), "torch": torch.__version__, "threads": threads}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

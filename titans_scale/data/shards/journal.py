"""The journal of a split that is being written: its finished shards, and from where in the input to go on after each.

One line of JSON a shard, added once the shard lies on the disk whole; a line that a kill cut off is not believed.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titans_scale.data.files import atomic_write
from titans_scale.data.shards.index import FORMAT_VERSION, Shard, ShardSettings
from titans_scale.data.shards.tars import fault_of_size

JOURNAL_NAME = ".progress.jsonl"


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in the input between two records, and what all before it came to."""

    records: int
    source: str
    """SHA-256 over them, by which the input is known again."""
    tokens: int
    """The eos before the first document included."""
    documents: int
    text_bytes: int
    skipped: int


@dataclass(kw_only=True)
class Journal:
    """What is finished of a split. The file is there from the first finished shard on."""

    directory: Path
    settings: ShardSettings
    shards: list[Shard] = field(default_factory=list)
    position: Position | None = None
    """Of the batch in which the next shard's first token is; None: the input's beginning."""
    size: int = 0
    """Bytes of the file that say this; there may be some of a cut line behind them."""

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return self.directory / JOURNAL_NAME

    @classmethod
    def read(cls, directory: Path) -> "Journal | None":
        """The one that is there, as far as its shards are there too; None where there is none.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        file = directory / JOURNAL_NAME
        if not file.exists():
            return None
        try:
            head, *lines = file.read_bytes().splitlines(keepends=True)
            first = json.loads(head)
            if first["format_version"] != FORMAT_VERSION:
                raise ValueError(f"it is of format version {first['format_version']}, this code writes {FORMAT_VERSION}")
            journal = cls(directory=directory, settings=ShardSettings(**first["settings"]), size=len(head))
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                content = json.loads(line)
                shard = Shard(**content["shard"])
                if fault_of_size(directory, shard):
                    break  # the disk lost it; it and what follows is made anew
                journal._note(shard, Position(**content["next"]), size=len(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); run tools/make_shards.py again with --overwrite") from error
        return journal

    def add(self, shard: Shard, position: Position) -> None:
        """Note a shard that lies there whole, and from where to go on after it."""
        line = _line({"shard": dataclasses.asdict(shard), "next": dataclasses.asdict(position)})
        if not self.size:
            head = _line({"format_version": FORMAT_VERSION, "settings": dataclasses.asdict(self.settings)})
            with atomic_write(self.file) as file:
                file.write(head)
            self.size = len(head)
        with self.file.open("r+b") as file:
            file.truncate(self.size)
            file.seek(self.size)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._note(shard, position, size=len(line))

    def _note(self, shard: Shard, position: Position, *, size: int) -> None:
        self.shards.append(shard)
        self.position = position
        self.size += size


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"

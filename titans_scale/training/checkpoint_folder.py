"""The folder of checkpoints: which of them are whole, and how one comes to be whole or goes away, each in one rename.

checkpoint/step-20/             whole: manifest.json lists every file with its size and SHA-256
checkpoint/.step-30.incomplete  being written, or left by a run that was killed while writing
checkpoint/.step-10.deleting    being deleted, likewise
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from titans_scale.data.files import atomic_write, sha256_of_file

CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What the manifest says of one file."""

    name: str
    num_bytes: int
    sha256: str


class CheckpointFolder:
    """The checkpoints of one run. No method but `files_of_rank` may be called by two ranks at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is, once whole."""
        return self.path / f"step-{step}"

    def incomplete(self, step: int) -> Path:
        """Where it is written."""
        return self.path / f".step-{step}.incomplete"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that bear a final name, oldest first."""
        if not self.path.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d+)", entry.name) for entry in self.path.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def newest_whole(self) -> tuple[int | None, list[str]]:
        """Step of the newest whole checkpoint, and a sentence for each newer one that is damaged."""
        complaints: list[str] = []
        for step in reversed(self.steps()):
            damage = damage_of(self.checkpoint(step))
            if damage is None:
                return step, complaints
            complaints.append(f"{self.checkpoint(step)} is damaged ({damage}) and is not used")
        return None, complaints

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint into."""
        folder = self.incomplete(step)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int, entries: list[FileEntry]) -> None:
        """The folder from `begin`, its files all on disk, becomes the checkpoint of the step."""
        folder = self.incomplete(step)
        files = {entry.name: {"bytes": entry.num_bytes, "sha256": entry.sha256} for entry in entries}
        with atomic_write(folder / MANIFEST_FILE) as file:
            file.write(json.dumps({"step": step, "files": files}, indent=1).encode())
        _sync_folder(folder)
        if self.checkpoint(step).exists():  # a damaged one: a whole one is never written again
            self.delete(step)
        folder.rename(self.checkpoint(step))
        _sync_folder(self.path)

    def keep_newest(self, count: int) -> None:
        """Delete all but the newest `count` checkpoints; 0 keeps all."""
        for step in self.steps()[:-count] if count else []:
            self.delete(step)

    def delete(self, step: int) -> None:
        """Under another name first: a deletion that is broken off leaves nothing that looks like a checkpoint."""
        doomed = self.path / f".step-{step}.deleting"
        shutil.rmtree(doomed, ignore_errors=True)
        self.checkpoint(step).rename(doomed)
        shutil.rmtree(doomed)

    def remove_leftovers(self) -> None:
        """What killed saves and deletions left. Only when no other process can be writing."""
        if self.path.is_dir():
            for entry in self.path.iterdir():
                if re.fullmatch(r"\.step-\d+\.(incomplete|deleting)", entry.name):
                    shutil.rmtree(entry)


def seal(file: Path) -> FileEntry:
    """A finished file's entry in the manifest, the file being on disk when this returns."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return FileEntry(name=file.name, num_bytes=file.stat().st_size, sha256=sha256_of_file(file))


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads the manifest and the files' sizes, not their contents."""
    try:
        files = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
        for name, entry in files.items():
            size = (checkpoint / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes in place of {entry['bytes']:,}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} is not readable"
    return None


def damaged_content(checkpoint: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the contents of every parts-th file, or None; reads them all. For a checkpoint without `damage_of`."""
    files = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    for name in sorted(files)[part::parts]:
        if sha256_of_file(checkpoint / name) != files[name]["sha256"]:
            return f"the contents of {name} have changed since it was written"
    return None


def _sync_folder(folder: Path) -> None:
    """A rename is safe on disk only when the folder that holds the name is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

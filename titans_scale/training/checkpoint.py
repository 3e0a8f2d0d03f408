"""The state of a run in torch.distributed.checkpoint's format, keyed by qualified names, so that any number of ranks can read it."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from titans_scale.config import ConfigError, TitansConfig, load_config, save_config
from titans_scale.models import TitansLM
from titans_scale.parallel import DistributedContext, Engine
from titans_scale.parallel.context import RunError, sentence_of
from titans_scale.training.checkpoint_folder import CONFIG_FILE, MANIFEST_FILE, CheckpointFolder, damage_of, damaged_content, seal

Counters = dict[str, Any]
"""Small state that is the same on every rank: {"stream": ..., "train_state": {"step": ..., "n_tokens_seen": ...}}."""


class CheckpointManager:
    """Checkpoints of one run, under RUN/checkpoint. All ranks call every method together.

    Args:
        keep_last: checkpoints to keep; 0: all.
    """

    def __init__(self, run: Path, context: DistributedContext, *, keep_last: int) -> None:
        self.folder = CheckpointFolder(run / "checkpoint")
        self._context = context
        self._keep_last = keep_last
        self.newest: int | None = None
        """Step of the newest whole checkpoint, once `find` has looked or `save` has written."""

    def find(self) -> list[str]:
        """Look for the newest whole checkpoint (it is `newest` then) and clear away what killed runs left.

        Returns:
            A sentence for every damaged checkpoint that was passed over.
        """
        complaints: list[str] = []
        with self._context.together():
            if self._context.is_main:
                self.folder.remove_leftovers()
                self.newest, complaints = self.folder.newest_whole()
        self.newest, complaints = self._context.gather((self.newest, complaints))[0]
        while self.newest is not None and (damage := self._damaged_content(self.newest)):
            complaints.append(f"{self.folder.checkpoint(self.newest)} is damaged ({damage}) and is not used")
            older = [step for step in self.folder.steps() if step < self.newest]
            self.newest = next((step for step in reversed(older) if damage_of(self.folder.checkpoint(step)) is None), None)
        return complaints

    def path(self) -> str | None:
        """The newest whole checkpoint, for a sentence."""
        return None if self.newest is None else str(self.folder.checkpoint(self.newest))

    def config(self) -> TitansConfig:
        """The configuration that the newest checkpoint was written under."""
        assert self.newest is not None
        return load_config(self.folder.checkpoint(self.newest) / CONFIG_FILE)

    def save(self, step: int, engine: Engine, counters: Counters, config: TitansConfig) -> None:
        """Write a checkpoint: complete or not at all, and known to be either on every rank.

        Raises:
            RunError: it could not be written; the checkpoints that were there still are.
        """
        if self.newest == step:
            return
        try:
            self._write(step, {**engine.state(), **counters}, config)
        except RunError as error:
            if self._context.is_main:
                with suppress(OSError):
                    self.folder.remove_leftovers()
            raise RunError(f"could not save {self.folder.checkpoint(step)}: {error}; {self._way_out()}") from error
        self.newest = step
        with self._context.together():
            if self._context.is_main:
                self.folder.keep_newest(self._keep_last)

    def load(self, engine: Engine, counters: Counters) -> Counters:
        """Fill model and optimizer from the newest checkpoint, on any number of ranks.

        Args:
            counters: of the same form as was saved.
        Returns:
            The saved counters.
        Raises:
            RunError: the checkpoint cannot be read.
        """
        assert self.newest is not None
        checkpoint = self.folder.checkpoint(self.newest)
        state = {**engine.state(), **counters}
        try:
            dcp.load(state, checkpoint_id=checkpoint, process_group=self._context.files_group)
        except CheckpointException as error:
            raise RunError(f"{checkpoint} cannot be read: {_first_failure(error)}") from error
        engine.load(state)
        return {name: state[name] for name in counters}

    def _write(self, step: int, state: Mapping[str, Any], config: TitansConfig) -> None:
        folder, context = self.folder.incomplete(step), self._context
        with context.together():
            if context.is_main:
                self.folder.begin(step)
        try:
            dcp.save(dict(state), checkpoint_id=folder, process_group=context.files_group)
        except CheckpointException as error:
            raise RunError(_first_failure(error)) from error
        entries = []
        with context.together():
            mine = sorted(folder.glob(f"__{context.rank}_*"))
            if context.is_main:
                save_config(config, folder / CONFIG_FILE)
                mine += [folder / CONFIG_FILE, folder / ".metadata"]
            entries = [seal(file) for file in mine]
        entries = [entry for of_rank in context.gather(entries) for entry in of_rank]
        with context.together():
            if context.is_main:
                missing = [entry.name for entry in entries if not (folder / entry.name).exists()]
                if missing:
                    raise RunError(
                        f"{missing[0]} of another machine is not visible here; training.output_dir must be shared by all machines"
                    )
                self.folder.commit(step, entries)

    def _damaged_content(self, step: int) -> str | None:
        damage: str | None = None
        with self._context.together():
            damage = damaged_content(self.folder.checkpoint(step), part=self._context.rank, parts=self._context.world_size)
        return next((found for found in self._context.gather(damage) if found), None)

    def _way_out(self) -> str:
        there = f"the newest whole checkpoint is {self.path()}" if self.newest is not None else "there is no checkpoint yet"
        return f"{there}; make room or mend the folder, and run the same command again"


def load_model_for_inference(path: str | Path, device: str | torch.device = "cpu") -> tuple[TitansLM, TitansConfig]:
    """A trained model in one process, in float32, with the configuration it was trained under.

    Args:
        path: a checkpoint (RUN/checkpoint/step-N), or a run, whose newest whole checkpoint is taken.
    Raises:
        ConfigError: there is no whole checkpoint at the path.
    """
    checkpoint = _find_checkpoint(Path(path))
    config = load_config(checkpoint / CONFIG_FILE)
    with torch.device("meta"):
        model = TitansLM(config.model)
    model.to_empty(device=device)
    state = {"model": get_model_state_dict(model)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    except CheckpointException as error:
        raise ConfigError(f"{checkpoint} cannot be read: {_first_failure(error)}") from error
    set_model_state_dict(model, state["model"])
    return model.eval(), config


def _find_checkpoint(path: Path) -> Path:
    if (path / MANIFEST_FILE).exists() or path.name.startswith("step-"):
        damage = damage_of(path)
        if not path.is_dir() or damage:
            raise ConfigError(f"{path} is not a whole checkpoint ({damage}); name another, or the run's folder for its newest whole one")
        return path
    folder = CheckpointFolder(path / "checkpoint")
    step, _ = folder.newest_whole()
    if step is None:
        raise ConfigError(f"there is no whole checkpoint in {folder.path}; name a run's folder, or one of its checkpoint/step-N")
    return folder.checkpoint(step)


def _first_failure(error: CheckpointException) -> str:
    rank, (failure, _) = next(iter(error.failures.items()))
    return ("" if rank == 0 else f"rank {rank}: ") + sentence_of(failure)

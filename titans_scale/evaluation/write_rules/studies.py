"""The studies: which models are trained, how, and what is asked of each afterwards. Numbers go into one JSON file a study.

transfer   trained at chunk 64, what is the loss of the same weights at chunks of 1 to 256?
rules      write rules, clips and step sizes side by side: loss, inner loss, sizes, cost
long       the defaults at depth 4 on sequences of 4,096 tokens
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from titans_scale.config import MemoryConfig
from titans_scale.data.files import atomic_write
from titans_scale.evaluation.write_rules.training import Recipe, Run, Text, byte_model, loss_with, train
from titans_scale.memory.write_rule import WriteRule


@dataclass(frozen=True, kw_only=True)
class Study:
    """Models that differ in their memory, trained alike."""

    cases: dict[str, MemoryConfig]
    recipe: Recipe
    dim: int
    num_layers: int
    evaluate_at: tuple[tuple[int, int], ...]
    """Chunk sizes at which the held-out loss is taken, and passes: 1 stands for as many as in training."""
    held_out: int
    """Sequences of the held-out text."""


TRANSFER = Study(
    cases={
        "plain": MemoryConfig(num_heads=2, write_rule="plain", max_inner_grad_norm=None),
        "plain, clip 1": MemoryConfig(num_heads=2, write_rule="plain"),
        "normalized": MemoryConfig(num_heads=2, write_rule="normalized"),
        "online, 1 pass": MemoryConfig(num_heads=2),
        "online, 2 passes": MemoryConfig(num_heads=2, passes=2),
    },
    recipe=Recipe(steps=500, batch_size=4, length=512),
    dim=64,
    num_layers=2,
    evaluate_at=((1, 1), (8, 1), (16, 1), (64, 1), (256, 1), (256, 2)),
    held_out=32,
)

COMPARED: tuple[tuple[WriteRule, float, float | None], ...] = (
    ("plain", 0.1, None),
    ("plain", 0.1, 1.0),
    ("plain", 0.01, None),
    ("normalized", 0.1, None),
    ("normalized", 0.1, 1.0),
    ("normalized", 0.5, None),
    ("online", 0.1, None),
    ("online", 0.1, 1.0),
    ("online", 0.5, 1.0),
)
"""Rule, max_step, max_inner_grad_norm."""

RULES = Study(
    cases={
        f"{rule}, step {step}" + (f", clip {clip:g}" if clip else ""): MemoryConfig(
            num_heads=2, write_rule=rule, max_step=step, max_inner_grad_norm=clip
        )
        for rule, step, clip in COMPARED
    },
    recipe=Recipe(steps=200, batch_size=4, length=512),
    dim=64,
    num_layers=2,
    evaluate_at=((64, 1),),
    held_out=16,
)

LONG = Study(
    cases={"defaults, depth 4": MemoryConfig(depth=4, num_heads=1, head_dim=16)},
    recipe=Recipe(steps=2000, batch_size=1, length=4096, look_interval=50),
    dim=32,
    num_layers=1,
    evaluate_at=((64, 1),),
    held_out=8,
)

STUDIES = {"transfer": TRANSFER, "rules": RULES, "long": LONG}


def run_study(name: str, file: Path, *, cases: Iterable[str] | None = None, steps: int | None = None, say: Callable[[str], None]) -> None:
    """Train the cases one after the other; the file has each as soon as it is done. A case that is in the file already is replaced.

    Args:
        name: of `STUDIES`.   file: JSON, made or added to.   cases: only these; None: all.   steps: other than the study's.
    """
    study = STUDIES[name]
    recipe = replace(study.recipe, steps=steps) if steps else study.recipe
    text = Text()
    held_out = text.validation(study.held_out, recipe.length)
    for case in cases or study.cases:
        run = train(byte_model(study.cases[case], dim=study.dim, num_layers=study.num_layers), text, recipe)
        row: dict[str, Any] = run.summary()
        row["held_out_loss"] = {} if run.stopped else _held_out_losses(run, held_out, study.evaluate_at)
        row["curves"] = {"loss": run.losses, "grad_norm": run.grad_norms, "looks": run.looks}
        rows = read_study(file) if file.exists() else {}
        rows[case] = row
        ordered = {key: rows[key] for key in study.cases if key in rows}
        with atomic_write(file) as whole:
            whole.write((json.dumps(_rounded(ordered)) + "\n").encode())
        say(f"{case}: {run.stopped or row['held_out_loss']}")


def _held_out_losses(run: Run, held_out: Tensor, evaluate_at: tuple[tuple[int, int], ...]) -> dict[str, float]:
    """Loss by "chunk size" or, with more passes than the model was trained with, "chunk size, passes"."""
    losses = {}
    trained = run.model.config.memory
    for chunk, passes in evaluate_at:
        if passes == 1:
            losses[str(chunk)] = loss_with(run.model, held_out, replace(trained, chunk_size=chunk))
        elif trained.write_rule == "online" and passes > trained.passes:
            losses[f"{chunk}, {passes} passes"] = loss_with(run.model, held_out, replace(trained, chunk_size=chunk, passes=passes))
    return losses


def read_study(file: Path) -> dict[str, dict[str, Any]]:
    """Case -> its numbers."""
    return json.loads(file.read_text())


def _rounded(x: Any) -> Any:
    """Six digits: what is written is read by people, and stored in the repository."""
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    return [_rounded(value) for value in x] if isinstance(x, list) else x

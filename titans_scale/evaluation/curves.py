"""The curves of a run, from its metrics.jsonl to one picture."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # a file, also where there is no screen
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Records = dict[int, dict[str, float]]

TRAIN_LOSS = "loss_metrics/global_avg_loss"
VALIDATION_LOSS = "validation_metrics/loss"
TOKENS = "n_tokens_seen"
MEMORY = "titans/"


def read_metrics(path: str | Path) -> Records:
    """Step -> metrics. A step written twice, as after a resume, counts with its last values; a line still being written does not count.

    Args:
        path: a run folder or its metrics.jsonl.
    Raises:
        ValueError: no such file, or nothing in it yet.
    """
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give the folder of a run, or its metrics.jsonl")
    lines = file.read_text().splitlines()
    records: Records = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"line {number} of {file} is not a record of metrics; is it the metrics.jsonl of a run?") from error
        records.setdefault(step, {}).update(record)
    if not records:
        raise ValueError(f"{file} holds no metrics yet; plot the run after its first steps")
    return dict(sorted(records.items()))


def plot_run(records: Records, output: str | Path, *, title: str = "") -> None:
    """Write a PNG: loss, learning rate and gradient norm; and how the memories learn, where the run has looked at them."""
    has_memory = any(key.startswith(MEMORY) for record in records.values() for key in record)
    figure = Figure(figsize=(13 if has_memory else 7, 8), layout="constrained")
    axes = figure.subplots(2, 2 if has_memory else 1, squeeze=False, sharex=True)
    _plot_loss(axes[0][0], records)
    _plot_optimizer(axes[1][0], records)
    if has_memory:
        _plot_group(axes[0][1], records, ("inner_loss", "surprise"), title="What the memories learn", log=True)
        _plot_group(axes[1][1], records, ("theta", "eta", "alpha", "state"), title="Gates and size of the state", log=True)
    for ax in axes[1]:
        ax.set_xlabel("optimizer step")
    figure.suptitle(title)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    half = output.with_name(f".{output.name}.tmp")
    figure.savefig(half, format="png", dpi=120)
    half.replace(output)


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    steps = [step for step, record in records.items() if record.get(key) is not None]
    return steps, [records[step][key] for step in steps]


def _plot_loss(ax: Axes, records: Records) -> None:
    steps, losses = _series(records, TRAIN_LOSS)
    ax.plot(steps, losses, linewidth=1, alpha=0.35, color="tab:blue", label="training, single steps")
    ax.plot(steps, _smoothed(losses), color="tab:blue", label="training, running mean")
    steps, losses = _series(records, VALIDATION_LOSS)
    ax.plot(steps, losses, "o-", markersize=3, color="tab:orange", label="validation")
    _dress(ax, title="Loss", label="nats per token")
    steps, tokens = _series(records, TOKENS)
    if tokens and steps[-1] > 0:
        per_step = tokens[-1] / steps[-1] / 1e6
        above = ax.secondary_xaxis("top", functions=(lambda x: np.asarray(x) * per_step, lambda x: np.asarray(x) / per_step))
        above.set_xlabel("million tokens")


def _smoothed(values: list[float]) -> list[float]:
    """Mean of the last tenth of the run at each point: single batches differ more than the curve falls."""
    width = max(1, len(values) // 10)
    return [float(np.mean(values[max(0, end - width) : end])) for end in range(1, len(values) + 1)]


def _plot_optimizer(ax: Axes, records: Records) -> None:
    ax.plot(*_series(records, "grad_norm"), linewidth=1, alpha=0.8, label="gradient norm, before clipping")
    ax.set_yscale("log")
    _dress(ax, title="Optimizer", label="gradient norm (L2)")
    right = ax.twinx()
    right.plot(*_series(records, "lr"), color="tab:red", label="learning rate")
    right.set_ylabel("learning rate", color="tab:red")
    right.set_ylim(bottom=0)


def _plot_group(ax: Axes, records: Records, starts: Sequence[str], *, title: str, log: bool) -> None:
    keys = dict.fromkeys(key for record in records.values() for key in record)
    for key in keys:
        name = key.removeprefix(MEMORY)
        if key.startswith(MEMORY) and name.startswith(tuple(starts)):
            ax.plot(*_series(records, key), "o-", markersize=3, label=name.replace("_", " "))
    if log:
        ax.set_yscale("log")
    _dress(ax, title=title, label="mean over layers, heads and tokens")


def _dress(ax: Axes, *, title: str, label: str) -> None:
    ax.set_title(title)
    ax.set_ylabel(label)
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend()

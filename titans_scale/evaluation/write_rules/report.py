"""A study's numbers as a table of Markdown and a picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, also where there is no screen
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = dict[str, dict[str, Any]]
TRAINED_AT = "64"


def table(name: str, rows: Rows) -> str:
    return _transfer_table(rows) if name == "transfer" else _rules_table(rows)


def plot(name: str, rows: Rows, output: Path) -> None:
    """Write a PNG."""
    figure = Figure(figsize=(6.5, 4) if name == "transfer" else (11, 6.5), layout="constrained")
    if name == "transfer":
        _plot_transfer(figure.subplots(), rows)
    else:
        _plot_curves(figure.subplots(2, 2, sharex=True).flatten().tolist(), rows)
    figure.savefig(output, format="png", dpi=110)


def _transfer_table(rows: Rows) -> str:
    chunks = max((list(row["held_out_loss"]) for row in rows.values()), key=len)
    lines = ["| trained at chunk 64 with | " + " | ".join(f"chunk {chunk}" for chunk in chunks) + " |", "|---" * (len(chunks) + 1) + "|"]
    for case, row in rows.items():
        losses = row["held_out_loss"]
        cells = [_loss_cell(losses[chunk], losses[TRAINED_AT]) if chunk in losses else "" for chunk in chunks]
        if not losses:
            cells[0] = row["stopped"]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _loss_cell(loss: float, reference: float) -> str:
    return f"{loss:.4f}" if loss == reference else f"{loss:.4f} ({_percent(loss, reference):+.2f}%)"


def _percent(loss: float, reference: float) -> float:
    return 100 * (loss / reference - 1)


def _rules_table(rows: Rows) -> str:
    heads = ["rule", "held-out loss", "loss, last tenth", "relative inner loss, max", "inner loss, max", "state norm, max"]
    heads += ["gradient norm, max", "CPU s/step"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case, row in rows.items():
        if row["stopped"]:
            lines.append(f"| {case} | {row['stopped']} |" + " |" * (len(heads) - 2))
            continue
        keys = ("train_loss", "relative_inner_loss_max", "inner_loss_max", "state_norm_max", "grad_norm_max", "cpu_seconds_per_step")
        digits = (3, 2, 1, 1, 1, 2)
        cells = [f"{row['held_out_loss'][TRAINED_AT]:.3f}", *(f"{row[key]:.{n}f}" for key, n in zip(keys, digits, strict=True))]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plot_transfer(ax: Axes, rows: Rows) -> None:
    chunks: list[int] = []
    for case, row in rows.items():
        as_trained = {int(chunk): loss for chunk, loss in row["held_out_loss"].items() if chunk.isdigit()}
        if not as_trained:
            continue
        (line,) = ax.plot(list(as_trained), list(as_trained.values()), "o-", label=case)
        chunks = list(as_trained)
        for key, loss in row["held_out_loss"].items():
            if not key.isdigit():
                chunk, passes = key.split(", ")
                ax.plot([int(chunk)], [loss], "*", color=line.get_color(), markersize=11, label=f"{case}, read with {passes}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(chunks, [str(chunk) for chunk in chunks])
    ax.set_xlabel("chunk size at evaluation (trained at 64)")
    ax.set_ylabel("held-out loss, nats per byte")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def _plot_curves(axes: list[Axes], rows: Rows) -> None:
    panels = {"loss": "loss, nats per byte", "grad_norm": "gradient norm before clipping"}
    looks = {"relative_inner_loss": "inner loss / mean |v|²", "state_norm": "norm of a head's weights"}
    for case, row in rows.items():
        curves = row["curves"]
        for ax, (key, title) in zip(axes, panels.items(), strict=False):
            values = _running_mean(curves[key]) if key == "loss" else curves[key]
            ax.plot(range(1, len(values) + 1), values, linewidth=1, label=case)
            ax.set_title(title)
        for ax, (key, title) in zip(axes[2:], looks.items(), strict=True):
            ax.plot([look["step"] for look in curves["looks"]], [look[key] for look in curves["looks"]], linewidth=1)
            ax.set_title(title)
            ax.set_xlabel("step")
    for ax in axes[1:]:
        ax.set_yscale("log")
    for ax in axes:
        ax.grid(alpha=0.3)
    if len(rows) > 1:
        axes[0].legend(fontsize="x-small")


def _running_mean(values: list[float]) -> list[float]:
    means: list[float] = []
    for value in values:
        means.append(value if not means else 0.95 * means[-1] + 0.05 * value)
    return means

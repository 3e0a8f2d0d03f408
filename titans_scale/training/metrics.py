"""Where the numbers of a run go: metrics.jsonl, TensorBoard, one line on the console. One record a step, whatever it holds."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from titans_scale.data.files import atomic_write

Record = dict[str, float]


class Sink(Protocol):
    """Takes records. `write` may raise OSError; the trainer sees to it that all ranks learn of that."""

    def write(self, step: int, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one JSON object a line, on disk as soon as written. Numbers that are not finite are null.

    Opening it drops what an interrupted run wrote after its last checkpoint: those steps are about to be taken again.

    Args:
        path: the file; may exist.   resumed_step: the last step whose record stays.
    """

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        drop_records_after(path, resumed_step)
        self._file = path.open("a")

    def write(self, step: int, record: Record) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def drop_records_after(path: Path, step: int) -> None:
    """Keep the records up to a step, one each; drop later ones, and a last line that was cut off in writing."""
    if not path.exists():
        return
    kept: dict[int, str] = {}
    for line in path.read_text().splitlines():
        try:
            record_step = int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            continue
        if record_step <= step:
            kept[record_step] = line
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in kept.values()).encode())


class TensorBoard:
    """Event files in a folder; what an interrupted run wrote after the resumed step is hidden."""

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and is an option

        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, step: int, record: Record) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Console:
    """Rank 0's voice: sentences, one line a logged step, and on a terminal a progress bar below them.

    Args:
        step, steps: where the run stands and how far it goes.   speaks: false on the other ranks.
    """

    def __init__(self, *, step: int, steps: int, speaks: bool) -> None:
        self._speaks = speaks
        self._first, self._step, self._steps = step, step, steps
        self._start = time.monotonic()
        on_terminal = speaks and sys.stderr.isatty()
        self._bar: Any = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True) if on_terminal else None

    def say(self, sentence: str) -> None:
        """A line of its own, above the progress bar."""
        if self._speaks:
            tqdm.write(sentence, file=sys.stdout)
            sys.stdout.flush()

    def advance(self) -> None:
        """One step is done."""
        self._step += 1
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, record: Record) -> None:
        time_left = "" if self._bar is not None else f"  [{self._times()}]"
        self.say(log_line(step, record) + time_left)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _times(self) -> str:
        """[elapsed<left] of this session, as the bar of tqdm shows it."""
        elapsed = time.monotonic() - self._start
        left = elapsed / max(1, self._step - self._first) * (self._steps - self._step)
        return f"{tqdm.format_interval(elapsed)}<{tqdm.format_interval(left)}"


def log_line(step: int, record: Record) -> str:
    """The console line, in torchtitan's form; what a record does not hold is left out."""
    form = {
        "loss_metrics/global_avg_loss": "loss: {:.5f}",
        "grad_norm": "grad_norm: {:.4f}",
        "lr": "lr: {:.2e}",
        "memory/max_reserved(GiB)": "memory: {:.2f}GiB",
        "throughput(tps)": "tps: {:,.0f}",
        "tflops": "tflops: {:.3g}",
        "mfu(%)": "mfu: {:.2f}%",
        "validation_metrics/loss": "validation: {:.5f}",
    }
    return "  ".join([f"step: {step}", *(text.format(record[name]) for name, text in form.items() if name in record)])

"""The quickstart: text -> corpus -> tokenizer -> shards -> training -> evaluation -> sample -> curves.

Every stage is a command that can be run by hand, and is printed before it runs. A stage whose result is there is not run again, so the
whole may be stopped anywhere and started again.
"""

import json
import math
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from titans_scale.config import ConfigError, TitansConfig, load_config
from titans_scale.data.files import atomic_write
from titans_scale.data.processes import available_cores
from titans_scale.quickstart.runner import Runner, shown
from titans_scale.quickstart.stages import (
    Plan,
    beside_python,
    closing_stages,
    data_stages,
    default_processes,
    training_stage,
    trial_stage,
)

TRIAL_STEPS = 8
WARM_UP_STEPS = 2
"""The first of them are slower and do not count."""


def run_quickstart(
    *,
    config_file: Path,
    workdir: Path,
    corpus: Path | None = None,
    vocab_size: int | None = None,
    processes: int | None = None,
    max_seconds: float = math.inf,
    eval_bytes: int = 400_000,
) -> None:
    """All stages, then a summary.

    Args:
        config_file: model and training; its data.path and training.output_dir are set here.
        corpus: file or folder with the user's own text; None: the Python standard library.
        vocab_size: of the tokenizer; None: the configuration's.
        processes: of torchrun; None: the GPUs that are there, otherwise two (one on a single core).
        max_seconds: the number of steps is lowered before training begins if it would take longer than this here.
        eval_bytes: held-out text to evaluate on at most.
    Raises:
        ConfigError: settings that cannot work, or the folder was begun with others.
        StageFailed, Stopped: see there.
    """
    config = load_config(config_file)
    asked = Plan(
        corpus=None if corpus is None else str(corpus.resolve()),
        config=shown(config_file.resolve()),
        vocab_size=vocab_size or config.model.vocab_size,
        steps=None,
        processes=processes or default_processes(config),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    plan = _agreed(workdir / "plan.json", asked, processes_given=processes is not None)
    runner = Runner(cores=available_cores() // plan.processes)
    started = time.monotonic()
    for stage in data_stages(plan, config, workdir):
        runner.run(stage)
    if plan.steps is None:
        steps = _affordable_steps(runner, plan, config, workdir, max_seconds=max_seconds)
        plan = replace(plan, steps=steps)
        _write_json(workdir / "plan.json", asdict(plan))
    train = training_stage(plan, workdir)
    runner.run(train)
    for stage in closing_stages(workdir, checkpoint=train.results[0], eval_bytes=eval_bytes):
        runner.run(stage)
    _summary(workdir, checkpoint=train.results[0], seconds=time.monotonic() - started)


def default_workdir(corpus: Path | None) -> Path:
    """runs/quickstart, or one beside it for the user's own text."""
    return Path("runs") / ("quickstart" if corpus is None else f"quickstart-{corpus.resolve().stem}")


def _agreed(file: Path, asked: Plan, *, processes_given: bool) -> Plan:
    if not file.exists():
        _write_json(file, asdict(asked))
        return asked
    before = Plan(**json.loads(file.read_text()))
    for name in ("corpus", "config", "vocab_size"):
        old, new = getattr(before, name), getattr(asked, name)
        if old != new:
            old, new = (value or "the standard library" for value in (old, new))
            raise ConfigError(
                f"{file.parent} was begun with {name} {old}, not {new}; give another --workdir (make quickstart WORKDIR=path), or delete it"
            )
    return replace(before, processes=asked.processes) if processes_given else before


def _affordable_steps(runner: Runner, plan: Plan, config: TitansConfig, workdir: Path, *, max_seconds: float) -> int:
    """The configuration's steps, or as many as fit into max_seconds at the pace of a few trial steps."""
    steps = config.training.steps
    if steps <= TRIAL_STEPS:
        return steps
    trial = trial_stage(plan, workdir, steps=TRIAL_STEPS)
    (metrics,) = trial.results
    shutil.rmtree(metrics.parent, ignore_errors=True)  # of an attempt that was cut off
    runner.run(trial)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    shutil.rmtree(metrics.parent)
    # The second fastest: whatever else runs for these few seconds says little about the next minutes, and should not halve the training.
    pace = sorted(record["time_metrics/end_to_end(s)"] for record in records[WARM_UP_STEPS:])[1]
    affordable = min(steps, max(1, int(max_seconds / pace)))
    fewer = "" if affordable == steps else f", so {affordable} steps in place of {steps}"
    print(f"A step takes {pace:.2f} s here: {affordable * pace / 60:.1f} minutes of training{fewer}.", flush=True)
    return affordable


def _summary(workdir: Path, *, checkpoint: Path, seconds: float) -> None:
    run = workdir / "run"
    python = shown(sys.executable)
    scores = json.loads((workdir / "evaluation.json").read_text())["bits_per_byte"]
    print(f"\n{'-' * 100}\n{(workdir / 'sample.txt').read_text().rstrip()}\n{'-' * 100}")
    print("Bits per byte of held-out text (lower is better):")
    for name, score in sorted(scores.items(), key=lambda item: item[1]):
        print(f"  {name:12s} {score:.3f}")
    print(f"""
Loss curves    {workdir / "curves.png"}
TensorBoard    {shown(beside_python("tensorboard"))} --logdir {run / "tensorboard"}
Checkpoint     {checkpoint}
This took      {seconds / 60:.1f} minutes (stages done before not counted)

Next:
  {python} tools/generate.py --checkpoint {run} --prompt "def main(" --max_new_tokens 200
  {python} tools/evaluate.py --checkpoint {run} --text README.md
  make quickstart CORPUS=path/to/your/text
  {python} tools/estimate.py --config configs/mac_340m.yaml --world 8
""")


def _write_json(file: Path, content: object) -> None:
    with atomic_write(file) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())

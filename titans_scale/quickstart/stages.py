"""The stages of the quickstart as commands, and the few decisions they share."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from titans_scale.config import TitansConfig
from titans_scale.data.processes import available_cores
from titans_scale.quickstart.runner import Command, Stage

TOOLS = Path(__file__).resolve().parents[2] / "tools"
"""Of the checkout: an editable install leaves the package where the tools are."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is decided once for a folder, so that going on later means the same run."""

    corpus: str | None
    """The user's own text; None: the standard library."""
    config: str
    vocab_size: int
    steps: int | None
    """Optimizer steps; None until the machine has been timed."""
    processes: int


def data_stages(plan: Plan, config: TitansConfig, workdir: Path) -> list[Stage]:
    """Text -> corpus -> tokenizer -> token shards."""
    corpus, tokenizer, tokens = workdir / "corpus", workdir / "tokenizer.model", workdir / "tokens"
    own_text = [] if plan.corpus is None else [plan.corpus]
    train_tokenizer = _tool("train_tokenizer", corpus=corpus, vocab_size=plan.vocab_size, output=tokenizer)
    make_shards = _tool("make_shards", corpus=corpus, tokenizer=tokenizer, sequence_length=config.training.sequence_length, output=tokens)
    return [
        Stage(
            name="corpus",
            command=[*_tool("make_corpus", output=corpus), *own_text],
            results=[corpus / "train.jsonl", corpus / "validation.jsonl"],
        ),
        Stage(name="tokenizer", command=train_tokenizer, results=[tokenizer]),
        Stage(name="shards", command=make_shards, results=[tokens / "train" / "index.json", tokens / "validation" / "index.json"]),
    ]


def training_stage(plan: Plan, workdir: Path) -> Stage:
    """Done when the checkpoint of the last step is there; otherwise the trainer goes on from its newest one."""
    command = [*train_command(plan, workdir, output=workdir / "run"), *_options({"training.steps": plan.steps})]
    return Stage(name="training", command=command, results=[workdir / "run" / "checkpoint" / f"step-{plan.steps}"])


def trial_stage(plan: Plan, workdir: Path, *, steps: int) -> Stage:
    """A few steps of the same training, to time them."""
    output = workdir / "calibration"
    timing: dict[str, object] = {"training.steps": steps, "metrics.log_interval": 1, "eval.interval": 0, "checkpoint.interval": 0}
    timing |= {"metrics.memory_interval": 0, "metrics.tensorboard": "false"}
    command = [*train_command(plan, workdir, output=output), *_options(timing)]
    return Stage(name="timing a few steps", command=command, results=[output / "metrics.jsonl"])


def train_command(plan: Plan, workdir: Path, *, output: Path) -> Command:
    """torchrun of the trainer, but for the number of steps."""
    # --local-addr: a laptop's own host name often resolves to nothing, and gloo then waits for itself
    launch = {"local-addr": "127.0.0.1", "nproc-per-node": plan.processes}
    run = {"config": plan.config, "model.vocab_size": plan.vocab_size, "data.path": workdir / "tokens", "training.output_dir": output}
    return [beside_python("torchrun"), "--standalone", *_options(launch), "-m", "titans_scale.train", *_options(run)]


def closing_stages(workdir: Path, *, checkpoint: Path, eval_bytes: int) -> list[Stage]:
    """What the trained model is worth."""
    evaluation, sample, curves = workdir / "evaluation.json", workdir / "sample.txt", workdir / "curves.png"
    held_out = workdir / "corpus" / "validation.jsonl"
    evaluate = _tool("evaluate", checkpoint=checkpoint, text=held_out, max_bytes=eval_bytes, output=evaluation)
    generate = _tool("generate", checkpoint=checkpoint, max_new_tokens=200, temperature=0.8, min_p=0.05, seed=0, output=sample)
    return [
        Stage(name="evaluation", command=evaluate, results=[evaluation]),
        Stage(name="sample", command=generate, results=[sample]),
        Stage(name="curves", command=[*_tool("plot", output=curves), workdir / "run"], results=[curves]),
    ]


def default_processes(config: TitansConfig) -> int:
    """One a GPU; on CPU two, or one on a single core; always a number that divides the global batch."""
    import torch

    training = config.training
    most = torch.cuda.device_count() or min(2, available_cores())
    micro_batches = training.global_batch_tokens // (training.sequence_length * training.micro_batch_size)
    return max(n for n in range(1, most + 1) if micro_batches % n == 0)


def beside_python(name: str) -> Path:
    """A program of the environment that runs this."""
    return Path(sys.executable).with_name(name)


def _tool(name: str, **options: object) -> Command:
    return [Path(sys.executable), TOOLS / f"{name}.py", *_options(options)]


def _options(options: Mapping[str, object]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]

"""Small runs for the tests of the trainer: token shards of bytes, a configuration, and what a run wrote down."""

import json
import random
from pathlib import Path
from typing import Any

from titans_scale.config import TitansConfig, load_config
from titans_scale.data import load_tokenizer, write_shards

SEQUENCE_LENGTH = 32
GLOBAL_SEQUENCES = 8
SMALL = {
    "model.variant": "mac",
    "model.dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.vocab_size": 257,
    "model.segment_len": 16,
    "model.num_persistent_tokens": 2,
    "model.memory.num_heads": 2,
    "model.memory.chunk_size": 16,
    "training.sequence_length": SEQUENCE_LENGTH,
    "training.global_batch_tokens": SEQUENCE_LENGTH * GLOBAL_SEQUENCES,
    "training.micro_batch_size": 2,
    "training.steps": 4,
    "training.device": "cpu",
    "optimizer.lr": 0.003,
    "lr_scheduler.warmup_steps": 2,
    "checkpoint.interval": 0,
    "metrics.memory_interval": 0,
    "metrics.tensorboard": "false",
    "metrics.peak_tflops": 1,
    "eval.interval": 0,
}


def make_data(folder: Path, *, documents: int = 40, letters: str = "abcdefgh \n") -> Path:
    """Shards of random text, in sequences of SEQUENCE_LENGTH; the last sample of each split is a short one."""
    source = random.Random(0)
    for split, count in (("train", documents), ("validation", 5)):
        texts = ["".join(source.choices(letters, k=source.randint(20, 200))) for _ in range(count)]
        write_shards(texts, folder / split, tokenizer=load_tokenizer("byte"), sequence_length=SEQUENCE_LENGTH, samples_per_shard=64)
    return folder


def settings(data: Path, output: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Dotted keys of a small run, with changes."""
    return {**SMALL, "data.path": data, "training.output_dir": output, **(changes or {})}


def small_config(data: Path, output: Path, changes: dict[str, Any] | None = None) -> TitansConfig:
    """The configuration of a small run."""
    return load_config(None, [f"{key}={value}" for key, value in settings(data, output, changes).items()])


def arguments(data: Path, output: Path, changes: dict[str, Any] | None = None) -> list[str]:
    """The command line of a small run."""
    return [f"--{key}={value}" for key, value in settings(data, output, changes).items()]


def records(output: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(output: Path) -> list[tuple[int, float, float, float]]:
    """Step, loss, gradient norm and learning rate of every record: exact numbers, and nothing that depends on the clock."""
    return [(r["step"], r["loss_metrics/global_avg_loss"], r["grad_norm"], r["lr"]) for r in records(output)]

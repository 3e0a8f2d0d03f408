"""The data path: reading samples, starting and resuming over a large index, and tokenizing: what `tools/bench_data.py` prints."""

import json
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import get_args

import torch

from titans_scale.config import Variant
from titans_scale.evaluation.benchmarks.data_cases import (
    BATCH_SIZE,
    memmap_step,
    packed_step,
    stream_step,
    tokenizing_rates,
    webdataset_step,
    write_random_tokens,
)
from titans_scale.evaluation.benchmarks.data_startup import StartUp, measure_start_up
from titans_scale.evaluation.benchmarks.measure import Step, progress, time_in_turns
from titans_scale.evaluation.benchmarks.report import Report, Row, Target, this_machine

OURS, MEMMAP, WEBDATASET = "titans_scale", "np.memmap loop", "webdataset"
WANTED_TOKENS_A_SECOND = 20e6


def benchmark_data(
    *,
    lengths: Sequence[int],
    tokens: int,
    shards: int,
    position: int,
    text_bytes: int,
    workers: int,
    packed_length: int,
    repeats: int,
    runs: Sequence[Path],
) -> Report:
    """Measure and compare.

    Args:
        lengths: of the samples that are read.   tokens: read in each measurement.
        shards: of the large index, 65,536 samples each.   position: sample to resume at.
        text_bytes: of the text that is tokenized; 0: none.   workers: processes that tokenize.
        packed_length: tokens of the sequences of packed documents that small models are trained on.
        runs: folders of training runs, for the share of a step that they waited for data.
    """
    torch.set_num_threads(1)
    report = Report(title="Data: reading on one core from the page cache, start-up, tokenizing.", machine=this_machine(threads=1))
    if runs:
        report.tables["Waiting for data"] = [_waiting(report, run) for run in runs]
    with tempfile.TemporaryDirectory() as folder:
        report.tables["Reading"] = _reading(report, Path(folder), lengths=lengths, tokens=tokens, repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        progress(f"start-up over {shards:,} shards")
        report.tables["Start and resume"] = _start_up(report, measure_start_up(Path(folder), shards=shards, position=position))
    if text_bytes:
        with tempfile.TemporaryDirectory() as folder:
            progress(f"tokenizing {text_bytes:,} bytes with {workers} processes")
            report.tables["Tokenizing"] = _tokenizing(report, Path(folder), text_bytes=text_bytes, workers=workers, repeats=repeats)
    progress(f"resets at documents in {packed_length:,} tokens")
    report.tables["data.reset_at_document"] = _resets(packed_length, repeats=repeats)
    return report


def _reading(report: Report, folder: Path, *, lengths: Sequence[int], tokens: int, repeats: int) -> list[Row]:
    rows: list[Row] = []
    for length in lengths:
        progress(f"reading samples of {length:,} tokens")
        batches = max(1, tokens // (length * BATCH_SIZE))
        where = folder / str(length)
        write_random_tokens(where, tokens=batches * BATCH_SIZE * length, length=length)
        steps: dict[str, Step] = {
            OURS: stream_step(where, batches=batches),
            MEMMAP: memmap_step(where, length=length, batches=batches),
            WEBDATASET: webdataset_step(where, batches=batches),
        }
        for step in steps.values():
            step()  # the files are in the page cache from here on
        timings = time_in_turns(steps, repeats=repeats, budget_seconds=60)
        rates = {name: batches * BATCH_SIZE * length / timing.best for name, timing in timings.items()}
        rows += [
            {
                "reader": name,
                "tokens of a sample": length,
                "million tokens a CPU s": rate / 1e6,
                "times memmap's rate": rate / rates[MEMMAP],
            }
            for name, rate in rates.items()
        ]
        claim = f"tokens a second on one core, by those of the memmap loop, samples of {length:,}"
        report.targets.append(Target(claim=claim, value=rates[OURS] / rates[MEMMAP], at_least=0.5))
        claim = f"million tokens a second on one core, samples of {length:,}"
        report.targets.append(Target(claim=claim, value=rates[OURS] / 1e6, at_least=WANTED_TOKENS_A_SECOND / 1e6))
    return rows


def _start_up(report: Report, cost: StartUp) -> list[Row]:
    report.targets.append(Target(claim="seconds to start and resume", value=cost.seconds, at_most=2))
    report.targets.append(Target(claim="memory taken by that, MB", value=cost.extra_bytes / 1e6, at_most=200))
    return [
        {
            "shards": cost.shards,
            "samples": cost.samples,
            "tokens": cost.tokens,
            "resumed at sample": cost.position,
            "seconds to open": cost.open_seconds,
            "seconds to the first batch": cost.seconds,
            "extra memory, MB": cost.extra_bytes / 1e6,
        }
    ]


def _tokenizing(report: Report, folder: Path, *, text_bytes: int, workers: int, repeats: int) -> list[Row]:
    rates = tokenizing_rates(folder, text_bytes=text_bytes, workers=workers, repeats=repeats)
    claim = f"tokens a second of make_shards with {workers} processes, by those of sentencepiece alone in as many"
    report.targets.append(Target(claim=claim, value=rates[OURS] / rates["sentencepiece"], at_least=0.8))
    return [{"who": name, "processes": workers, "million tokens a second": rate / 1e6} for name, rate in rates.items()]


def _resets(length: int, *, repeats: int) -> list[Row]:
    rows: list[Row] = []
    for variant in get_args(Variant):
        steps = {name: packed_step(variant, length=length, reset=name == "with") for name in ("without", "with")}
        for step in steps.values():
            step()
        seconds = {name: timing.best for name, timing in time_in_turns(steps, repeats=repeats, budget_seconds=60).items()}
        rows.append(
            {
                "variant": variant,
                "tokens": length,
                "CPU s a step": seconds["without"],
                "with resets": seconds["with"],
                "times as long": seconds["with"] / seconds["without"],
            }
        )
    return rows


def _waiting(report: Report, run: Path) -> Row:
    """Of a run's steps but the first, which starts everything up."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; --runs takes the folder of a training run, for example runs/quickstart/run")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [record for record in islice(records, 1, None) if "time_metrics/data_loading(s)" in record]
    if not steps:
        raise ValueError(f"{file} has fewer than two steps; train longer")
    waited, whole = (sum(record[f"time_metrics/{name}(s)"] for record in steps) for name in ("data_loading", "end_to_end"))
    report.targets.append(Target(claim=f"% of the step's time that {run} waited for data", value=100 * waited / whole, at_most=1))
    return {"run": str(run), "records": len(steps), "ms a step waiting": 1e3 * waited / len(steps), "ms a step": 1e3 * whole / len(steps)}

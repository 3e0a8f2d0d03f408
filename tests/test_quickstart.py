"""The quickstart from text to a sample, in a minute: bytes instead of megabytes, one process, a few steps."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titans_scale.quickstart.runner import Runner, Stage, StageFailed, Stopped
from titans_scale.quickstart.stages import Plan, training_stage

ROOT = Path(__file__).parents[1]
CONFIG = """
model: {variant: mac, dim: 32, num_layers: 2, num_heads: 2, vocab_size: 300, segment_len: 16, memory: {num_heads: 2, chunk_size: 16}}
training: {steps: %d, sequence_length: 64, global_batch_tokens: 256, micro_batch_size: 2, device: cpu}
optimizer: {lr: 0.01}
lr_scheduler: {warmup_steps: 2}
checkpoint: {interval: 4}
metrics: {memory_interval: 4, peak_tflops: 1}
eval: {interval: 4, batches: 2}
"""


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text("".join(f"line {line} of text {number}: the memory learns.\n" for line in range(20)))
    return folder


def quickstart(tmp_path, corpus, *, steps, config="config.yaml"):
    (tmp_path / config).write_text(CONFIG % steps)
    options = ["--config", config, "--corpus", corpus, "--workdir", "work", "--processes", 1, "--eval_bytes", 2000]
    command = [sys.executable, ROOT / "tools" / "quickstart.py", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen([str(part) for part in command], cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def finish(process):
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def test_from_text_to_a_sample_and_once_more_in_no_time(tmp_path, corpus):
    code, out, err = finish(quickstart(tmp_path, corpus, steps=4))
    assert code == 0, out + err
    work = tmp_path / "work"
    scores = json.loads((work / "evaluation.json").read_text())["bits_per_byte"]
    for name, score in scores.items():
        assert re.search(rf"^  {re.escape(name)} +{score:.3f}$", out, re.MULTILINE)
    assert (work / "sample.txt").read_text().strip() in out
    for path in ("run/checkpoint/step-4", "curves.png", "run/tensorboard", "run/metrics.jsonl"):
        assert (work / path).exists()
    start = time.monotonic()
    code, again, err = finish(quickstart(tmp_path, corpus, steps=4))
    assert code == 0, err
    assert again.count("done already") == 7
    assert again[again.index("Bits per byte") :].splitlines()[:4] == out[out.index("Bits per byte") :].splitlines()[:4]
    assert time.monotonic() - start < 30


def test_ctrl_c_in_training_keeps_what_is_done_and_the_next_run_goes_on(tmp_path, corpus):
    process = quickstart(tmp_path, corpus, steps=60)
    metrics = tmp_path / "work" / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130, out + err
    assert "goes on from here" in err
    reached = newest_step(tmp_path / "work" / "run")
    assert 2 <= reached < 60
    code, out, err = finish(quickstart(tmp_path, corpus, steps=60))
    assert code == 0, out + err
    assert "[tokenizer] done already" in out
    assert newest_step(tmp_path / "work" / "run") == 60
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 61))


def test_another_corpus_in_the_same_folder_is_refused_with_a_sentence(tmp_path, corpus):
    plan = Plan(corpus="/somewhere/else", config="config.yaml", vocab_size=300, steps=None, processes=1)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "plan.json").write_text(json.dumps(vars(plan)))
    code, _, err = finish(quickstart(tmp_path, corpus, steps=4))
    assert code == 2
    assert err.startswith(f"quickstart: work was begun with corpus /somewhere/else, not {corpus}; give another --workdir")
    assert err.count("\n") == 1


def test_the_training_command_is_torchrun_with_the_plan(tmp_path):
    plan = Plan(corpus=None, config="configs/quickstart.yaml", vocab_size=4096, steps=7, processes=2)
    stage = training_stage(plan, tmp_path)
    command = " ".join(map(str, stage.command))
    assert re.search(r"torchrun --standalone .*--nproc-per-node 2 -m titans_scale.train --config configs/quickstart.yaml ", command)
    assert command.endswith("--training.steps 7")
    assert stage.results == [tmp_path / "run" / "checkpoint" / "step-7"]


def stage(tmp_path, code, *, name="a stage"):
    return Stage(name=name, command=[sys.executable, "-c", code], results=[tmp_path / "result"])


def test_a_stage_runs_once(tmp_path, capsys):
    writes = stage(tmp_path, f"open({str(tmp_path / 'result')!r}, 'a').write('x')")
    Runner(cores=1).run(writes)
    Runner(cores=1).run(writes)
    assert (tmp_path / "result").read_text() == "x"
    assert "done already" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "sentence"), [("raise SystemExit(3)", "exit code 3"), ("pass", "left no .*result")])
def test_a_stage_that_fails_or_leaves_nothing_stops_the_quickstart(tmp_path, code, sentence):
    with pytest.raises(StageFailed, match=sentence):
        Runner(cores=1).run(stage(tmp_path, code))


def test_a_signal_is_handed_on_and_the_command_is_waited_for(tmp_path):
    saves = (
        "import os, signal, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), open({str(tmp_path / 'saved')!r}, 'w'), os._exit(0)))\n"
        f"os.kill({os.getpid()}, signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    with pytest.raises(Stopped):
        Runner(cores=1).run(stage(tmp_path, saves))
    assert (tmp_path / "saved").exists()


def newest_step(run):
    return max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoint").glob("step-*"))


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)

"""The small parts of training, each by itself."""

import itertools
import json
import math

import pytest
import torch
from training_runs import small_config

from titans_scale import TitansLM
from titans_scale.config import LRSchedulerConfig
from titans_scale.data import Batch
from titans_scale.models.loss import cross_entropy_sum
from titans_scale.parallel.context import sentence_of
from titans_scale.training import throughput
from titans_scale.training.checkpoint_folder import CheckpointFolder, seal
from titans_scale.training.loss import count_targets
from titans_scale.training.metrics import JsonLines, drop_records_after, log_line
from titans_scale.training.optimizer import build_optimizer
from titans_scale.training.schedule import learning_rate_factor

STEPS = 100


def factors(**settings):
    """Of steps 1 to STEPS."""
    config = LRSchedulerConfig(**settings)
    return [learning_rate_factor(config, step=step, steps=STEPS) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("name", ["cosine", "wsd", "linear"])
def test_every_schedule_rises_to_the_peak_and_ends_at_its_minimum(name):
    curve = factors(name=name, warmup_steps=10, min_ratio=0.1)
    assert curve[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert max(curve) == 1.0 and curve[-1] == pytest.approx(0.1)
    assert all(after <= before for before, after in itertools.pairwise(curve[9:]))


def test_cosine_and_linear_are_half_way_down_in_the_middle():
    assert factors(name="cosine", warmup_steps=0, min_ratio=0.0)[49] == pytest.approx(0.5)
    assert factors(name="linear", warmup_steps=0, min_ratio=0.0)[49] == pytest.approx(0.5)
    assert factors(name="cosine", warmup_steps=0, min_ratio=0.0)[24] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_wsd_stays_at_the_peak_until_its_last_part():
    curve = factors(name="wsd", warmup_steps=10, decay_ratio=0.2, min_ratio=0.0)
    assert set(curve[9:80]) == {1.0} and curve[89] == pytest.approx(0.5)


@pytest.mark.parametrize("settings", [{"warmup_steps": 500}, {"warmup_steps": 100}, {"warmup_steps": 0, "name": "wsd", "decay_ratio": 0.0}])
def test_a_run_shorter_than_its_schedule_has_a_factor_at_every_step(settings):
    assert all(0 < factor <= 1 for factor in factors(**settings))


def test_the_loss_is_a_sum_over_the_positions_with_a_target():
    logits, targets = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, -100, 4], [-100, -100, 0]])
    expected = -sum(logits[row, t].log_softmax(-1)[targets[row, t]] for row, t in ((0, 0), (0, 2), (1, 2)))
    assert cross_entropy_sum(logits, targets) == pytest.approx(expected.item(), rel=1e-6)
    assert count_targets([Batch(inputs=targets, targets=targets)] * 2) == 6


def test_matrices_decay_and_norms_and_initial_memories_do_not():
    config = small_config("data", "run")
    model = TitansLM(config.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, no_decay = build_optimizer(model, config.optimizer).param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (config.optimizer.weight_decay, 0.0)
    assert "blocks.0.memory.q_proj.weight" in {names[parameter] for parameter in decay["params"]}
    assert {"norm.weight", "blocks.0.memory.initial_weights.0"} <= {names[parameter] for parameter in no_decay["params"]}
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)


def test_records_after_the_resumed_step_and_half_written_ones_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "old": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "loss_me')
    drop_records_after(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl", resumed_step=0)
    sink.write(1, {"loss": math.nan, "lr": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "lr": 0.5}
    sink.close()


def test_the_console_line_has_torchtitans_form():
    record = {"loss_metrics/global_avg_loss": 7.012341, "grad_norm": 1.23456, "lr": 3e-4, "memory/max_reserved(GiB)": 30.123}
    record |= {"throughput(tps)": 45123.4, "tflops": 210.1, "mfu(%)": 21.24}
    expected = "step: 20  loss: 7.01234  grad_norm: 1.2346  lr: 3.00e-04  memory: 30.12GiB  tps: 45,123  tflops: 210  mfu: 21.24%"
    assert log_line(20, record) == expected


def test_speed_is_counted_over_training_time_alone(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    speed = throughput.Speedometer(torch.device("cpu"), flops_per_token=10**9, peak=1e13)
    for _ in range(2):
        with speed.loading():
            clock[0] += 0.5
        clock[0] += 1.5
        speed.count(tokens=1000)
    with speed.paused():
        clock[0] += 100
    metrics = speed.read()
    assert (metrics["throughput(tps)"], metrics["tflops"], metrics["mfu(%)"]) == (500, 0.5, 5)
    assert (metrics["time_metrics/end_to_end(s)"], metrics["time_metrics/data_loading(s)"]) == (2, 0.5)
    assert metrics["time_metrics/data_loading(%)"] == 25


@pytest.mark.parametrize(
    ("name", "tflops"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("Abacus", None)]
)
def test_the_peak_of_a_gpu_comes_from_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = throughput.peak_flops(torch.device("cuda", 0), "bfloat16", None)
    assert peak == (tflops * 1e12 if tflops else None)


def test_the_error_of_a_worker_is_told_without_its_traceback():
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\nValueError: cut short\n"
    )
    assert sentence_of(error) == "cut short"


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "manifest cut off"])
def test_a_checkpoint_that_lost_something_is_not_the_newest(tmp_path, damage):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        file = folder.begin(step) / "weights"
        file.write_bytes(b"12345678")
        folder.commit(step, [seal(file)])
    assert folder.newest_whole() == (2, [])
    spoilt = folder.checkpoint(2)
    if damage == "truncated":
        (spoilt / "weights").write_bytes(b"1234")
    elif damage == "missing":
        (spoilt / "weights").unlink()
    elif damage == "no manifest":
        (spoilt / "manifest.json").unlink()
    else:
        (spoilt / "manifest.json").write_bytes((spoilt / "manifest.json").read_bytes()[:20])
    step, complaints = folder.newest_whole()
    assert step == 1 and len(complaints) == 1 and "step-2 is damaged" in complaints[0]

"""The benchmarks run, say what they measured, and their measuring sticks measure. How fast anything is, no test may ask."""

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from titans_scale.evaluation.benchmarks import memory_cases, model_cases
from titans_scale.evaluation.benchmarks.measure import MIB, Step, Timing, matmul_peak, peak_extra_bytes, profile_of, time_in_turns
from titans_scale.evaluation.benchmarks.report import Report, Target, doublings, peers_installed, shown, table
from titans_scale.evaluation.benchmarks.sweep import sweep

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str) -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda arguments: module.main([str(argument) for argument in arguments])


def holding(mebibytes: float, tokens: int) -> Step:
    """A step that holds so much for every token, and lets it go."""
    return lambda: torch.ones(int(tokens * mebibytes * MIB / 4)).sum()


def assert_well_formed(report: dict, tables: dict[str, int]) -> None:
    """Each table has as many rows, all with the same columns; every target has a finite number and its verdict."""
    assert {heading: len(rows) for heading, rows in report["tables"].items()} == tables
    assert all(set(row) == set(rows[0]) for rows in report["tables"].values() for row in rows)
    for target in report["targets"]:
        assert set(target) == {"target", "wanted", "measured", "result", "met"}
        assert target["measured"] > 0 and target["result"] == ("met" if target["met"] else "missed")


def test_bench_memory_prints_and_writes_tables_and_targets(tmp_path, capsys):
    assert tool("bench_memory")(["--quick", "--skip-peers", "--json", tmp_path / "memory.json"]) == 0
    report = json.loads((tmp_path / "memory.json").read_text())
    rules = len(memory_cases.RULES)
    assert_well_formed(report, {"Whole layer": 1, "Scan alone, by write rule": rules, "Plain scan by length": 1})
    assert report["machine"]["float32 matmul peak, GFLOP/s"] > 0
    assert len(report["targets"]) == 3
    printed = capsys.readouterr().out
    assert all(target["target"] in printed for target in report["targets"])


def test_bench_model_prints_and_writes_a_row_for_each_model_asked_for(tmp_path, capsys):
    assert tool("bench_model")(["--quick", "--models", "MAG", "transformer", "--json", tmp_path / "model.json"]) == 0
    report = json.loads((tmp_path / "model.json").read_text())
    assert_well_formed(report, {"Training step": 2, "MAG beside a transformer of as many parameters": 1})
    assert [row["model"] for row in report["tables"]["Training step"]] == ["MAG", "transformer"]
    assert "tokens a CPU s" in capsys.readouterr().out


def test_bench_model_names_the_models_there_are(capsys):
    assert tool("bench_model")(["--models", "RNN"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'RNN'" in error and "'MAC', 'MAG', 'MAL', 'LMM', 'transformer'" in error


@pytest.mark.parametrize("name", ["bench_memory", "bench_model"])
def test_lengths_below_one_are_refused(name, capsys):
    with pytest.raises(SystemExit) as ended:
        tool(name)(["--tokens", "1024", "0"])
    assert ended.value.code == 2 and "--tokens, --longest and --repeats must be at least 1" in capsys.readouterr().err


def test_the_profile_shows_the_matrix_products():
    rows = profile_of(lambda: torch.ones(300, 300) @ torch.ones(300, 300))
    assert "aten::mm" in [row["operator"] for row in rows]
    assert sum(row["share %"] for row in rows) == pytest.approx(100)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process what it holds now")
def test_peak_memory_is_that_of_the_step_and_not_of_what_came_before():
    """128 MiB there; 64 MiB in its warm-up and 200 MiB here do not count. A tenth is room for what libraries allocate."""
    torch.ones(200 * MIB // 4)
    assert peak_extra_bytes(partial(holding, 0.25), 512, threads=1) == pytest.approx(128 * MIB, rel=0.1)


def test_steps_are_timed_in_turn_and_no_more_often_than_their_budget_allows():
    calls: list[str] = []

    def step(name: str, work: int) -> Step:
        return lambda: calls.append(name) or sum(range(work))  # type: ignore[func-returns-value]

    timings = time_in_turns({"short": step("short", 1), "long": step("long", 10**6)}, repeats=3, budget_seconds=1e-3)
    assert calls == ["short", "long", "short", "short"]
    assert len(timings["short"].cpu) == 3 and len(timings["long"].wall) == 1
    assert Timing(cpu=[3, 1, 2]).best == 1 and Timing(cpu=[3, 1, 2]).median == 2


def test_a_sweep_leaves_out_what_would_not_fit_or_take_too_long_and_says_so(monkeypatch):
    monkeypatch.setattr(f"{sweep.__module__}.available_bytes", lambda: 100.0)
    monkeypatch.setattr(f"{sweep.__module__}.LONGEST_STEP_SECONDS", 0.1)
    bytes_a_token = {"lean": 0.1, "greedy": 0.25, "slow": 0.1}
    monkeypatch.setattr(f"{sweep.__module__}.peak_extra_bytes", lambda prepare, tokens, threads: int(bytes_a_token[prepare(0)()] * tokens))
    cases = {"lean": lambda tokens: lambda: "lean", "greedy": lambda tokens: lambda: "greedy"}
    cases["slow"] = lambda tokens: lambda: "slow" if tokens == 0 else sum(range(tokens * 10**5))
    notes: list[str] = []
    first, second = sweep(cases, [512, 256], repeats=1, threads=1, notes=notes)
    assert (first.tokens, second.tokens) == (256, 512)
    assert set(first.timings) == set(first.extra_bytes) == {"lean", "greedy", "slow"}
    assert set(second.timings) == {"lean"} and set(second.extra_bytes) == {"lean", "slow"}
    assert [note.split(",")[0] for note in notes] == ["greedy at 512 tokens: left out", "slow at 512 tokens: not timed"]


def test_the_transformer_has_the_parameters_of_our_mag():
    """To half of the smallest step there is: 16 of the MLP's width in each layer."""
    step = 3 * model_cases.DIM * 16 * model_cases.LAYERS
    assert abs(model_cases.num_parameters("transformer") - model_cases.num_parameters("MAG")) <= step / 2


def test_the_transformer_is_causal():
    torch.manual_seed(0)
    _, logits = model_cases.build("transformer")
    tokens = torch.randint(model_cases.VOCAB, (1, 32))
    changed = tokens.clone()
    changed[0, 20] += 1
    before, after = logits(tokens), logits(changed % model_cases.VOCAB)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20:], after[:, 20:])


def test_scan_flops_leave_out_the_projections_and_grow_with_the_tokens():
    """The projections are counted by hand here: q, k, v, output gate and output of 256, and three gates of four heads."""
    projections = 3 * 2 * 1024 * 384 * (5 * 256 + 3 * 4)
    assert memory_cases.layer_flops(1024) - memory_cases.scan_flops(1024) == projections
    assert memory_cases.scan_flops(4096) == 4 * memory_cases.scan_flops(1024)


def test_a_target_is_met_on_its_own_side_only():
    assert Target(claim="", value=3.0, at_least=3).met and not Target(claim="", value=2.9, at_least=3).met
    assert Target(claim="", value=0.2, at_most=0.2).met and not Target(claim="", value=0.21, at_most=0.2).met


def test_numbers_are_shown_to_three_digits_and_columns_stand_in_line():
    assert [shown(x) for x in (12345, 1234.5, 12.345, 1.2345, 0.12345, 0.001234, None, "x")] == [
        "12,345",
        "1,234",
        "12.3",
        "1.23",
        "0.123",
        "0.0012",
        "-",
        "x",
    ]
    lines = table([{"name": "a", "value": 1}, {"name": "long name", "value": None}]).splitlines()
    assert lines == ["| name      | value |", "| --------- | ----: |", "| a         |     1 |", "| long name |     - |"]
    assert "- |" in Report(title="", machine={}, tables={"t": [{"x": None}]}).markdown()


def test_lengths_double_up_to_the_longest():
    assert doublings(5000) == [1024, 2048, 4096] and doublings(4096) == [1024, 2048, 4096] and doublings(300) == [300]


def test_the_peak_of_matrix_products_is_some_number_of_gigaflops():
    assert 1e8 < matmul_peak(repeats=1) < 1e14


@pytest.mark.skipif(not peers_installed(), reason="titans-pytorch is not installed")
@pytest.mark.parametrize("prepare", [*memory_cases.layers(peers=True).values(), *model_cases.models().values()])
def test_every_case_steps_twice(prepare):
    step = prepare(128)
    step()
    step()


def test_bench_data_prints_and_writes_every_table_and_adds_up_what_a_run_waited(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    times = [{"time_metrics/data_loading(s)": wait, "time_metrics/end_to_end(s)": 1.0} for wait in (9.0, 0.25, 0.75)]
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step, **record}) + "\n" for step, record in enumerate(times)))
    assert tool("bench_data")(["--quick", "--runs", run, "--json", tmp_path / "data.json"]) == 0
    report = json.loads((tmp_path / "data.json").read_text())
    tables = {"Reading": 3, "Start and resume": 1, "Tokenizing": 2, "data.reset_at_document": 4, "Waiting for data": 1}
    assert_well_formed(report, tables)
    assert report["targets"][0]["measured"] == 50
    assert "np.memmap loop" in capsys.readouterr().out


def test_bench_data_names_a_run_that_is_none(tmp_path, capsys):
    assert tool("bench_data")(["--quick", "--text_bytes", 0, "--runs", tmp_path]) == 2
    assert f"{tmp_path}/metrics.jsonl does not exist" in capsys.readouterr().err

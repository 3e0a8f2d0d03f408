"""The tools around a trained model: evaluate, generate, plot. One small run is trained for all of them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import make_data, small_config

from titans_scale.training.trainer import Trainer

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str) -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Trainer(small_config(make_data(folder / "tokens"), folder / "run", {"training.steps": 3, "metrics.memory_interval": 2})).run()
    return folder / "run"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {number}: abcdefgh\n"}) + "\n" for number in range(20)))
    return file


def test_evaluate_prints_and_writes_the_model_beside_gzip_and_xz(run, text, tmp_path, capsys):
    assert tool("evaluate")(["--checkpoint", run, "--text", text, "--output", tmp_path / "out" / "evaluation.json"]) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(result["bits_per_byte"]) == ["model", "gzip -9", "xz -9e"]
    assert result["bits_per_byte"]["model"] == pytest.approx(result["bits"] / result["num_bytes"])
    assert f"{result['bits_per_byte']['model']:.4f}" in capsys.readouterr().out


def test_evaluate_takes_no_more_text_than_it_is_told(run, text, tmp_path):
    tool("evaluate")(["--checkpoint", run / "checkpoint" / "step-3", "--text", text, "--max_bytes", 50, "--output", tmp_path / "out.json"])
    assert json.loads((tmp_path / "out.json").read_text())["num_bytes"] == 50


def test_generate_continues_the_prompt_and_repeats_itself_with_one_seed(run, tmp_path, capsys):
    sampled = []
    for _ in range(2):
        assert tool("generate")(["--checkpoint", run, "--prompt", "abc", "--max_new_tokens", 20, "--seed", 1]) == 0
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1]
    assert sampled[0].startswith("abc") and len(sampled[0]) > len("abc\n")


def test_generate_reads_a_prompt_file_and_writes_a_file(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("caf\u00e9")
    options = ["--prompt_file", tmp_path / "prompt.txt", "--max_new_tokens", 3, "--temperature", 0, "--output", tmp_path / "sample.txt"]
    assert tool("generate")(["--checkpoint", run, *options]) == 0
    assert (tmp_path / "sample.txt").read_text() == capsys.readouterr().out
    assert (tmp_path / "sample.txt").read_text().startswith("caf\u00e9")


def test_plot_writes_curves_into_the_run_folder(run, capsys):
    assert tool("plot")([run]) == 0
    assert capsys.readouterr().out.strip() == str(run / "curves.png")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name", ["bench_attention", "bench_loss", "bench_memory", "bench_model", "evaluate", "generate", "plot", "quickstart"]
)
def test_every_option_is_explained_in_the_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        tool(name)(["--help"])
    assert ended.value.code == 0
    options = capsys.readouterr().out.split("options:")[1].split("\n  -")[1:]
    assert options
    for option in options:
        assert len(option.split("  ")) > 1 or "\n" in option.strip(), f"no help for -{option}"


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("evaluate", ["--checkpoint", "nowhere", "--text", "{text}"], "there is no whole checkpoint in nowhere"),
        ("evaluate", ["--checkpoint", "{run}", "--text", "nowhere.txt"], "nowhere.txt does not exist"),
        ("evaluate", ["--checkpoint", "{run}", "--text", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ("evaluate", ["--checkpoint", "{run}", "--text", "{text}", "--batch_size", "0"], "batch_size is 0"),
        ("evaluate", ["--checkpoint", "{run}", "--text", "{text}", "--max_bytes", "0"], "there is no text"),
        ("evaluate", ["--checkpoint", "{run}", "--text", "{text}", "--tokenizer", "x.model"], "tokenizer 'x.model' is neither"),
        ("generate", ["--checkpoint", "{run}", "--prompt_file", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        ("generate", ["--checkpoint", "{run}", "--top_p", "2"], "top_p is 2.0"),
        ("generate", ["--checkpoint", "{run}", "--device", "warp"], "device 'warp' is not to be had here"),
        ("plot", ["nowhere"], "does not exist"),
    ],
)
def test_a_mistake_is_answered_with_one_sentence(name, arguments, sentence, run, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tool(name)([argument.format(run=run, text=text) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{name}: ") and sentence in message and message.count("\n") == 1


def test_a_run_whose_shards_are_gone_asks_for_its_tokenizer(run, text, tmp_path, capsys):
    shards = run.parent / "tokens"
    shards.rename(tmp_path / "elsewhere")
    try:
        assert tool("generate")(["--checkpoint", run]) == 2
        assert "name it with --tokenizer" in capsys.readouterr().err
        assert tool("generate")(["--checkpoint", run, "--tokenizer", "byte", "--max_new_tokens", 1]) == 0
    finally:
        (tmp_path / "elsewhere").rename(shards)

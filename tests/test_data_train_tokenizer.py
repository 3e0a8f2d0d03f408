import gzip
import importlib.util
import json
import os
from pathlib import Path

import pytest

from titans_scale.data import load_tokenizer

TOOL = Path(__file__).parents[1] / "tools" / "train_tokenizer.py"
TEXTS = [f"Text number {number}.\nThe memory learns, the memory forgets.\n" * 5 for number in range(120)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Run the tool as a user in an empty folder would: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    specification = importlib.util.spec_from_file_location("train_tokenizer", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def train(*arguments):
        code = module.main([*map(str, arguments), "--vocab_size", "300"])
        return code, *capsys.readouterr()

    return train


def test_every_kind_of_input_with_the_same_texts_trains_the_same_model(train, tmp_path):
    (tmp_path / "lines.jsonl").write_text(LINES)
    (tmp_path / "lines.ndjson.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "renamed.jsonl").write_text(LINES.replace('"text"', '"body"'))
    (tmp_path / "text.txt").write_text("<|end|>".join(TEXTS))
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (tmp_path / "folder" / "deep" / f"{number:03d}").write_text(text)
    ways = {
        "a": ["lines.jsonl"],
        "b": ["*.gz"],
        "c": ["renamed.jsonl", "--text_key", "body"],
        "d": ["text.txt", "--split_text_on", "<|end|>"],
        "e": ["folder"],
    }
    for name, arguments in ways.items():
        assert train(*arguments, "--output", f"{name}.model") == (0, f"wrote {name}.model: 300 tokens\n", "")
    assert len({load_tokenizer(f"{name}.model").fingerprint for name in ways}) == 1


def test_standard_input_is_read_once_and_never_taken_for_the_same(train, monkeypatch, tmp_path):
    (tmp_path / "lines.jsonl").write_text(LINES)
    for _ in range(2):
        code, _, err = read_from(tmp_path / "lines.jsonl", lambda: train("-", "--output", "a.model"))
    assert code == 2 and "a.model is there, made of another text or in another way; use --overwrite" in err
    train("lines.jsonl", "--output", "b.model")
    assert load_tokenizer("a.model").fingerprint == load_tokenizer("b.model").fingerprint


@pytest.mark.parametrize("change", [["--max_bytes", "5000"], ["--character_coverage", "0.9"], ["--text_key", "other"], ["more.txt"]])
def test_another_text_or_another_option_needs_overwrite_and_the_same_is_said(train, tmp_path, change):
    (tmp_path / "lines.jsonl").write_text(LINES.replace('"text"', '"other": "short", "text"'))
    (tmp_path / "more.txt").write_text("more")
    train("lines.jsonl")
    model = Path("data/tokenizer.model").read_bytes()
    assert train("lines.jsonl") == (0, "already there: data/tokenizer.model, 300 tokens\n", "")
    code, out, err = train("lines.jsonl", *change)
    assert (code, out) == (2, "") and "use --overwrite, or another --output" in err
    assert Path("data/tokenizer.model").read_bytes() == model


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["bad.jsonl"], "line 2 of bad.jsonl is not JSON"),
        (["cut.jsonl.gz"], "cut.jsonl.gz is damaged or cut short"),
        (["lines.jsonl", "--text_key", "body"], 'line 1 of lines.jsonl is not a JSON object with a "body"'),
        (["lines.jsonl", "--character_coverage", "2"], "character_coverage is 2.0; it must be"),
        (["lines.jsonl", "--max_bytes", "0"], "max_bytes is 0; it must be at least 1"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence_and_nothing_is_written(train, tmp_path, arguments, sentence):
    (tmp_path / "lines.jsonl").write_text(LINES)
    (tmp_path / "bad.jsonl").write_text(LINES.splitlines()[0] + "\n{cut")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    code, out, err = train(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("train_tokenizer: ") and sentence in err and err.count("\n") == 1
    assert not Path("data").exists()


def test_ctrl_c_while_reading_is_one_sentence(train, monkeypatch, tmp_path):
    (tmp_path / "lines.jsonl").write_text(LINES)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("titans_scale.data.text.inputs.document_of", interrupted)
    assert train("lines.jsonl") == (130, "", "train_tokenizer: stopped; nothing was written\n")
    assert not Path("data").exists()


def read_from(file, action):
    """With a file as this process's standard input."""

    before = os.dup(0)
    with file.open("rb") as stream:
        os.dup2(stream.fileno(), 0)
    try:
        return action()
    finally:
        os.dup2(before, 0)
        os.close(before)

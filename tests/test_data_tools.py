import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titans_scale.data import open_split

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a tool as a user in an empty folder would: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(tool, *arguments):
        specification = importlib.util.spec_from_file_location(tool, TOOLS / f"{tool}.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        try:
            code = module.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse leaves by itself
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(120):
        (folder / f"{number}.txt").write_text(f"Text number {number}.\nThe memory learns, the memory forgets.\n" * 5)
    (folder / "picture.png").write_bytes(bytes(range(256)))
    return folder


def test_three_commands_without_options_lead_from_text_to_shards_and_may_be_repeated(run, text_folder):
    code, out, err = run("make_corpus", text_folder)
    assert (code, err) == (0, "")
    assert "wrote:" in out and "skipped: 1 not text" in out
    code, out, err = run("train_tokenizer", "--vocab_size", 300)
    assert (code, out, err) == (0, "wrote data/tokenizer.model: 300 tokens\n", "")
    code, out, err = run("make_shards", "--sequence_length", 64)
    assert (code, err) == (0, "")
    assert "data/tokens/train wrote, at" in out
    for split in ("train", "validation"):
        assert open_split("data/tokens", split).load_tokenizer().vocab_size == 300
    assert "already there, unchanged" in run("make_corpus", text_folder)[1]
    assert run("train_tokenizer", "--vocab_size", 300)[:2] == (0, "already there: data/tokenizer.model, 300 tokens\n")
    assert run("make_shards", "--sequence_length", 64)[1].count("already there") == 2


@pytest.mark.parametrize(
    ("tool", "arguments", "sentence"),
    [
        ("make_corpus", ["nowhere"], "nowhere is neither a file nor a folder"),
        ("make_corpus", ["texts", "--include", "*.rst"], "found no text"),
        ("make_corpus", ["texts", "--output", "texts"], "is the folder of the text itself"),
        ("make_corpus", ["texts/1.txt", "--output", "texts"], "is the folder of the text itself"),
        ("make_corpus", ["texts", "--max_bytes", "1"], "max_bytes is 1"),
        ("train_tokenizer", [], "data/corpus/train.jsonl does not exist; make a corpus with"),
        ("make_shards", [], "'data/tokenizer.model' is neither 'byte' nor a file"),
        ("make_shards", ["--tokenizer", "byte"], "data/corpus/train.jsonl does not exist; make a corpus with"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence_with_exit_code_2(run, text_folder, tool, arguments, sentence):
    code, out, err = run(tool, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"{tool}: ") and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("tool", ["make_corpus", "train_tokenizer", "make_shards", "verify_shards"])
def test_a_misspelt_option_is_named(run, tool):
    code, _, err = run(tool, *(["folder"] if tool == "verify_shards" else []), "--overwrit")
    assert code == 2
    assert "unrecognized arguments: --overwrit" in err


@pytest.mark.parametrize("tool", ["make_corpus", "train_tokenizer", "make_shards", "verify_shards"])
def test_help_explains_every_option(run, tool):
    code, out, _ = run(tool, "--help")
    assert code == 0
    options = out.split("options:")[1].split("\n  -")[1:]
    assert len(options) > 3
    assert all(len(" ".join(option.split()).rsplit("]", 1)[-1].split()) > 3 for option in options)


def test_a_corpus_inside_the_folder_of_the_texts_does_not_feed_on_itself(run, text_folder):
    run("make_corpus", text_folder, "--output", text_folder / "corpus")
    assert "already there, unchanged" in run("make_corpus", text_folder, "--output", text_folder / "corpus")[1]


def test_other_settings_need_overwrite_and_then_replace_both_splits(run, text_folder):
    run("make_corpus", text_folder)
    run("make_shards", "--tokenizer", "byte", "--sequence_length", 64)
    code, _, err = run("make_shards", "--tokenizer", "byte", "--sequence_length", 32)
    assert code == 2 and "data/tokens/train holds shards made with sequence_length 64, not 32; use --overwrite" in err
    assert run("make_shards", "--tokenizer", "byte", "--sequence_length", 32, "--overwrite")[0] == 0
    assert [open_split("data/tokens", split).sequence_length for split in ("train", "validation")] == [32, 32]
    run("train_tokenizer", "--vocab_size", 300)
    assert "use --overwrite" in run("train_tokenizer", "--vocab_size", 290)[2]
    assert run("train_tokenizer", "--vocab_size", 290, "--overwrite")[0] == 0


def test_a_corpus_without_a_validation_split_makes_shards_for_training_alone(run, text_folder):
    run("make_corpus", text_folder)
    Path("data/corpus/validation.jsonl").unlink()
    code, out, _ = run("make_shards", "--tokenizer", "byte")
    assert code == 0 and "no validation split" in out
    assert not Path("data/tokens/validation").exists()


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(run, text_folder):
    folder = Path("data/corpus")
    folder.mkdir(parents=True)
    folder.joinpath("train.jsonl").write_text('{"text": "%s"}\n' % ("some words " * 100_000) * 25)  # seconds of work
    command = [sys.executable, TOOLS / "make_shards.py", "--tokenizer", "byte", "--samples_per_shard", "100", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(600):
        if Path("data/tokens/train/000001.tar").exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "make_shards: stopped; finished shards are kept, and the same command goes on from there\n"
    with pytest.raises(ValueError, match="never finished"):
        open_split("data/tokens", "train")
    written = Path("data/tokens/train/000000.tar").stat().st_mtime_ns
    assert run("make_shards", "--tokenizer", "byte", "--samples_per_shard", 100)[0] == 0
    assert open_split("data/tokens", "train").index.documents == 25
    assert Path("data/tokens/train/000000.tar").stat().st_mtime_ns == written


def test_verify_ends_with_0_where_all_is_well_and_with_1_and_a_line_for_each_finding_where_it_is_not(run, text_folder):
    (text_folder / "picture.png").unlink()
    run("make_shards", text_folder, "--tokenizer", "byte", "--sequence_length", 64, "--validation_fraction", 0.2, "--workers", 1)
    code, out, err = run("verify_shards", "data/tokens", "--workers", 1, "--show", 1)
    assert (code, err) == (0, "")
    assert out.endswith(" bytes of shards\n") and "nothing is wrong with" in out and out.count("The memory learns") >= 2
    assert run("make_shards", "--info", "data/tokens")[1].count("fingerprint") == 2
    shard = Path("data/tokens/train/000000.tar")
    shard.write_bytes(b"?" + shard.read_bytes()[1:])
    code, out, _ = run("verify_shards", "data/tokens", "--workers", 1)
    assert code == 1
    first, second, summary = out.splitlines()
    assert "has SHA-256" in first and "000000000.npy" in second and summary.startswith("findings: 2 in")
    assert run("verify_shards", "data/tokens", "--quick")[0] == 0
    assert run("verify_shards", "nowhere")[::2] == (2, "verify_shards: nowhere is not a folder; name one that tools/make_shards.py wrote\n")


@pytest.mark.parametrize("validation_fraction", [0, 0.3])
def test_shards_are_made_of_a_folder_of_texts_without_a_corpus(run, text_folder, validation_fraction):
    (text_folder / "picture.png").unlink()
    options = ["--tokenizer", "byte", "--workers", 1, "--validation_fraction", validation_fraction]
    code, out, err = run("make_shards", text_folder, *options)
    assert (code, err) == (0, "")
    assert ("no validation split was made" in out) == (validation_fraction == 0)
    splits = ["train", "validation"] if validation_fraction else ["train"]
    assert sum(open_split("data/tokens", split).index.documents for split in splits) == 120
    assert run("make_shards", text_folder, *options)[1].count("already there") == len(splits)

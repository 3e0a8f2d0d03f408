"""Making splits of files: the same bytes whatever the processes, the batches and the kills; and what is refused."""

import functools
import gzip
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from titans_scale.data import ByteTokenizer, make_split, train_sentencepiece
from titans_scale.data.shards.index import load_index
from titans_scale.data.shards.info import describe
from titans_scale.data.shards.making import plan_splits
from titans_scale.data.shards.tokenizing import RecordBatches
from titans_scale.data.shards.verify import Verifier
from titans_scale.data.text.inputs import Record, find_inputs

TOOL = Path(__file__).parents[1] / "tools" / "make_shards.py"
EOS = ByteTokenizer.eos_id


def texts(count=60):
    source = random.Random(1)
    return ["".join(source.choices("abcdef \u8a18\U0001f642\n", k=source.randint(0, 120))) for _ in range(count)]


def write_lines(file, documents):
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    os.utime(file, (1, 1))  # in the index is a stamp of the file's time of change
    return file


@pytest.fixture
def lines(tmp_path):
    return write_lines(tmp_path / "lines.jsonl", texts())


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("titans_scale.data.shards.tokenizing.BATCH_BYTES", 300)


def make(paths, folder, *, split="train", sequence_length=16, samples_per_shard=8, reading=None, **options):
    inputs = find_inputs(paths if isinstance(paths, list) else [paths], **(reading or {}))
    options = {"tokenizer": ByteTokenizer(), **options}
    return make_split(inputs, folder / split, sequence_length=sequence_length, samples_per_shard=samples_per_shard, **options)


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"}


def stream(folder, split="train"):
    """All tokens of a split, read with nothing of ours."""
    tokens = []
    for file in sorted((folder / split).glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                sample = np.load(io.BytesIO(tar.extractfile(member).read())).tolist()
                tokens += sample[1:] if tokens else sample
    return tokens


def tokens_of(documents):
    return [EOS, *itertools.chain(*([*text.encode(), EOS] for text in documents if text.strip()))]


def test_the_shards_hold_every_document_that_has_text(lines, tmp_path):
    index = make(lines, tmp_path / "out")
    documents = [text for text in texts() if text.strip()]
    assert len(index.shards) > 5
    assert stream(tmp_path / "out") == tokens_of(documents)
    assert (index.documents, index.text_bytes) == (len(documents), sum(len(text.encode()) for text in documents))
    assert list(Verifier().folders([tmp_path / "out"])) == []


@pytest.mark.parametrize(("workers", "batch_bytes"), [(1, 1), (1, 1 << 20), (2, 200), (3, 1), (3, 1000)])
def test_processes_and_batches_change_no_byte(lines, tmp_path, monkeypatch, workers, batch_bytes):
    make(lines, tmp_path / "plain")
    monkeypatch.setattr("titans_scale.data.shards.tokenizing.BATCH_BYTES", batch_bytes)
    make(lines, tmp_path / "other", workers=workers)
    assert content(tmp_path / "other") == content(tmp_path / "plain")


def source_of(*parts):
    records = RecordBatches(Record("text", part, "file", number) for number, part in enumerate(parts, start=1))
    records.skip()
    return records.source


def test_the_hash_of_an_input_knows_where_its_documents_end(monkeypatch):
    sources = [source_of(b"ab", b"c"), source_of(b"a", b"bc"), source_of(b"abc"), source_of(b"abc", b"")]
    assert len(set(sources)) == 4
    monkeypatch.setattr("titans_scale.data.shards.tokenizing.BATCH_BYTES", 1)
    assert source_of(b"ab", b"c") == sources[0]


def killed(call, *, folder, at):
    """Run it in a process that is killed before its file operation number `at` in the folder; whether it came that far."""
    process = os.fork()
    if process == 0:
        operations = itertools.count(1)

        def count(event, arguments):
            is_ours = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate") and str(folder) in str(arguments[0])
            if is_ours and next(operations) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        call()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def assert_only_whole_shards(folder, whole):
    for name, data in content(folder).items():
        if not Path(name).name.startswith("."):
            assert data == whole[name], name


def test_a_kill_before_any_file_operation_leaves_only_whole_shards_and_the_same_bytes_in_the_end(lines, tmp_path):
    make = functools.partial(globals()["make"], samples_per_shard=60)
    make(lines, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    for at in itertools.count(1):
        folder = tmp_path / f"killed{at}"
        was_killed = killed(lambda folder=folder: make(lines, folder), folder=folder, at=at)
        assert_only_whole_shards(folder, whole)
        assert ("train/index.json" in content(folder)) <= (len(content(folder)) >= len(whole))
        make(lines, folder)
        assert content(folder) == whole
        if not was_killed:
            break
    assert at > 4 * len(whole)


def test_many_kills_in_a_row_end_with_the_same_bytes(lines, tmp_path):
    make(lines, tmp_path / "whole")
    folder = tmp_path / "killed"
    for _kills in range(100):
        if not killed(lambda: make(lines, folder), folder=folder, at=25):
            break
        assert_only_whole_shards(folder, content(tmp_path / "whole"))
    assert _kills > 3
    assert content(folder) == content(tmp_path / "whole")


class CountingTokenizer(ByteTokenizer):
    """Counts what it encodes, and raises when it has had enough."""

    def __init__(self, most=10**9):
        self.characters = 0
        self.most = most

    def encode_pieces(self, pieces):
        self.characters += sum(map(len, pieces))
        if self.characters > self.most:
            raise KeyboardInterrupt
        return super().encode_pieces(pieces)


def stopped(lines, folder, *, after, **options):
    with pytest.raises(KeyboardInterrupt):
        make(lines, folder, tokenizer=CountingTokenizer(most=after), **options)


def test_what_is_finished_is_neither_tokenized_nor_written_again(lines, tmp_path):
    folder, characters = tmp_path / "out", sum(map(len, texts()))
    stopped(lines, folder, after=characters * 2 // 3)
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "train").glob("*.tar")}
    assert len(before) > 10
    tokenizer = CountingTokenizer()
    make(lines, folder, tokenizer=tokenizer)
    assert tokenizer.characters < characters // 2
    assert before.items() <= {file.name: file.stat().st_mtime_ns for file in (folder / "train").glob("*.tar")}.items()
    assert stream(folder) == tokens_of(texts())


@pytest.mark.parametrize("batch_bytes", [1, 100, 1 << 20])
def test_batches_of_another_size_after_a_stop_change_no_byte(lines, tmp_path, monkeypatch, batch_bytes):
    make(lines, tmp_path / "whole")
    stopped(lines, tmp_path / "out", after=2000)
    monkeypatch.setattr("titans_scale.data.shards.tokenizing.BATCH_BYTES", batch_bytes)
    make(lines, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_leftovers_of_another_run_go_and_what_is_not_ours_stays(lines, tmp_path):
    make(lines, tmp_path / "whole")
    train = tmp_path / "out" / "train"
    train.mkdir(parents=True)
    for name in ("000099.tar", ".000099.tar.unfinished", ".index.json.unfinished", "notes.tar"):
        (train / name).write_text("left over")
    make(lines, tmp_path / "out")
    assert content(tmp_path / "out") == {**content(tmp_path / "whole"), "train/notes.tar": b"left over"}


def test_a_shard_that_the_disk_lost_is_made_anew_with_all_after_it(lines, tmp_path):
    make(lines, tmp_path / "whole")
    stopped(lines, tmp_path / "out", after=2000)
    (tmp_path / "out" / "train" / "000003.tar").write_bytes(b"")
    make(lines, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_line_of_the_journal_that_was_cut_off_is_not_believed(lines, tmp_path):
    make(lines, tmp_path / "whole")
    stopped(lines, tmp_path / "out", after=2000)
    journal = tmp_path / "out" / "train" / ".progress.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert killed(lambda: make(lines, tmp_path / "out"), folder=tmp_path / "out", at=25)
    make(lines, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("change", ["another first line", "fewer lines"])
def test_an_input_that_is_another_than_that_of_the_finished_shards_is_refused(lines, tmp_path, change):
    stopped(lines, tmp_path / "out", after=2000)
    before = content(tmp_path / "out")
    write_lines(lines, ["new", *texts()[1:]] if change == "another first line" else texts()[:5])
    with pytest.raises(ValueError, match=r"the input is not what the finished shards in .* were made of: its first .* documents differ"):
        make(lines, tmp_path / "out")
    assert content(tmp_path / "out") == before
    make(lines, tmp_path / "out", overwrite=True)
    make(lines, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("after", [2000, 10**9], ids=["stopped", "killed before the index"])
def test_an_input_that_has_grown_since_is_gone_on_with(lines, tmp_path, after, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("titans_scale.data.shards.making.finish", stop)
        stopped(lines, tmp_path / "out", after=after)
    write_lines(lines, [*texts(), *texts()[::-1]])
    make(lines, tmp_path / "out")
    make(lines, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sequence_length": 17}, "with sequence_length 16, not 17"),
        ({"samples_per_shard": 9}, "with samples_per_shard 8, not 9"),
        ({"validation_fraction": 0.1}, r"with validation_fraction 0\.0, not 0\.1"),
        ({"on_bad_document": "skip"}, "with on_bad_document 'raise', not 'skip'"),
        ({"reading": {"text_key": "body"}}, "with text_key 'text', not 'body'"),
        ({"reading": {"split_text_on": "\n\n"}}, "with split_text_on None, not"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_by_name(lines, tmp_path, change, sentence, finished):
    make(lines, tmp_path / "out") if finished else stopped(lines, tmp_path / "out", after=2000)
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"holds shards made {sentence}.*; use --overwrite"):
        make(lines, tmp_path / "out", **change)
    assert content(tmp_path / "out") == before


def test_another_tokenizer_is_refused_beside_shards_of_any_split(lines, tmp_path):
    other = train_sentencepiece(["some words " * 20], tmp_path / "made.model", 266)
    stopped(lines, tmp_path / "out", after=2000)
    with pytest.raises(ValueError, match="holds shards made with another tokenizer"):
        make(lines, tmp_path / "out", tokenizer=other)
    make(lines, tmp_path / "out")
    with pytest.raises(ValueError, match=r"the split 'train' beside .* was written with another tokenizer"):
        make(lines, tmp_path / "out", split="test", tokenizer=other)


def test_a_finished_split_is_not_read_again_unless_its_files_were_touched(lines, tmp_path, monkeypatch):
    index = make(lines, tmp_path / "out")
    with monkeypatch.context() as context:
        context.setattr("titans_scale.data.shards.tokenizing.RecordBatches.skip", lambda self: pytest.fail("it was read"))
        assert make(lines, tmp_path / "out") == index
    os.utime(lines, (2, 2))
    touched = make(lines, tmp_path / "out", tokenizer=CountingTokenizer(most=0))
    assert touched.shards == index.shards and touched.inputs != index.inputs
    assert load_index(tmp_path / "out" / "train") == touched
    write_lines(lines, [*texts(), "more"])
    with pytest.raises(ValueError, match="holds shards made of another corpus; use --overwrite"):
        make(lines, tmp_path / "out")


def test_validation_takes_what_training_leaves_and_copies_of_a_text_are_on_one_side(tmp_path):
    documents = [f"document {number}" for number in range(1000)] * 2
    lines = write_lines(tmp_path / "lines.jsonl", documents)
    held_out, rest = (make(lines, tmp_path / "out", split=split, validation_fraction=0.1) for split in ("validation", "train"))
    assert held_out.documents + rest.documents == 2000
    assert 140 < held_out.documents < 260  # 200 expected, in pairs: 4 standard deviations are 76
    sides = [
        {tuple(group) for is_eos, group in itertools.groupby(stream(tmp_path / "out", split), EOS.__eq__) if not is_eos}
        for split in ("validation", "train")
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 1000
    assert list(Verifier().folders([tmp_path / "out"])) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_split_that_could_hold_documents_of_the_validation_split_beside_it_is_refused(lines, tmp_path, overwrite):
    make(lines, tmp_path / "out", split="validation", validation_fraction=0.5)
    with pytest.raises(ValueError, match=r"validation_fraction 0\.5 and this split would be with 0\.0, so documents could be in both"):
        make(lines, tmp_path / "out", validation_fraction=0.0, overwrite=overwrite)
    make(lines, tmp_path / "out", validation_fraction=0.5)


def test_a_fraction_that_leaves_no_document_is_named(lines, tmp_path):
    with pytest.raises(ValueError, match=r"none of the 60 documents is left for the split 'validation' with validation_fraction 1e-09"):
        make(lines, tmp_path / "out", split="validation", validation_fraction=1e-9)
    make(lines, tmp_path / "out", split="validation", validation_fraction=0.5)


@pytest.mark.parametrize("bad", [b'{"text": "cut', b'{"body": 1}', b'{"text": "\xff"}'], ids=["json", "key", "UTF-8"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_document_is_named_or_counted(lines, tmp_path, bad, workers):
    with lines.open("ab") as file:
        file.write(bad + b"\n" + b'{"text": "the last"}\n')
    with pytest.raises(ValueError, match=r"line 61 of .*lines\.jsonl"):
        make(lines, tmp_path / "out", workers=workers)
    indexes = [
        make(lines, tmp_path / "out", split=split, on_bad_document="skip", validation_fraction=0.3, overwrite=True)
        for split in ("validation", "train")
    ]
    assert sum(index.skipped for index in indexes) == 1
    assert sum(index.documents for index in indexes) == len([text for text in texts() if text.strip()]) + 1


def others_tar(file, arrays):
    with tarfile.open(file, "w") as tar:
        for number, ids in enumerate(arrays):
            buffer = io.BytesIO()
            np.save(buffer, np.array(ids, np.int64))
            entry = tarfile.TarInfo(f"{number}.npy")
            entry.size = len(buffer.getvalue())
            tar.addfile(entry, io.BytesIO(buffer.getvalue()))
    return file


def test_token_ids_of_others_are_taken_as_they_are_with_one_end_each(tmp_path):
    file = others_tar(tmp_path / "ids.tar", [[1, 2, 3], [EOS, 4, EOS, 5, EOS, EOS], [], [EOS], [256 - 1]])
    index = make(file, tmp_path / "out")
    assert stream(tmp_path / "out") == [EOS, 1, 2, 3, EOS, 4, EOS, 5, EOS, 255, EOS]
    assert (index.documents, index.text_bytes) == (4, 0)


@pytest.mark.parametrize("ids", [[1, 257], [-1, 5]], ids=str)
def test_token_ids_past_the_vocabulary_are_named(tmp_path, ids):
    file = others_tar(tmp_path / "ids.tar", [[1, 2], ids])
    with pytest.raises(
        ValueError, match=r"number 2 of .*ids\.tar holds token ids from -?\d+ to \d+; those of the tokenizer byte are 0 to 256"
    ):
        make(file, tmp_path / "out")


def test_a_second_writer_is_refused(lines, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".train.lock"), pytest.raises(ValueError, match="another process is writing shards into"):
        make(lines, tmp_path / "out")


@pytest.mark.parametrize(("at", "kept"), [(3, 1), (9, 4)])
def test_a_full_disk_keeps_the_finished_shards_and_the_next_run_goes_on(lines, tmp_path, monkeypatch, at, kept):
    make(lines, tmp_path / "whole")
    calls, real = itertools.count(1), os.fsync

    def full(descriptor):
        if next(calls) == at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as context:
        context.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"No space left on device"):
            make(lines, tmp_path / "out")
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) == kept
    make(lines, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


class DeadlyTokenizer(ByteTokenizer):
    """As if the system had killed its process for want of memory."""

    def encode_pieces(self, pieces):
        if any("deadly" in piece for piece in pieces):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_pieces(pieces)


def test_a_killed_process_is_one_sentence_and_finished_shards_are_kept(lines, tmp_path):
    write_lines(lines, [*texts(), *texts(), "deadly", *texts()])
    with pytest.raises(ChildProcessError, match="one of 2 worker processes was killed, perhaps for want of memory"):
        make(lines, tmp_path / "out", tokenizer=DeadlyTokenizer(), workers=2)
    assert (tmp_path / "out" / "train" / "000000.tar").exists()
    make(lines, tmp_path / "out")
    make(lines, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_info_says_what_is_there_and_how_far_an_unfinished_split_got(lines, tmp_path):
    index = make(lines, tmp_path / "out", split="validation")
    stopped(lines, tmp_path / "out", after=2000)
    said = describe(tmp_path / "out")
    for fact in (f"{index.samples:,} of 16 tokens", f"{index.documents:,}", "byte", "vocabulary 257", index.fingerprint, "lines.jsonl"):
        assert fact in said
    shards = len(list((tmp_path / "out" / "train").glob("*.tar")))
    assert f"unfinished   {shards} shards with {shards * 8} samples" in said
    with pytest.raises(ValueError, match="there are no token shards in"):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"paths": ["-"]}, "standard input can be read but once, for one split; give --validation_fraction 0"),
        ({"paths": ["-"], "split": "validation"}, "all documents are for validation; give --validation_fraction 0"),
        ({"paths": ["-"], "corpus": Path("corpus")}, "--corpus corpus and other inputs cannot go together"),
        ({"paths": ["-"], "split": "../train"}, r"--split is '\.\./train'; use letters, digits, - and _ only"),
        ({"paths": []}, r"data/corpus/train\.jsonl does not exist; make a corpus with tools/make_corpus\.py, or name files"),
    ],
)
def test_splits_that_cannot_be_are_refused(options, sentence):
    usual = {"corpus": None, "format": "auto", "text_key": "text", "split_text_on": None, "split": "train", "validation_fraction": 0.1}
    with pytest.raises(ValueError, match=sentence):
        plan_splits(**{**usual, **options})


def tool(*arguments, **options):
    """The tool as a process of its own; its options are those of Popen."""
    command = [sys.executable, TOOL, *map(str, arguments), "--tokenizer", "byte", "--sequence_length", "256", "--samples_per_shard", "64"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def end_of(process, stdin=None):
    out, err = process.communicate(stdin, timeout=60)
    return process.returncode, out.decode(), err.decode()


def descendants(pid):
    children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return children + [further for child in children for further in descendants(child)]


def kill_when_shards_are_there(process, folder, shards):
    """Kill -9 once there are so many shards, or when it is done; the processes that it had started."""
    while process.poll() is None and len(list((folder / "train").glob("*.tar"))) < shards:
        time.sleep(0.005)
    children = descendants(process.pid) if process.poll() is None else []
    process.kill()
    process.communicate()
    return children


@pytest.fixture
def long_lines(tmp_path):
    return write_lines(tmp_path / "long.jsonl", texts(20_000))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds child processes in /proc")
def test_kill_9_of_the_tool_leaves_no_process_and_the_next_run_ends_with_the_same_bytes(long_lines, tmp_path):
    make(long_lines, tmp_path / "whole", sequence_length=256, samples_per_shard=64)
    arguments = [long_lines, "--validation_fraction", 0, "--output", tmp_path / "out", "--workers"]
    children = kill_when_shards_are_there(tool(*arguments, 2), tmp_path / "out", 10)
    assert len(children) >= 2
    assert_only_whole_shards(tmp_path / "out", content(tmp_path / "whole"))
    deadline = time.monotonic() + 20
    while (left := [child for child in children if Path(f"/proc/{child}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert end_of(tool(*arguments, 1))[0] == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
def test_twenty_kills_of_the_tool_with_other_numbers_of_workers_end_with_the_same_bytes(long_lines, tmp_path):
    make(long_lines, tmp_path / "whole", sequence_length=256, samples_per_shard=64)
    shards = len(load_index(tmp_path / "whole" / "train").shards)
    arguments = [long_lines, "--validation_fraction", 0, "--output", tmp_path / "out", "--workers"]
    for kill in range(20):
        kill_when_shards_are_there(tool(*arguments, 1 + kill % 3), tmp_path / "out", shards * kill // 20)
        assert_only_whole_shards(tmp_path / "out", content(tmp_path / "whole"))
    assert end_of(tool(*arguments, 2))[0] == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_every_kind_of_input_gives_the_same_tokens(tmp_path):
    pyarrow, parquet, zstandard = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet", "zstandard"))
    documents = [text for text in texts(30) if text.strip()]
    plain = write_lines(tmp_path / "plain.jsonl", documents).read_bytes()
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "packed.jsonl.zst").write_bytes(zstandard.compress(plain))
    (tmp_path / "text.txt").write_text("<end>".join(documents), newline="")
    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "table.parquet")
    usual = ["--workers", 1, "--validation_fraction", 0]
    for name in ("packed.jsonl.gz", "packed.jsonl.zst", "text.txt", "table.parquet"):
        code, out, err = end_of(tool(tmp_path / name, *usual, "--split_text_on", "<end>", "--output", tmp_path / f"of {name}"))
        assert (code, err) == (0, "") and f"documents {len(documents)}" in out
        assert stream(tmp_path / f"of {name}") == tokens_of(documents), name
    process = tool("-", *usual, "--output", tmp_path / "of a pipe", stdin=subprocess.PIPE)
    assert end_of(process, plain)[0] == 0
    assert stream(tmp_path / "of a pipe") == tokens_of(documents)
    assert "already there" in end_of(tool("-", *usual, "--output", tmp_path / "of a pipe", stdin=subprocess.PIPE), plain)[1]


def test_shards_are_made_without_torch(lines, tmp_path):
    options = ["--tokenizer", "byte", "--validation_fraction", "0", "--workers", "1", "--output", str(tmp_path / "out")]
    program = f"""
import runpy, sys
sys.argv = [{str(TOOL)!r}, {str(lines)!r}, *{options!r}]
try:
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
except SystemExit as end:
    sys.exit(end.code or "torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert (tmp_path / "out" / "train" / "index.json").exists()

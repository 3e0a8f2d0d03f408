import errno
import gc
import json
import logging
import os
import pickle
import shutil
import time
from itertools import pairwise

import pytest
import torch
from tenacity import nap
from torch.utils.data import DataLoader

from titans_scale.config import DataConfig
from titans_scale.data import ByteTokenizer, open_split, write_shards
from titans_scale.data.files import sha256_of_file
from titans_scale.data.reading.faults import ReadError, ReadPolicy
from titans_scale.parallel.context import sentence_of

SEQUENCE_LENGTH = 8
TEXT = "".join(chr(ord("a") + number % 26) for number in range(100))
"""With both its ends 102 tokens: twelve full samples in three shards and one short one in a fourth."""
NO_WAIT = {"retry_seconds": 0.0}


@pytest.fixture
def folder(tmp_path):
    write_shards([TEXT], tmp_path / "train", tokenizer=ByteTokenizer(), sequence_length=SEQUENCE_LENGTH, samples_per_shard=4)
    return tmp_path


def opened(folder, **policy):
    return open_split(folder, "train", policy=ReadPolicy(**{**NO_WAIT, **policy}))


def true_sample(number):
    stream = [256, *TEXT.encode(), 256]
    return stream[number * SEQUENCE_LENGTH : (number + 1) * SEQUENCE_LENGTH + 1]


def real_tokens(rows):
    return [tokens[:count] for tokens, count in zip(rows.tokens.tolist(), rows.counts.tolist(), strict=True)]


def overwrite(folder, shard, position, data):
    with (folder / "train" / f"{shard:06d}.tar").open("r+b") as file:
        file.seek(position)
        file.write(data)


def cut(folder, shard, size):
    os.truncate(folder / "train" / f"{shard:06d}.tar", size)


def failing(monkeypatch, name, failures):
    """Let the next `failures` calls of a function in os fail; the names and positions it was called with."""
    calls, works = [], getattr(os, name)

    def sometimes(*arguments):
        calls.append(arguments)
        if len(calls) <= failures:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return works(*arguments)

    monkeypatch.setattr(os, name, sometimes)
    return calls


DAMAGES = {
    "cut": (lambda folder, index: cut(folder, 1, index.stride + 600), r"ends inside sample 5; it changed while in use"),
    "name": (lambda folder, index: overwrite(folder, 1, index.stride + 8, b"6"), r"has another member in the place of sample 5"),
    "zeros": (lambda folder, index: overwrite(folder, 1, index.stride, bytes(512)), r"has another member in the place of sample 5"),
    "header": (lambda folder, index: overwrite(folder, 1, index.stride + 512, b"?"), r"has no array of 9 tokens in the place of sample 5"),
    "shape": (
        lambda folder, index: overwrite(folder, 1, index.stride + 512 + 10, b"{'descr': '<u2', 'fortran_order': False, 'shape': (7,), }"),
        r"has no array of 9 tokens in the place of sample 5",
    ),
    "token": (
        lambda folder, index: overwrite(folder, 1, index.first_offset + index.stride, b"\1\1"),
        r"has the token 257 in sample 5, of a vocabulary of 257",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_sample_is_looked_at_twice_and_named_with_its_place(folder, damage, sentence):
    dataset = opened(folder)
    damage(folder, dataset.index)
    where = rf"sample 5 cannot be read: shard .*000001\.tar {sentence} \(member 000000005\.npy, byte 1024\) \(2 attempts\)"
    with pytest.raises(ReadError, match=where):
        dataset[5]
    assert dataset[4][0].tolist() == true_sample(4)


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES.values()], ids=DAMAGES)
def test_a_damaged_sample_is_left_out_and_those_beside_it_are_not(folder, damage, caplog):
    dataset = opened(folder, on_error="skip")
    damage(folder, dataset.index)
    with caplog.at_level(logging.WARNING):
        rows = dataset.__getitems__([4, 5, 9, 5, 12])
    assert rows.counts.tolist() == [9, 0, 9, 0, 102 - 96]
    assert real_tokens(rows) == [true_sample(4), [], true_sample(9), [], true_sample(12)]
    assert rows.tokens[1].tolist() == [256] * 9
    assert (rows.skipped, rows.retries) == (2, 2)
    assert len(caplog.messages) == 1
    assert "sample 5 cannot be read" in caplog.text


def test_the_short_last_sample_is_checked_too(folder):
    dataset = opened(folder)
    overwrite(folder, 3, 512, b"?")
    with pytest.raises(ReadError, match=r"000003\.tar has no array of 6 tokens in the place of sample 12"):
        dataset[12]


def test_rows_come_in_the_order_asked_for_padded_with_eos(folder):
    numbers = [12, 0, 7, 7, 3, 11]
    rows = opened(folder).__getitems__(numbers)
    assert real_tokens(rows) == [true_sample(number) for number in numbers]
    assert rows.tokens.shape == (6, 9)
    assert rows.tokens.dtype == rows.counts.dtype == torch.int64
    assert rows.tokens[0, 6:].tolist() == [256] * 3
    assert (rows.skipped, rows.retries) == (0, 0)


@pytest.mark.parametrize("call", ["pread", "open"])
def test_a_fault_that_passes_is_tried_again_and_counted(folder, monkeypatch, call):
    dataset = opened(folder, retries=3)
    failing(monkeypatch, call, failures=3)
    rows = dataset.__getitems__([6, 2])
    assert real_tokens(rows) == [true_sample(6), true_sample(2)]
    assert (rows.retries, rows.skipped) == (3, 0)
    assert dataset.__getitems__([6]).retries == 0


@pytest.mark.parametrize("retries", [0, 2])
def test_a_fault_that_stays_is_raised_after_all_attempts(folder, monkeypatch, retries):
    dataset = opened(folder, retries=retries)
    calls = failing(monkeypatch, "pread", failures=99)
    tried = r" \(3 attempts\)" if retries else ""
    with pytest.raises(ReadError, match=rf"sample 6 cannot be read: shard .*000001\.tar: Input/output error{tried}; mend"):
        dataset[6]
    assert len(calls) == retries + 1


def test_a_file_that_was_put_right_meanwhile_is_opened_anew(folder):
    """On a network file system an old descriptor may show an old file."""
    shutil.copytree(folder / "train", folder / "whole")
    dataset = opened(folder)
    dataset[4]
    cut(folder, 1, 100)
    (folder / "whole" / "000001.tar").replace(folder / "train" / "000001.tar")
    rows = dataset.__getitems__([5])
    assert real_tokens(rows) == [true_sample(5)]
    assert rows.retries == 1


def test_a_shard_that_is_gone_in_the_middle_of_a_run_is_named(folder):
    dataset = opened(folder, retries=1)
    (folder / "train" / "000002.tar").unlink()
    with pytest.raises(ReadError, match=r"sample 8 cannot be read: shard .*000002\.tar cannot be opened: No such file .* \(2 attempts\)"):
        dataset[8]


def test_a_shard_out_of_reach_is_left_alone_for_a_while_each_time(folder, monkeypatch, caplog):
    dataset = opened(folder, on_error="skip", retries=2)
    calls, now = failing(monkeypatch, "open", failures=6), time.monotonic()
    for minutes in (0, 11):
        monkeypatch.setattr(time, "monotonic", lambda minutes=minutes: now + minutes * 60)
        rows = [dataset.__getitems__([number]) for number in (8, 9, 10, 8)]
        assert [row.skipped for row in rows] == [1] * 4
        assert [row.retries for row in rows] == [2, 0, 0, 0]
    assert (len(calls), len(caplog.messages)) == (6, 1)
    monkeypatch.setattr(time, "monotonic", lambda: now + 22 * 60)
    assert real_tokens(dataset.__getitems__([9])) == [true_sample(9)]


def test_opening_a_file_anew_closes_the_old_one(folder):
    dataset = opened(folder, on_error="skip")
    gc.collect()  # other tests' datasets close theirs when they are deleted
    before = len(os.listdir("/dev/fd"))
    cut(folder, 1, 100)
    dataset.__getitems__([4, 5, 6, 7])
    assert len(os.listdir("/dev/fd")) == before + 1


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are hashed."""
    names = []

    def noted(path):
        names.append(path.name)
        return sha256_of_file(path)

    monkeypatch.setattr("titans_scale.data.reading.shard_files.sha256_of_file", noted)
    return names


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_flipped_bit_is_found_by_the_hash_when_the_shard_is_first_opened(folder, on_error, hashed):
    dataset = opened(folder, verify="hash", on_error=on_error)
    overwrite(folder, 1, dataset.index.first_offset, b"!")  # a token that could be one
    assert opened(folder)[4][0].tolist() != true_sample(4)
    if on_error == "raise":
        with pytest.raises(ReadError, match=r"000001\.tar has SHA-256 \w{12} where its index says \w{12}; see tools/verify_shards\.py"):
            dataset[7]
    else:
        rows = dataset.__getitems__([4, 5, 3, 6, 8])
        assert rows.counts.tolist() == [0, 0, 9, 0, 9]
        assert (rows.skipped, rows.retries) == (3, 0)
        assert hashed == ["000001.tar", "000000.tar", "000002.tar"]


def test_a_shard_is_hashed_once_in_a_process(folder, monkeypatch, hashed):
    monkeypatch.setattr("titans_scale.data.reading.shard_files.MAX_OPEN_FILES", 1)
    opened(folder, verify="hash").__getitems__([0, 4, 0, 4, 8])
    assert hashed == ["000000.tar", "000001.tar", "000002.tar"]


def test_a_dataset_goes_to_another_process_without_its_open_files(folder):
    dataset = opened(folder)
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    rows = copy.__getitems__([0])
    assert real_tokens(rows) == [true_sample(0)]
    assert rows.retries == 0


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_bring_what_they_left_out(folder, num_workers):
    dataset = opened(folder, on_error="skip")
    dataset[5]
    cut(folder, 1, dataset.index.stride * 2)
    loader = DataLoader(dataset, batch_sampler=[[3, 4], [5, 6], [7, 8]], num_workers=num_workers, collate_fn=lambda rows: rows)
    rows = list(loader)
    assert [row.counts.tolist() for row in rows] == [[9, 9], [9, 0], [0, 9]]
    assert [(row.skipped, row.retries) for row in rows] == [(0, 0), (1, 1), (1, 1)]


def test_a_failure_in_a_worker_process_is_one_sentence(folder):
    dataset = opened(folder)
    cut(folder, 1, 100)
    with pytest.raises(ReadError) as error:
        list(DataLoader(dataset, batch_sampler=[[5]], num_workers=1, collate_fn=lambda rows: rows))
    assert sentence_of(error.value).startswith("sample 5 cannot be read: shard ")
    assert "Traceback" not in sentence_of(error.value)


def test_waits_grow_up_to_a_minute(monkeypatch):
    waits = []
    monkeypatch.setattr(nap.time, "sleep", waits.append)

    def fails():
        raise ReadError("no")

    with pytest.raises(ReadError):
        ReadPolicy(retries=12, retry_seconds=0.5).retrying(lambda: None)(fails)
    assert len(waits) == 12
    assert all(0.25 * 2**turn <= wait <= 0.5 * 2**turn for turn, wait in enumerate(waits[:6]))
    assert all(30 <= wait <= 60 for wait in waits[-4:])
    assert sum(waits) < ReadPolicy(retries=12, retry_seconds=0.5, timeout_seconds=1).longest_seconds - 13 < 2 * sum(waits)
    assert len({later / before for before, later in pairwise(waits)}) > 5  # ranks that failed together do not come back together


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda index: index["shards"][1].update(samples=0), r"index\.json is damaged: its shard 000001\.tar is empty"),
        (lambda index: index.update(samples=12), r"index\.json is damaged: its shards hold other than the 12 samples"),
        (
            lambda index: index.update(first_offset=64),
            r"index\.json is damaged: its samples cannot lie 1024 bytes apart as <u2 from byte 64 on",
        ),
        (lambda index: index.update(stride=640), r"its samples cannot lie 640 bytes apart"),
        (lambda index: index.update(dtype="<q2"), r"bytes apart as <q2 from byte 640 on"),
    ],
    ids=["empty shard", "counts", "offset", "stride", "dtype"],
)
def test_an_index_that_does_not_add_up_is_refused(folder, change, sentence):
    file = folder / "train" / "index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=sentence):
        opened(folder)


def test_the_policy_is_that_of_the_configuration():
    changes = {"verify": "hash", "on_error": "skip", "retries": 7, "retry_seconds": 0.25, "timeout_seconds": 3.0, "cache_gib": 2.0}
    policy = ReadPolicy.of(DataConfig(cache_dir="/cache", **changes))
    assert policy == ReadPolicy(cache_dir="/cache", **changes)
    assert ReadPolicy.of(DataConfig()) == ReadPolicy()

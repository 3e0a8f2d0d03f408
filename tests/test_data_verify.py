"""What verify_shards finds: each kind of damage by its file, its member and what it is."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest

from titans_scale.data import ByteTokenizer, train_sentencepiece, write_shards
from titans_scale.data.shards.index import fingerprint_of, load_index
from titans_scale.data.shards.verify import Verifier, bytes_of_shards, show_samples

LENGTH, SAMPLES = 20, 6
SHARD = "000001.tar"


@pytest.fixture
def folder(tmp_path):
    source = np.random.default_rng(0)
    for split, documents in (("train", 30), ("validation", 8)):
        texts = ["".join(map(chr, source.integers(97, 123, source.integers(5, 60)))) for _ in range(documents)]
        write_shards(texts, tmp_path / split, tokenizer=ByteTokenizer(), sequence_length=LENGTH, samples_per_shard=SAMPLES)
    assert len(load_index(tmp_path / "train").shards) > 3
    return tmp_path


def findings(*folders, **options):
    return list(Verifier(**options).folders(folders))


def change_bytes(file, at, *, value=None):
    """Another byte at that place; the index says nothing of it."""
    data = bytearray(file.read_bytes())
    data[at] = data[at] ^ 1 if value is None else value
    file.write_bytes(data)


def change_index(split, *, shard=None, **changes):
    """Other numbers in an index, or in the entry of one shard."""
    content = json.loads((split / "index.json").read_text())
    (content if shard is None else content["shards"][shard]).update(changes)
    (split / "index.json").write_text(json.dumps(content))


def accept(split):
    """Give the index the hash and size that its shards have now, as a writer with a mistake in it would have."""
    index = load_index(split)
    shards = []
    for shard in index.shards:
        data = (split / shard.name).read_bytes()
        shards.append(dataclasses.replace(shard, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    fingerprint = fingerprint_of(index.settings, tuple(shards), vocab_size=index.vocab_size)
    dataclasses.replace(index, shards=tuple(shards), fingerprint=fingerprint).save(split)


def offset(split, part, *, position=2):
    """Of a byte in a part of a shard's sample."""
    index = load_index(split)
    entry = position * index.stride
    tokens = entry + index.first_offset
    return {
        "tar header": entry + 3,
        "numpy header": entry + 512 + 20,
        "first token": tokens,
        "token": tokens + 8,
        "high byte": tokens + 9,
        "padding": tokens + 2 * (LENGTH + 1),
        "end": SAMPLES * index.stride + 700,
    }[part]


@pytest.mark.parametrize("workers", [1, 2])
def test_whole_shards_give_no_findings(folder, workers):
    read = []
    assert findings(folder, workers=workers, on_bytes=read.append) == []
    assert sum(read) == bytes_of_shards(folder) == sum(file.stat().st_size for file in folder.rglob("*.tar"))


@pytest.mark.parametrize("part", ["tar header", "numpy header", "first token", "token", "padding", "end"])
def test_a_flipped_bit_is_found_by_the_hash(folder, part):
    change_bytes(folder / "train" / SHARD, offset(folder / "train", part))
    assert any(f"{folder}/train/{SHARD} has SHA-256" in finding for finding in findings(folder))
    assert findings(folder, quick=True) == []


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("tar header", "has a tar header that is not what it must be in 000000008.npy"),
        ("numpy header", "has a numpy header that is not what it must be in 000000008.npy"),
        ("first token", "has a first token that is not the last of the sample before in 000000008.npy"),
        ("padding", "has something other than zeros behind the tokens in 000000008.npy"),
        ("end", "does not end as a tar of 6 samples must"),
    ],
)
def test_what_is_no_sample_is_found_where_the_hash_says_nothing(folder, part, sentence):
    change_bytes(folder / "train" / SHARD, offset(folder / "train", part))
    accept(folder / "train")
    assert f"shard {folder}/train/{SHARD} {sentence}" in findings(folder)


def test_ids_past_the_vocabulary_are_found_and_their_members_named(folder):
    for position in range(1, 6):
        change_bytes(folder / "train" / SHARD, offset(folder / "train", "high byte", position=position), value=200)
    accept(folder / "train")
    (finding,) = (finding for finding in findings(folder) if "token ids" in finding)
    assert "in 000000007.npy, 000000008.npy, 000000009.npy and 2 more; the vocabulary is 257" in finding


def test_an_end_of_document_too_many_is_found(folder):
    index = load_index(folder / "train")
    for at, value in ((offset(folder / "train", "token"), 0), (offset(folder / "train", "high byte"), 1)):
        change_bytes(folder / "train" / SHARD, at, value=value)
    accept(folder / "train")
    expected = f"holds {index.documents + 1:,} ends of documents where its index says {index.documents:,} documents"
    assert findings(folder) == [f"{folder}/train {expected}"]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(("how", "sentence"), [("cut", "bytes where its index says"), ("gone", "is missing"), ("more", "is in no index")])
def test_a_shard_that_is_cut_or_gone_or_too_many_is_named(folder, quick, how, sentence):
    file = folder / "train" / SHARD
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.rename(folder / "train" / "000099.tar") if how == "more" else file.unlink()
    found = findings(folder, quick=quick)
    assert any(sentence in finding for finding in found)
    assert len(found) == (2 if how == "more" else 1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"samples": 3}, "says samples 3, and by its other numbers it is"),
        ({"tokens": 3}, "says tokens 3, and by its other numbers it is"),
        ({"stride": 512}, "says stride 512, and by its other numbers it is 1024"),
        ({"first_offset": 512}, "says first_offset 512, and by its other numbers it is 640"),
        ({"dtype": "<u4"}, "says dtype <u4, and by its other numbers it is <u2"),
        ({"fingerprint": "0"}, "says fingerprint 0, and by its other numbers it is"),
        ({"documents": 3}, "ends of documents where its index says 3 documents"),
        ({"eos_id": 5}, "end of document 5; its tokenizer has 257 and 256"),
        ({"tokenizer": "../gone.model"}, "gone.model' is neither 'byte' nor a file"),
        ({"format_version": 1}, "format version 1"),
        ({"shards": None}, "is damaged"),
        ({"shard": 1, "samples": 5}, f"says that shard 1 is {SHARD} with 5 samples of 120 tokens, which cannot be"),
        ({"shard": 1, "samples": 5, "tokens": 100}, f"says that shard 1 is {SHARD} with 5 samples of 100 tokens, which cannot be"),
        ({"shard": 1, "tokens": 5000}, f"says that shard 1 is {SHARD} with 6 samples of 5000 tokens, which cannot be"),
        ({"shard": 1, "name": "000000.tar"}, "says that shard 1 is 000000.tar"),
    ],
    ids=str,
)
def test_numbers_of_an_index_that_cannot_be_are_named(folder, changes, sentence):
    change_index(folder / "train", **changes)
    found = findings(folder)
    assert any(sentence in finding for finding in found), found


def test_another_tokenizer_than_that_of_the_shards_is_found(tmp_path):
    tokenizer = train_sentencepiece(["some words " * 20], tmp_path / "made.model", 266)
    write_shards(["some words"] * 9, tmp_path / "data" / "train", tokenizer=tokenizer, sequence_length=8)
    assert findings(tmp_path / "data") == []
    train_sentencepiece(["other texts " * 20], tmp_path / "data" / "tokenizer.model", 266)
    assert findings(tmp_path / "data") == [
        f"{tmp_path}/data/tokenizer.model is not the tokenizer that the shards in {tmp_path}/data/train were written with"
    ]


@pytest.mark.parametrize("quick", [True, False])
def test_two_shards_of_one_content_are_found_in_a_split_and_across_splits(folder, quick):
    shutil.copy(folder / "train" / "000000.tar", folder / "train" / SHARD)
    shutil.copy(folder / "train" / "000002.tar", folder / "validation" / "000000.tar")
    for split in ("train", "validation"):
        accept(folder / split)
    copies = [finding for finding in findings(folder, quick=quick) if "one of the two is a copy" in finding]
    assert [finding.split()[1] for finding in copies] == [f"{folder}/train/{SHARD}", f"{folder}/train/000002.tar"]


def test_a_sample_of_validation_that_training_has_too_is_found_in_another_folder_as_well(folder, tmp_path):
    shared = "".join(map(chr, range(40, 40 + 10 * LENGTH // 3)))
    for part, texts in (("one/train", ["x" * 60, shared]), ("two/validation", ["y" * (60 + LENGTH), shared])):
        write_shards(texts, tmp_path / part, tokenizer=ByteTokenizer(), sequence_length=LENGTH, samples_per_shard=SAMPLES)
    assert findings(tmp_path / "one") == findings(tmp_path / "two") == []
    sentence = f"shard {tmp_path}/one/train/000000.tar has 000000004.npy, 000000005.npy in common with a split that is not for training"
    assert findings(tmp_path / "one", tmp_path / "two") == [sentence]


def test_an_unfinished_split_is_a_finding_and_no_split_is_a_mistake(folder, tmp_path):
    (folder / "train" / "index.json").rename(folder / "train" / ".progress.jsonl")
    assert findings(folder) == [f"{folder}/train was never finished; the tools/make_shards.py command that began it goes on with it"]
    with pytest.raises(ValueError, match="there are no token shards in"):
        findings(tmp_path / "validation" / "..", tmp_path.parent)


def test_samples_are_shown_as_text(folder):
    shown = list(show_samples(folder, 3))
    assert len(shown) == 6
    index = load_index(folder / "train")
    number = index.samples // 3
    head, text = shown[1].split("\n", 1)
    assert head == f"--- {folder}/train/{number // SAMPLES:06d}.tar, {number:09d}.npy: {LENGTH + 1} tokens"
    assert 15 < len(text) <= LENGTH + 1 and text.isalpha()

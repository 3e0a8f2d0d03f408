"""Tars that others wrote: trained on as shards of ours, made once."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from titans_scale.config import DataConfig
from titans_scale.data import ByteTokenizer, open_sources

LENGTH = 8
TEXTS = [f"document {number}, of no great length" for number in range(40)]


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz" if file.suffix in (".gz", ".tgz") else "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def npy(tokens: list[int]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(tokens, dtype=np.int32))
    return buffer.getvalue()


def as_members(kind: str, texts: list[str]) -> list[tuple[str, bytes]]:
    data = {
        "txt": lambda text: text.encode(),
        "json": lambda text: json.dumps({"content": text, "url": "x"}).encode(),
        "npy": lambda text: npy(list(text.encode())),
    }[kind]
    return [(f"{number:05d}.{kind}", data(text)) for number, text in enumerate(texts)]


def config_for(tmp_path: Path, path: object, **changes: object) -> DataConfig:
    options = {"text_key": "content", "cache_dir": str(tmp_path / "cache"), "tokenizer": "byte", "retry_seconds": 0.0, **changes}
    return DataConfig(path=str(path), format="webdataset", **options)


def documents_of(config: DataConfig, split: str) -> list[str]:
    """The documents of all samples, end to end."""
    dataset = open_sources(config, split, sequence_length=LENGTH).sources[0].dataset
    tokens = [token for row in range(len(dataset)) for token in (lambda row, count: row[1:count].tolist())(*dataset[row])]
    return ByteTokenizer().decode([10 if token == 256 else token for token in tokens]).split("\n")[:-1]


@pytest.fixture
def tars(tmp_path):
    """Three tars, of one kind of member each, and a validation split."""
    for number, kind in enumerate(("txt", "json", "npy")):
        ending = {"txt": "tar", "json": "tar.gz", "npy": "tgz"}[kind]
        write_tar(tmp_path / f"others/train/{number}.{ending}", as_members(kind, TEXTS[number::3]))
    write_tar(tmp_path / "others/validation/0.tar", as_members("txt", ["held out"]))
    return tmp_path / "others"


def test_texts_json_and_arrays_are_the_documents_in_the_order_of_the_tars(tmp_path, tars):
    config = config_for(tmp_path, tars)
    assert documents_of(config, "train") == [*TEXTS[0::3], *TEXTS[1::3], *TEXTS[2::3]]
    assert documents_of(config, "validation") == ["held out"]


def test_tars_without_splits_give_both_and_each_document_to_one_of_them(tmp_path):
    texts = [f"text {number}" for number in range(1500)]
    write_tar(tmp_path / "others/a.tar", as_members("txt", texts))
    sides = [documents_of(config_for(tmp_path, tmp_path / "others"), split) for split in ("train", "validation")]
    assert sorted(sides[0] + sides[1]) == sorted(texts)
    assert 1 <= len(sides[1]) <= 30


def test_braces_name_many_tars(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"part-{number}.tar", as_members("txt", [f"text {number} {again}" for again in range(500)]))
    both = [documents_of(config_for(tmp_path, f"{tmp_path}/part-{{0..2}}.tar"), split) for split in ("train", "validation")]
    assert len(both[0] + both[1]) == 3 * 500


def test_tars_behind_a_command_are_fetched_once(tmp_path):
    write_tar(tmp_path / "part-0.tar", as_members("txt", [f"text {number}" for number in range(1500)]))
    path = f"pipe:echo >> {tmp_path}/asked && cat {tmp_path}/part-{{0..0}}.tar"
    before = documents_of(config_for(tmp_path, path), "train")
    (tmp_path / "part-0.tar").unlink()
    assert documents_of(config_for(tmp_path, path), "train") == before
    assert (tmp_path / "asked").read_text() == "\n"


def test_the_second_time_nothing_is_made_and_changed_tars_are_made_anew(tmp_path, tars, monkeypatch):
    config = config_for(tmp_path, tars)
    open_sources(config, "train", sequence_length=LENGTH)
    write_tar(tars / "train/3.tar", as_members("txt", ["one more"]))
    assert documents_of(config, "train")[-1] == "one more"
    monkeypatch.setattr("titans_scale.data.shards.making.write_tars", lambda *arguments, **options: pytest.fail("made anew"))
    assert documents_of(config, "train")[-1] == "one more"


def test_the_same_tars_elsewhere_are_the_same_data(tmp_path, tars):
    config = config_for(tmp_path, tars)
    here = open_sources(config, "train", sequence_length=LENGTH)
    shutil.copytree(tars, tmp_path / "copy")
    there = open_sources(config_for(tmp_path, tmp_path / "copy", cache_dir=str(tmp_path / "2")), "train", sequence_length=LENGTH)
    assert here.sources[0].dataset.fingerprint == there.sources[0].dataset.fingerprint


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere", "nowhere"),
        ("empty", "holds no tars"),
        ("cut", "cut/train/0.tar"),
        ("badjson", "member 0.json, number 1 of .*0.tar is not JSON"),
        ("few", r"few has too few documents to hold 0\.5% out; lay its tars in train/ and validation/"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, path, sentence):
    (tmp_path / "empty/train").mkdir(parents=True)
    write_tar(tmp_path / "cut/train/0.tar", as_members("txt", TEXTS))
    os.truncate(tmp_path / "cut/train/0.tar", 1500)
    write_tar(tmp_path / "badjson/train/0.tar", [("0.json", b"{")])
    write_tar(tmp_path / "few/0.tar", as_members("txt", TEXTS[:2]))
    with pytest.raises((ValueError, OSError), match=sentence):
        for split in ("train", "validation"):
            open_sources(config_for(tmp_path, tmp_path / path), split, sequence_length=LENGTH)


def test_a_document_that_cannot_be_read_is_left_out_where_errors_are_skipped(tmp_path):
    write_tar(tmp_path / "others/train/0.tar", [("0.json", b"{"), *as_members("json", TEXTS)])
    assert documents_of(config_for(tmp_path, tmp_path / "others", on_error="skip"), "train") == TEXTS

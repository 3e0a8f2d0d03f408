import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import webdataset

from titans_scale.data import ByteTokenizer, open_split, train_sentencepiece, write_shards
from titans_scale.data.tokenizers.tokenizer import Tokenizer

TEXTS = ["the first document\n", "", "second \u8a18\u61b6", "x" * 70, "last"]


class WideTokenizer(ByteTokenizer):
    """Ids past 16 bits."""

    vocab_size = 100_257
    fingerprint = "wide"

    def encode_pieces(self, pieces):
        return [ids.astype(np.int32) + 100_000 for ids in super().encode_pieces(pieces)]


def stream_of(texts, tokenizer):
    """What the shards must hold, said in the plainest way."""
    return [tokenizer.eos_id, *itertools.chain(*([*tokenizer.encode(text), tokenizer.eos_id] for text in texts))]


def write(folder, texts=TEXTS, *, tokenizer: Tokenizer | None = None, sequence_length=8, samples_per_shard=4, **options):
    tokenizer = tokenizer or ByteTokenizer()
    return write_shards(
        texts, folder / "train", tokenizer=tokenizer, sequence_length=sequence_length, samples_per_shard=samples_per_shard, **options
    )


def samples_of(dataset):
    return [tokens[:count].tolist() for tokens, count in (dataset[index] for index in range(len(dataset)))]


def content(folder):
    return {file.name: file.read_bytes() for file in (folder / "train").iterdir()}


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WideTokenizer()], ids=["uint16", "uint32"])
@pytest.mark.parametrize("sequence_length", [1, 7, 8, 31, 1000])
@pytest.mark.parametrize("samples_per_shard", [1, 3, 1000])
def test_every_token_is_a_target_once_and_comes_after_the_right_input(tmp_path, tokenizer, sequence_length, samples_per_shard):
    write(tmp_path, tokenizer=tokenizer, sequence_length=sequence_length, samples_per_shard=samples_per_shard)
    dataset, stream = open_split(tmp_path, "train"), stream_of(TEXTS, tokenizer)
    samples = samples_of(dataset)
    assert samples == [stream[start : start + sequence_length + 1] for start in range(0, len(stream) - 1, sequence_length)]
    assert list(itertools.chain(*(sample[1:] for sample in samples))) == stream[1:]
    assert dataset.index.tokens == len(stream) - 1
    assert dataset[len(dataset) - 1][0].shape == (sequence_length + 1,)


@pytest.mark.parametrize("cut_characters", [1, 3, 1 << 20])
def test_how_much_is_encoded_at_once_changes_nothing(tmp_path, monkeypatch, cut_characters):
    monkeypatch.setattr("titans_scale.data.shards.tokenizing.ENCODE_CHARACTERS", cut_characters)
    index = write(tmp_path, (text for text in TEXTS))
    assert (
        list(itertools.chain(*(sample[1:] for sample in samples_of(open_split(tmp_path, "train")))))
        == stream_of(TEXTS, ByteTokenizer())[1:]
    )
    assert (index.documents, index.text_bytes) == (5, sum(len(text.encode()) for text in TEXTS))


@pytest.mark.parametrize(("samples_per_shard", "samples"), [(1, [1, 1]), (2, [2]), (3, [2])])
def test_a_stream_that_ends_with_a_shard_begins_no_other(tmp_path, samples_per_shard, samples):
    index = write(tmp_path, ["x" * 15], sequence_length=8, samples_per_shard=samples_per_shard)
    assert [shard.samples for shard in index.shards] == samples


def test_a_document_of_many_pieces_has_one_end(tmp_path):
    text = "line\n" * 40_000
    write(tmp_path, [text], sequence_length=1000, samples_per_shard=70)
    assert list(itertools.chain(*(sample[1:] for sample in samples_of(open_split(tmp_path, "train"))))) == [*text.encode(), 256]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WideTokenizer()], ids=["uint16", "uint32"])
def test_plain_webdataset_reads_the_same_samples(tmp_path, tokenizer):
    index = write(tmp_path, tokenizer=tokenizer)
    urls = [str(tmp_path / "train" / shard.name) for shard in index.shards]
    assert len(urls) > 2
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["npy"].tolist() for sample in read] == samples_of(open_split(tmp_path, "train"))
    assert {sample["npy"].dtype.str for sample in read} == {index.dtype}
    assert [sample["__key__"] for sample in read] == [f"{number:09d}" for number in range(index.samples)]


@pytest.mark.parametrize("sequence_length", [1, 100, 191, 192, 193, 5000])
def test_the_index_tells_where_in_a_tar_each_sample_lies(tmp_path, sequence_length):
    index = write(tmp_path, ["a long document " * 500], sequence_length=sequence_length, samples_per_shard=50)
    for shard in index.shards:
        data = (tmp_path / "train" / shard.name).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getmembers()
        assert len(members) == shard.samples
        for position, member in enumerate(members):
            array = np.load(io.BytesIO(data[member.offset_data : member.offset_data + member.size]))
            start = index.first_offset + position * index.stride
            assert data[start : start + array.nbytes] == array.tobytes()
            assert start + array.nbytes == member.offset_data + member.size


def test_the_same_documents_give_the_same_bytes_with_no_time_or_user_in_them(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "train" / "000000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "", 0o644)}


def test_the_fingerprint_is_that_of_the_samples(tmp_path):
    base = write(tmp_path / "base").fingerprint
    assert write(tmp_path / "same", source="known").fingerprint == base
    others = [
        write(tmp_path / "text", [*TEXTS, "more"]),
        write(tmp_path / "length", sequence_length=9),
        write(tmp_path / "tokenizer", tokenizer=WideTokenizer()),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 4


def test_a_finished_split_is_left_alone_and_its_documents_are_not_read(tmp_path):
    index = write(tmp_path, source="corpus")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "train").iterdir()}
    unread = iter(TEXTS)
    assert write(tmp_path, unread, source="corpus") == index
    assert next(unread) == TEXTS[0]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "train").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sequence_length": 9}, "with sequence_length 8, not 9"),
        ({"samples_per_shard": 5}, "with samples_per_shard 4, not 5"),
        ({"tokenizer": WideTokenizer()}, "with another tokenizer"),
        ({"source": "another"}, "of another corpus"),
        ({"source": ""}, "of another corpus"),
    ],
)
def test_other_settings_are_refused_unless_told_to_overwrite(tmp_path, change, sentence):
    write(tmp_path, source="corpus")
    before = content(tmp_path)
    settings = {"source": "corpus", **change}
    with pytest.raises(ValueError, match=sentence):
        write(tmp_path, **settings)
    assert content(tmp_path) == before
    write(tmp_path, ["new"], **settings, overwrite=True)
    assert open_split(tmp_path, "train").index.documents == 1
    assert {file.name for file in (tmp_path / "train").iterdir()} == {"000000.tar", "index.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_is_no_split_and_the_next_one_starts_over(tmp_path, overwrite, monkeypatch):
    monkeypatch.setattr("titans_scale.data.shards.tokenizing.ENCODE_CHARACTERS", 1)
    if overwrite:
        write(tmp_path)

    def interrupted():
        yield from ["old " * 30] * 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, interrupted(), overwrite=overwrite)
    assert any(name.endswith(".tar") for name in content(tmp_path))
    with pytest.raises(ValueError, match="never finished"):
        open_split(tmp_path, "train")
    write(tmp_path, ["new"])
    assert samples_of(open_split(tmp_path, "train")) == [[256, *b"new", 256]]
    assert {file.name for file in (tmp_path / "train").iterdir()} == {"000000.tar", "index.json"}


def test_files_that_are_not_ours_stay(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "notes.tar").write_text("mine")
    write(tmp_path)
    assert (tmp_path / "train" / "notes.tar").read_text() == "mine"


def test_a_full_disk_names_the_file_and_leaves_no_part_of_it(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("titans_scale.data.files.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*000000\.tar'"):
        write(tmp_path)
    assert content(tmp_path) == {}


@pytest.mark.parametrize("texts", [[], ["fine", "\ud800"]], ids=["no document", "surrogate"])
def test_documents_that_cannot_be_written_make_no_split(tmp_path, texts):
    with pytest.raises(ValueError, match=r"there is no document to write|lone surrogate"):
        write(tmp_path, texts)
    assert not (tmp_path / "train" / "index.json").exists()


@pytest.mark.parametrize("wrong", [{"sequence_length": 0}, {"samples_per_shard": 0}])
def test_sizes_below_one_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        write(tmp_path, **wrong)


def test_the_tokenizer_travels_with_the_shards(tmp_path):
    tokenizer = train_sentencepiece(["some words " * 20], tmp_path / "made.model", 266)
    write(tmp_path / "data", tokenizer=tokenizer)
    (tmp_path / "made.model").unlink()
    (tmp_path / "data").rename(tmp_path / "moved")
    loaded = open_split(tmp_path / "moved", "train").load_tokenizer()
    assert loaded.encode("some words") == tokenizer.encode("some words")
    assert loaded.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_that_another_split_was_written_with_is_not_replaced_in_silence(tmp_path):
    first = train_sentencepiece(["some words " * 20], tmp_path / "first.model", 266)
    second = train_sentencepiece(["other texts " * 20], tmp_path / "second.model", 266)
    write_shards(["a"], tmp_path / "data" / "validation", tokenizer=first, sequence_length=8)
    with pytest.raises(ValueError, match=r"the split 'validation' beside .* was written with another tokenizer"):
        write(tmp_path / "data", tokenizer=second)
    write(tmp_path / "data", tokenizer=second, overwrite=True)
    with pytest.raises(ValueError, match=r"is not the tokenizer that the shards in .*validation were written with"):
        open_split(tmp_path / "data", "validation").load_tokenizer()


def damage(folder, how):
    train = folder / "train"
    index = json.loads((train / "index.json").read_text())
    if how == "no folder":
        folder.rename(folder.with_name("elsewhere"))
    elif how == "no split":
        train.rename(folder / "other")
    elif how == "no index":
        (train / "index.json").unlink()
    elif how == "no shard":
        (train / "000001.tar").unlink()
    elif how == "cut short":
        data = (train / "000001.tar").read_bytes()
        (train / "000001.tar").write_bytes(data[:-1000])
    elif how == "cut index":
        (train / "index.json").write_text(json.dumps(index)[:-30])
    elif how == "strange index":
        (train / "index.json").write_text("[]")
    else:
        (train / "index.json").write_text(json.dumps(index | how))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no folder", r"the folder does not exist; make them with tools/make_shards\.py"),
        ("no split", "has no split 'train': it has other"),
        ("no index", r"has no index\.json, so its shards were never finished"),
        ("no shard", r"000001\.tar is missing"),
        ("cut short", r"000001\.tar has \d+ bytes where its index says \d+"),
        ("cut index", r"index\.json is damaged"),
        ("strange index", r"index\.json is damaged"),
        ({"format_version": 7}, "has format version 7, this code reads version 2"),
        ({"samples": 0}, "holds no samples"),
        ({"dtype": None, "more": 1}, r"index\.json is damaged"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_split_is_said(tmp_path, how, sentence):
    folder = tmp_path / "tokens"
    write(folder)
    damage(folder, how)
    with pytest.raises(ValueError, match=sentence):
        open_split(folder, "train")


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path):
    write(tmp_path)
    dataset = open_split(tmp_path, "train")
    (tmp_path / "train" / "000001.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"000001\.tar ends inside sample 5"):
        dataset[5]

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_scale.data.text import inputs as inputs_module
from titans_scale.data.text.inputs import (
    InputFile,
    Inputs,
    Record,
    document_of,
    find_inputs,
    inputs_fingerprint,
    read_records,
    read_texts,
    separator,
    total_bytes,
)

TEXTS = ["one\ntwo\r\n", "caf\u00e9 \u2028 \U0001f600\0", '"quoted" \\n', "x" * 3_000_000, "last"]
any_text = st.text(st.characters(exclude_categories=["Cs"]))


def lines_of(texts):
    return b"".join(json.dumps({"text": text, "id": 7}).encode() + b"\n" for text in texts)


def tar_of(members, *, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def npy_of(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_parquet(file, texts, *, row_group_size=2, **columns):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts, **columns}), file, row_group_size=row_group_size)


def write_every_way(folder, texts):
    """The same documents in every format that can hold them."""
    lines = lines_of(texts)
    (folder / "lines.jsonl").write_bytes(lines)
    (folder / "windows.ndjson").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"))
    (folder / "lines.json.gz").write_bytes(gzip.compress(lines[:99]) + gzip.compress(lines[99:]))
    (folder / "lines.jsonl.zst").write_bytes(zstandard.compress(lines[:99]) + zstandard.compress(lines[99:]))
    write_parquet(folder / "rows.parquet", texts)
    dictionary = pyarrow.array([text or None for text in texts], pyarrow.string()).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": dictionary}), folder / "dictionary.parquet")
    members = {f"{number:03d}.json": json.dumps({"text": text}).encode() for number, text in enumerate(texts)}
    (folder / "members.tar").write_bytes(tar_of(members))
    (folder / "members.tar.gz").write_bytes(tar_of(members, mode="w:gz"))
    (folder / "texts.tar").write_bytes(tar_of({f"deep/{n}.txt": text.encode() for n, text in enumerate(texts)}))
    return sorted(folder.iterdir())


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[::-1], ["only"], []], ids=["all", "reversed", "one", "none"])
def test_the_same_documents_come_out_of_every_format(tmp_path, texts):
    for file in write_every_way(tmp_path, texts):
        assert list(read_texts(find_inputs([file]))) == texts, file


@settings(deadline=None, max_examples=30)
@given(texts=st.lists(any_text, max_size=5))
def test_any_text_comes_out_of_every_format(tmp_path_factory, texts):
    for file in write_every_way(tmp_path_factory.mktemp("inputs"), texts):
        assert list(read_texts(find_inputs([file]))) == [
            text.removeprefix("\ufeff") if file.name == "texts.tar" else text for text in texts
        ]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path, ending):
    file = tmp_path / f"book.txt{ending}"
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    file.write_bytes(compress(b"\xef\xbb\xbf" + "\n".join(TEXTS).encode()))
    assert list(read_texts(find_inputs([file]))) == ["\n".join(TEXTS)]


@settings(deadline=None, max_examples=200)
@given(
    text=st.text("ab\n", max_size=40),
    mark=st.sampled_from(["\n\n", "ab", "aa", "aba", "\n"]),
    block=st.integers(1, 7),
)
def test_a_text_is_split_as_if_it_were_read_at_once_wherever_the_blocks_end(tmp_path_factory, text, mark, block):
    file = tmp_path_factory.mktemp("inputs") / "many.txt"
    file.write_text(text)
    expected = text.split(mark)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_module.readers, "BLOCK", block)
        assert list(read_texts(find_inputs([file], split_text_on=mark))) == (expected if expected[-1] else expected[:-1])


def test_a_folder_is_read_in_the_order_of_its_paths_without_what_is_hidden(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.jsonl", "a/b/c.md", ".hidden", ".git/config", "a/__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find_inputs([tmp_path])
    assert [(os.path.relpath(file.path, tmp_path), file.format) for file in found.files] == [
        ("a.jsonl", "jsonl"),
        ("a/b/c.md", "text"),
        ("a/z.txt", "text"),
        ("b.txt", "text"),
    ]
    assert find_inputs([f"{tmp_path}/[ab].*"]).files == (found.files[0], found.files[3])
    assert find_inputs([f"{tmp_path}/*.txt", f"{tmp_path}/a"]).files == tuple(found.files[number] for number in (3, 1, 2))
    assert find_inputs([f"{tmp_path}/**/*.md"]).files == found.files[1:2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.txt", "text"),
        ("x.py", "text"),
        ("x", "text"),
        ("x.gz", "text"),
        ("x.JSONL", "jsonl"),
        ("x.ndjson.ZST", "jsonl"),
        ("x.json", "jsonl"),
        ("x.parquet", "parquet"),
        ("x.tar", "webdataset"),
        ("x.tar.gz", "webdataset"),
        ("x.tar.zst", "webdataset"),
    ],
)
def test_the_name_says_the_format_unless_one_is_given(tmp_path, name, expected):
    (tmp_path / name).touch()
    assert find_inputs([tmp_path / name]).files == (InputFile(path=str(tmp_path / name), format=expected),)
    assert find_inputs([tmp_path / name], format="jsonl").files[0].format == "jsonl"


@pytest.mark.parametrize(
    ("paths", "options", "sentence"),
    [
        (["nowhere"], {}, "nowhere does not exist"),
        (["*.nothing"], {}, r"no file matches \*\.nothing"),
        (["empty"], {}, "the folder empty has no files in it"),
        ([], {}, "there is no input"),
        (["a.txt", "*.txt"], {}, r"a\.txt comes twice in the inputs; name it once"),
        (["./a.txt", "a.txt"], {}, r"a\.txt comes twice"),
        (["a.txt"], {"format": "txt"}, "format is 'txt'; it must be one of auto, text, jsonl"),
        (["a.txt"], {"split_text_on": ""}, "split_text_on is empty"),
        (["-"], {"format": "parquet"}, "- cannot be read as Parquet"),
    ],
)
def test_inputs_that_are_not_there_are_named(tmp_path, monkeypatch, paths, options, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=sentence):
        find_inputs(paths, **options)


@pytest.mark.parametrize(("name", "package"), [("x.parquet", "pyarrow"), ("x.jsonl.zst", "zstandard")])
def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, name, package):
    (tmp_path / name).touch()
    monkeypatch.setattr(inputs_module, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf'{package}, which is not installed: pip install "titans-scale\[data\]"'):
        find_inputs([tmp_path / name])


def test_members_of_tars_written_by_others(tmp_path):
    ids = np.array([3, 1, 2], np.uint16)
    members = {
        "0.txt": b"\xef\xbb\xbfplain",
        "0.jpg": b"\xff\xd8",
        "1.json": b'\xef\xbb\xbf{"content": "object"}',
        "1.cls": b"4",
        "2.npy": npy_of(ids),
    }
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    skipped: list[str] = []
    found = find_inputs([tmp_path / "x.tar"], text_key="content")
    records = list(read_records(found, on_skip=skipped.append))
    text, json_text, array = (document_of(record, text_key="content") for record in records)
    assert (text, json_text) == ("plain", "object")
    np.testing.assert_array_equal(array, ids)
    assert [record.number for record in records] == [1, 3, 5]
    assert [sentence.split(",")[0] for sentence in skipped] == ["member 0.jpg", "member 1.cls"]
    with pytest.raises(ValueError, match=r"member 2\.npy, number 5 of .*x\.tar is token ids, not text"):
        list(read_texts(found))


BAD_LINES = [
    (b'{"text": "cut', r"line 3 of .*x\.jsonl is not JSON"),
    (b"[" * 100_000, r"line 3 of .*x\.jsonl is not JSON"),
    (b'{"text": 1' + b"0" * 5000 + b"}", r"line 3 of .*x\.jsonl is not JSON"),
    (b'["text"]', r'line 3 of .*x\.jsonl is not a JSON object with a "text"'),
    (b'{"txt": "a", "id": 1}', r'not a JSON object with a "text"; its keys are txt, id: name the one to read as text_key'),
    (b'{"text": 3}', r'the "text" of line 3 of .*x\.jsonl is int, not a string'),
    (b'{"text": "\xff"}', r"line 3 of .*x\.jsonl is not UTF-8 text: byte 10 is 0xff"),
    ('{"text": "a"}'.encode("utf-16"), r"line 3 of .*x\.jsonl is not UTF-8 text"),
]


@pytest.mark.parametrize(("line", "sentence"), BAD_LINES)
def test_a_bad_line_is_named_by_its_number_in_the_file_and_the_others_are_read(tmp_path, line, sentence):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n \n' + line + b'\n{"text": "good"}')
    records = list(read_records(find_inputs([tmp_path / "x.jsonl"])))
    assert [document_of(record) for record in (records[0], records[-1])] == ["good", "good"]
    with pytest.raises(ValueError, match=sentence) as raised:
        document_of(records[1])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.array([[1, 2]]), r"is an array of int64, shape \(1, 2\); token ids are integers in one dimension"),
        (np.array([1.0]), "is an array of float64"),
        (np.array(["a"], object), "is not an .npy file of token ids"),
    ],
)
def test_an_array_that_is_no_token_ids_is_named(array, sentence):
    with pytest.raises(ValueError, match=f"member 4 of x.tar {sentence}"):
        document_of(Record("npy", npy_of(array), "x.tar", 4, "member"))
    with pytest.raises(ValueError, match=r"is not an \.npy file"):
        document_of(Record("npy", npy_of(np.arange(5))[:-1], "x.tar", 4, "member"))


def test_halves_of_surrogate_pairs_are_replaced_and_whole_ones_kept():
    line = rb'{"text": "a\ud800 \ud83d\ude00 \udc00"}'
    assert document_of(Record("json", line, "x", 1)) == "a\ufffd \U0001f600 \ufffd"


def test_a_null_is_an_empty_text_in_every_format(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": null}\n')
    write_parquet(tmp_path / "y.parquet", [None, "b"])
    assert list(read_texts(find_inputs([tmp_path]))) == ["", "", "b"]


def test_a_parquet_column_that_is_not_there_or_no_text_is_named(tmp_path):
    write_parquet(tmp_path / "x.parquet", ["a"], other=["b"])
    assert list(read_texts(find_inputs([tmp_path], text_key="other"))) == ["b"]
    with pytest.raises(ValueError, match=r"x\.parquet has no column 'body'; its columns are id, text, other: name the one"):
        list(read_records(find_inputs([tmp_path], text_key="body")))
    with pytest.raises(ValueError, match=r"column 'id' of .*x\.parquet holds int64, not text"):
        list(read_records(find_inputs([tmp_path], text_key="id")))


def test_bytes_in_a_parquet_column_that_are_not_utf_8_are_named_by_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"good", b"\xff"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"row 2 of .*x\.parquet is not UTF-8 text: byte 0 is 0xff"):
        list(read_texts(find_inputs([tmp_path])))


RANDOM_TEXTS = [np.random.default_rng(number).bytes(3000).hex() for number in range(40)]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.tar", "x.tar.gz", "x.tar.zst", "x.parquet"])
@pytest.mark.parametrize("missing", [4, 1024, 0.1, 0.7, 1.0], ids=str)
def test_a_file_that_was_cut_short_is_an_error_and_never_the_end(tmp_path, name, missing):
    file = tmp_path / name
    tar = tar_of({f"{number}.txt": text.encode() for number, text in enumerate(RANDOM_TEXTS)})
    content = tar[: 40 * (512 + 6144) + 512] if ".tar" in name else lines_of(RANDOM_TEXTS)  # of the tar's end, the one block that counts
    if name == "x.parquet":
        write_parquet(file, RANDOM_TEXTS)
    else:
        file.write_bytes(
            gzip.compress(content) if name.endswith("gz") else zstandard.compress(content) if name.endswith("zst") else content
        )
    assert list(read_texts(find_inputs([file]))) == RANDOM_TEXTS
    os.truncate(file, file.stat().st_size - int(missing * (file.stat().st_size if isinstance(missing, float) else 1)))
    with pytest.raises(ValueError, match=r"x\.[a-z.]+ is damaged or (cut short|no Parquet file): ."):
        list(read_records(find_inputs([file])))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.tar", "x.parquet"])
def test_a_file_of_another_kind_or_with_garbage_within_is_named(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"neither of them" * 1000)
    with pytest.raises(ValueError, match=r"is damaged or"):
        list(read_records(find_inputs([file])))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.tar.gz", "x.parquet"])
def test_damage_within_a_file_with_checksums_is_named(tmp_path, name):
    file = tmp_path / name
    with_checksum = zstandard.ZstdCompressor(write_checksum=True).compress  # as the command zstd
    if name == "x.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": RANDOM_TEXTS}), file, write_page_checksum=True)
    else:
        file.write_bytes((with_checksum if name.endswith("zst") else gzip.compress)(lines_of(RANDOM_TEXTS)))
    content = bytearray(file.read_bytes())
    content[5000:5100] = b"\xff" * 100
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.[a-z.]+ is damaged or "):
        list(read_records(find_inputs([file])))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that cannot be read from its beginning")
def test_a_file_that_cannot_be_read_is_named():
    with pytest.raises(OSError, match="/proc/self/mem"):
        list(read_records(find_inputs(["/proc/self/mem"])))


def test_a_stream_that_gives_a_byte_at_a_time_is_seen_up_to_the_whole_buffer():
    class Trickle(io.RawIOBase):
        rest = b"  some bytes"

        def readinto(self, buffer):
            buffer[:1], self.rest = self.rest[:1], self.rest[1:]
            return len(self.rest) > 0

    assert io.BufferedReader(inputs_module.readers._Filled(Trickle())).peek() == b"  some byte"


def test_garbage_in_place_of_a_tar_header_is_an_error_and_not_the_archives_end(tmp_path):
    content = bytearray(tar_of({"0.txt": b"a", "1.txt": b"b", "2.txt": b"c"}))
    content[1024:1034] = b"x" * 10
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.tar is damaged or cut short: .* where a member or the archive's end must be"):
        list(read_records(find_inputs([tmp_path / "x.tar"])))


def test_what_is_read_adds_up_to_the_total(tmp_path):
    files = write_every_way(tmp_path, TEXTS)
    read: list[int] = []
    found = find_inputs(files)
    assert sum(1 for _ in read_records(found, on_read=read.append)) == len(TEXTS) * len(files)
    assert sum(read) == total_bytes(found) == sum(file.stat().st_size for file in files)
    assert total_bytes(find_inputs(["-", *files])) is None


STDIN_CASES = [
    ("auto", b'\xef\xbb\xbf\n  \n{"text": "a"}\n\n{"text": "b"}\n', ["a", "b"]),
    ("auto", b"[no JSON]\nbut text", ["[no JSON]\nbut text"]),
    ("auto", b"", [""]),
    ("text", b'{"text": "a"}', ['{"text": "a"}']),
    ("webdataset", tar_of({"a.txt": b"a", "b.txt": b"b"}), ["a", "b"]),
]


@pytest.mark.parametrize(("format", "data", "expected"), STDIN_CASES)
def test_standard_input_is_json_lines_if_it_looks_so_and_text_otherwise(format, data, expected):
    read = f"list(read_texts(find_inputs(['-'], format={format!r})))"
    program = f"import json; from titans_scale.data.text.inputs import *; print(json.dumps({read}))"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(data[:1])  # a pipe may give its first byte alone
    process.stdin.flush()
    out, _ = process.communicate(data[1:], timeout=60)
    assert json.loads(out) == expected


def test_inputs_compare_and_travel_and_their_fingerprint_is_that_of_the_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    found = find_inputs([tmp_path])
    assert pickle.loads(pickle.dumps(found)) == found == find_inputs([tmp_path])
    others = [find_inputs([tmp_path], text_key="b"), find_inputs([tmp_path], split_text_on="b"), find_inputs([tmp_path], format="text")]
    fingerprints = {inputs_fingerprint(inputs) for inputs in (found, *others)}
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n')
    assert len(fingerprints | {inputs_fingerprint(found)}) == 5
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "moved" / "a.jsonl")
    assert inputs_fingerprint(find_inputs([tmp_path])) not in fingerprints
    with pytest.raises(ValueError, match="standard input has no fingerprint"):
        inputs_fingerprint(Inputs(files=(InputFile(path="-", format="auto"),)))


def test_a_separator_may_be_typed_with_escapes():
    assert separator(r"\n\n<|end|>\t") == "\n\n<|end|>\t"

import gzip
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_scale.data import Document, read_corpus, standard_library, text_files, write_corpus
from titans_scale.data.text import corpus as corpus_module


def documents(*texts):
    return [Document(text=text, source=f"{number}.txt") for number, text in enumerate(texts)]


def texts_of(folder, split):
    return list(read_corpus(folder / f"{split}.jsonl"))


@pytest.fixture
def library(tmp_path):
    """A folder as a user may have it."""
    folder = tmp_path / "library"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    (folder / "deep" / "b.md").write_text("# caf\u00e9\n")
    (folder / "deep" / "er" / "c.py").write_bytes("# coding: latin-1\nname = '\u00e9'\r\n".encode("latin-1"))
    (folder / "d.jsonl").write_text('{"text": "one"}\n{"text": "t\\ud800wo"}\n{"no": 1}\nnot json\n[1]\n{"text": 3}\n')
    (folder / "image.png").write_bytes(bytes(range(256)))
    (folder / "zeros.txt").write_bytes(b"text\0with zeros")
    (folder / "bad.py").write_text("# coding: no-such-coding\n")
    (folder / "rot.py").write_text("# coding: rot13\n")
    (folder / "blank.txt").write_text(" \n")
    (folder / ".hidden").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    return folder


def test_a_folder_is_read_with_its_subfolders_and_what_is_no_text_is_counted(library):
    files = text_files(library)
    assert {document.source: document.text for document in files} == {
        "library/a.txt": "first\r\nsecond\r\n",
        "library/deep/b.md": "# caf\u00e9\n",
        "library/deep/er/c.py": "# coding: latin-1\nname = '\u00e9'\n",
        "library/d.jsonl:1": "one",
        "library/d.jsonl:2": "t\ufffdwo",
    }
    assert files.skipped == {"not text": 4, "empty": 1, 'lines without a "text"': 4}


def test_compressed_files_parquet_and_tars_are_read_and_what_is_cut_short_is_counted(tmp_path):
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.ndjson.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"three")[:-6])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["four", None, "five"]}), tmp_path / "d.parquet")
    with tarfile.open(tmp_path / "e.tar", "w") as tar:
        for name, data in {"x.json": b'{"text": "six"}', "x.png": b"image", "y.json": b"{}", "z.txt": b"seven"}.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    files = text_files(tmp_path, label="x")
    assert {document.source: document.text for document in files} == {
        "x/a.jsonl.gz:1": "one",
        "x/a.jsonl.gz:2": "two",
        "x/b.ndjson.zst:1": "one",
        "x/b.ndjson.zst:2": "two",
        "x/c.txt.gz": "three",
        "x/d.parquet:1": "four",
        "x/d.parquet:3": "five",
        "x/e.tar:1": "six",
        "x/e.tar:4": "seven",
    }
    assert files.skipped == {"unreadable": 1, "empty": 1, 'lines without a "text"': 1, "members of tars that are no text": 1}


def test_a_separator_parts_a_text_file_and_a_key_says_where_the_text_is(tmp_path):
    (tmp_path / "a.txt").write_text("one\n--\ntwo\n--\n \n--\n")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n{"text": "four"}\n')
    files = text_files(tmp_path, label="x", text_key="body", split_text_on="\n--\n")
    assert {document.source: document.text for document in files} == {"x/a.txt:1": "one", "x/a.txt:2": "two", "x/b.jsonl:1": "three"}
    assert files.skipped == {"empty": 1, 'lines without a "body"': 1}


def test_a_parquet_file_without_the_column_is_named_with_those_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["four"]}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet has no column 'text'; its columns are body: name the one to read as text_key"):
        list(text_files(tmp_path))
    assert [document.text for document in text_files(tmp_path, text_key="body")] == ["four"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.md", "*.py"], [], {"library/deep/b.md", "library/deep/er/c.py"}),
        (["deep/*"], ["*.py"], {"library/deep/b.md"}),
        (["*"], ["*.jsonl", "deep/*"], {"library/a.txt"}),
        (["*.rst"], [], set()),
    ],
)
def test_globs_choose_by_name_or_path(library, include, exclude, expected):
    assert {document.source for document in text_files(library, include=include, exclude=exclude)} == expected


def test_reading_again_gives_the_same_documents_in_the_same_order(library):
    files = text_files(library)
    first, counts = list(files), files.skipped
    assert list(files) == list(text_files(library)) == first
    assert files.skipped == counts


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is neither a file nor a folder"):
        text_files(tmp_path / "nowhere")


def test_the_standard_library_is_enough_for_a_first_run_and_has_no_tests_or_tables_in_it():
    sources = [document.source for document in standard_library()]
    assert any(source.endswith("/dataclasses.py") for source in sources)
    left_out = ("/test/", "/tests/", "site-packages", "/encodings/")
    assert not [source for source in sources if any(folder in source for folder in left_out)]


def test_the_split_holds_out_about_its_fraction_and_loses_nothing(tmp_path):
    texts = [f"document {number}" for number in range(2000)]
    report = write_corpus(documents(*texts), tmp_path, validation_fraction=0.1)
    train, validation = texts_of(tmp_path, "train"), texts_of(tmp_path, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert 150 < len(validation) < 250  # 200 expected, standard deviation 13
    assert report.documents == {"train": len(train), "validation": len(validation)}
    assert report.text_bytes["train"] == sum(len(text) for text in train)
    assert report.split_by == "hash"


@settings(deadline=None, max_examples=40)
@given(numbers=st.lists(st.integers(0, 4), min_size=2, max_size=12).filter(lambda numbers: len(set(numbers)) > 1))
def test_copies_of_a_text_are_on_one_side_and_no_side_is_empty(tmp_path_factory, numbers):
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"text {number}" for number in numbers]
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        write_corpus(documents(*texts), folder, validation_fraction=fraction, overwrite=True)
        train, validation = texts_of(folder, "train"), texts_of(folder, "validation")
        assert train and validation
        assert not set(train) & set(validation)
        assert sorted(train + validation) == sorted(texts)


def test_a_document_keeps_its_side_when_others_come_or_go(tmp_path):
    texts = [f"document {number}" for number in range(300)]
    write_corpus(documents(*texts), tmp_path / "all", validation_fraction=0.3)
    write_corpus(documents(*texts[::-2]), tmp_path / "half", validation_fraction=0.3)
    assert set(texts_of(tmp_path / "half", "validation")) == set(texts_of(tmp_path / "all", "validation")) & set(texts[::-2])


def test_a_single_text_is_cut_in_head_and_tail_at_a_line(tmp_path):
    text = "".join(f"line {number}\n" for number in range(1000))
    report = write_corpus(documents(text), tmp_path, validation_fraction=0.1)
    (head,), (tail,) = texts_of(tmp_path, "train"), texts_of(tmp_path, "validation")
    assert head + tail == text
    assert head.endswith("\n")
    assert len(tail) == pytest.approx(0.1 * len(text), abs=10)
    assert report.split_by == "position"


@pytest.mark.parametrize("text", ["ab", "x" * 1000, "\n" * 3 + "b"])
@pytest.mark.parametrize("fraction", [0.001, 0.03, 0.999])
def test_a_single_text_of_any_shape_gives_both_sides_something(tmp_path, text, fraction):
    write_corpus(documents(text, text), tmp_path, validation_fraction=fraction)
    (head,), (tail,) = texts_of(tmp_path, "train"), texts_of(tmp_path, "validation")
    assert head + tail == text
    assert head and tail


@pytest.mark.parametrize("limit", [7, 100, 101, 5000])
def test_max_bytes_is_kept_and_cuts_between_two_characters(tmp_path, limit):
    report = write_corpus(documents(*[f"\u8a18{number}" * 9 for number in range(90)]), tmp_path, max_bytes=limit)
    total = sum(report.text_bytes.values())
    assert limit - 3 < total <= limit or (limit == 5000 and total < limit)


def test_lines_of_the_file_are_documents_whatever_is_in_them(tmp_path):
    texts = ["two\nlines\r\n", "a\u2028b\x85c\x1c", '"quoted" \\n', "\u8a18\u61b6"]
    write_corpus(documents(*texts), tmp_path)
    assert sorted(texts_of(tmp_path, "train") + texts_of(tmp_path, "validation")) == sorted(texts)
    line = json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[0])
    assert set(line) == {"text", "source"}


@pytest.mark.parametrize("texts", [[], ["a"]])
def test_too_little_text_is_one_sentence_and_leaves_nothing(tmp_path, texts):
    with pytest.raises(ValueError, match=r"found no text|one document of 1 character"):
        write_corpus(documents(*texts), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 3])
def test_a_fraction_that_leaves_a_side_empty_is_refused(tmp_path, fraction):
    with pytest.raises(ValueError, match=f"validation_fraction is {fraction}"):
        write_corpus(documents("a", "b"), tmp_path, validation_fraction=fraction)


def test_a_second_run_says_that_nothing_changed_and_another_corpus_needs_overwrite(tmp_path):
    assert not write_corpus(documents("a", "b"), tmp_path).unchanged
    assert write_corpus(documents("a", "b"), tmp_path).unchanged
    with pytest.raises(ValueError, match="holds another corpus"):
        write_corpus(documents("a", "c"), tmp_path)
    assert sorted(texts_of(tmp_path, "train") + texts_of(tmp_path, "validation")) == ["a", "b"]
    write_corpus(documents("a", "c"), tmp_path, overwrite=True)
    assert sorted(texts_of(tmp_path, "train") + texts_of(tmp_path, "validation")) == ["a", "c"]
    assert {file.name for file in tmp_path.iterdir()} == {"train.jsonl", "validation.jsonl"}


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def interrupted():
        yield from documents("a", "b")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(interrupted(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_cut_off_between_the_two_files_there_is_no_corpus_rather_than_a_mixed_one(tmp_path, monkeypatch):
    write_corpus(documents("a", "b"), tmp_path)
    replace = corpus_module.Path.replace

    def replace_validation_alone(self, target):
        if target.name == "train.jsonl":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(corpus_module.Path, "replace", replace_validation_alone)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(documents("c", "d"), tmp_path, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"train\.jsonl does not exist; make a corpus with"):
        texts_of(tmp_path, "train")
    write_corpus(documents("c", "d"), tmp_path)
    assert sorted(texts_of(tmp_path, "train") + texts_of(tmp_path, "validation")) == ["c", "d"]


def test_a_bad_line_of_a_corpus_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(ValueError, match=r'line 2 of .*train\.jsonl is not a JSON object with a "text"'):
        texts_of(tmp_path, "train")

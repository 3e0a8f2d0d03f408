import json
import pickle

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from titans_scale.data import load_tokenizer
from titans_scale.data.tokenizers import huggingface

TEXTS = [
    "def f(x):\n    return x + 12\n\n\n\tif x:\t\tpass ;;\n" * 5,
    "it's a mem\u00f3ry,\n\n  isn't   it \u8a18\u61b6\n \n99 1234\n" * 5,
    "a\n" * 50,
]
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace("{1,3}", "")
SPECIAL = ["<|begin|>", "<|endoftext|>"]


def byte_level(pattern=None, *, vocab_size=420):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), words])
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return tokenizer


def word_level(vocabulary, **options):
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def saved(tokenizer, folder, **config):
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def cuttable(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("cuttable") for _ in range(3)]
    return [load_tokenizer(saved(byte_level(pattern), folder)) for pattern, folder in zip((None, LLAMA_3, QWEN_2), folders, strict=True)]


@settings(deadline=None, max_examples=200)
@given(text=st.text("\n\n\n \r\t.'as12\u00a0\u00e9\u8a18\u0301\x85\u2028\x1c\u180e<|>", max_size=60), size=st.integers(1, 9))
def test_a_long_text_that_is_cut_has_the_tokens_of_the_whole(cuttable, text, size):
    for tokenizer in cuttable:
        whole = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface, "PIECE_CHARACTERS", size)
            assert tokenizer.encode(text) == whole
            assert "".join(tokenizer.pieces(text)) == text


def test_a_long_text_is_cut_where_that_is_known_to_be_sound(cuttable):
    for tokenizer in cuttable:
        pieces = list(tokenizer.pieces("a line of text\n" * 20_000))
        assert len(pieces) == 5 and all(piece.endswith("text\n") for piece in pieces)


def with_normalizer(tokenizer):
    tokenizer.normalizer = normalizers.Prepend("_")


def with_a_blank_before_every_text(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_words_that_span_lines(tokenizer):
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("c\n|a"), "isolated"), words])


def with_an_added_token_that_spans_lines(tokenizer):
    tokenizer.add_tokens([AddedToken("a\na", special=False)])


@pytest.mark.parametrize(
    "change", [with_normalizer, with_a_blank_before_every_text, with_words_that_span_lines, with_an_added_token_that_spans_lines]
)
def test_a_tokenizer_that_is_not_known_to_allow_it_gets_a_long_text_in_one_piece(tmp_path, change):
    tokenizer = byte_level()
    change(tokenizer)
    loaded = load_tokenizer(saved(tokenizer, tmp_path))
    text = "a\n" * 50_000
    assert list(loaded.pieces(text)) == [text]
    tokenizer.encode_special_tokens = True
    assert loaded.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "copied", [lambda tokenizer: tokenizer, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))], ids=["", "pickled"]
)
def test_special_tokens_are_neither_read_out_of_a_text_nor_added(tmp_path, copied):
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|endoftext|>", special_tokens=[("<|begin|>", 0), ("<|endoftext|>", 1)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    loaded = copied(load_tokenizer(saved(tokenizer, tmp_path)))
    text = "<|begin|>some<|endoftext|> text"
    ids = loaded.encode(text)
    assert not {0, 1} & set(ids) and len(ids) > 10 and len(loaded.encode("a")) == 1
    assert loaded.decode(ids) == text
    assert loaded.decode([0, *ids, 1]) == f"<|begin|>{text}"  # of a model that samples them: seen, but for end of document
    assert [array.tolist() for array in loaded.encode_pieces([text, "a"])] == [ids, loaded.encode("a")]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "<|endoftext|>"),
        ({"tokenizer_config.json": {"eos_token": "<|begin|>"}}, "<|begin|>"),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|begin|>", "lstrip": False}}}, "<|begin|>"),
        ({"tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": "<|begin|>"}}, "<|begin|>"),
    ],
    ids=["usual name", "config", "map", "second file"],
)
def test_the_end_of_document_token_is_the_one_named_beside_the_model(tmp_path, files, expected):
    saved(byte_level(), tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id == SPECIAL.index(expected)
    (tmp_path / "copy").mkdir()
    copy = load_tokenizer(tmp_path / "copy" / loaded.save(tmp_path / "copy"))
    assert (copy.eos_id, copy.fingerprint) == (loaded.eos_id, loaded.fingerprint)


def test_another_end_of_document_token_is_another_fingerprint(tmp_path):
    file = saved(byte_level(), tmp_path)
    before = load_tokenizer(file).fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|begin|>"}')
    assert load_tokenizer(file).fingerprint != before


@pytest.mark.parametrize(
    ("tokenizer", "config", "sentence"),
    [
        (word_level({"a": 0}), {}, r"has no end-of-document token: its vocabulary lacks <\|endoftext\|>, </s>, <eos>; name one as"),
        (word_level({"a": 0}), {"eos_token": "<end>"}, "has no end-of-document token: its vocabulary lacks <end>;"),
        (word_level({"a": 0, "</s>": 1}), {}, "encodes some text to </s>, so that token cannot part the documents"),
        (
            tokenizers.Tokenizer(
                models.BPE({letter: letter_id for letter_id, letter in enumerate("<eos>")} | {"<eos>": 5}, [], unk_token="<eos>")
            ),
            {},
            "encodes some text to <eos>",
        ),
        (word_level({"a": 0}), {"eos_token": "a"}, "encodes some text to a"),
    ],
    ids=["no usual name", "named one missing", "a word", "the unknown word", "a word by name"],
)
def test_a_tokenizer_without_a_sound_end_of_document_token_is_refused(tmp_path, tokenizer, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_tokenizer(saved(tokenizer, tmp_path, **config))


@pytest.mark.parametrize(("vocabulary", "merges"), [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_the_older_pair_of_files_is_the_same_tokenizer(tmp_path, vocabulary, merges):
    tokenizer = byte_level()
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / vocabulary)
    (tmp_path / "merges.txt").rename(tmp_path / merges)
    loaded = load_tokenizer(tmp_path)
    (tmp_path / "new").mkdir()
    reference = load_tokenizer(saved(tokenizer, tmp_path / "new"))
    for text in [*TEXTS, "<|endoftext|>"]:
        assert loaded.encode(text) == reference.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    copy = load_tokenizer(tmp_path / "new" / loaded.save(tmp_path / "new"))
    assert (copy.fingerprint, copy.eos_id, copy.vocab_size) == (loaded.fingerprint, reference.eos_id, reference.vocab_size)


def test_dropout_of_merges_is_off(tmp_path):
    tokenizer = byte_level()
    tokenizer.model.dropout = 0.9
    loaded = load_tokenizer(saved(tokenizer, tmp_path))
    assert len({tuple(loaded.encode(TEXTS[0])) for _ in range(5)}) == 1


def test_the_vocabulary_goes_up_to_the_highest_id_also_with_gaps(tmp_path):
    tokenizer = word_level({"a": 0, "b": 70}, unk_token="a")
    tokenizer.add_special_tokens(["</s>"])
    loaded = load_tokenizer(saved(tokenizer, tmp_path))
    assert loaded.vocab_size == max(loaded.eos_id, 70) + 1


def test_a_tokenizer_that_some_texts_break_is_refused(tmp_path):
    tokenizer = word_level({"a": 0})
    tokenizer.add_special_tokens(["</s>"])
    with pytest.raises(ValueError, match="cannot encode every text: WordLevel error"):
        load_tokenizer(saved(tokenizer, tmp_path))


@pytest.mark.parametrize("content", ["{}", '{"model": 3}', "{not json", '{"version": "1.0", "model": {"type": "New"}}', '{"a": "\udcff"}'])
def test_a_file_that_is_no_tokenizer_is_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer of the package tokenizers: .") as raised:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    file = saved(byte_level(), tmp_path)
    monkeypatch.setattr(huggingface, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r'takes the package tokenizers: pip install "titans-scale\[data\]"'):
        load_tokenizer(file)

import hashlib
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_scale.data import ByteTokenizer, load_tokenizer, train_sentencepiece
from titans_scale.data.tokenizers import training

TEXTS = [
    "def write(self, key):\n    return self.memory[key] + 12\n\n\n\tif key:\t\tpass\n" * 3,
    "the memory learns   to forget \u2014 na\u00efve caf\u00e9 \U0001f600 \u8a18\u61b6\n" * 3,
]
AWKWARD = [
    "",
    " ",
    "  \n\n\t ",
    "\0",
    "a\0b",
    "\r\n",
    "\x01\x7f\x85\u2028",
    "\ufeff",
    "\ufffd",
    "</s>",
    "<unk>",
    "<0x0A>",
    "\u2581",
    " \u2581\u2581 a\u2581",
    "\u2585",
    "<|endoftext|>",
    "a <|endoftext|></s>\n<|begin|>",
]
any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("\u2581\u2585 \n\tae<>/s\0\U0001f600"))


KINDS = ["byte", "sentencepiece", "huggingface"]


def write_byte_level(file):
    """A tokenizer.json as GPT-2's, which also puts a token before every text when it is asked to."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "a  b\n\n c \n" * 9], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    model = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return {
        "byte": ByteTokenizer(),
        "sentencepiece": train_sentencepiece(TEXTS, model, 330),
        "huggingface": load_tokenizer(write_byte_level(model.with_name("tokenizer.json"))),
    }


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text)
@settings(deadline=None)
def test_decoding_gives_any_text_back(tokenizers, kind, text):
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", AWKWARD)
def test_decoding_gives_awkward_texts_back(tokenizers, kind, text):
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["a line of text\n", "no newline ", "\u8a18\u2581" + "m" * 900])
def test_a_text_of_many_pieces_comes_back_and_its_tokens_are_those_of_its_pieces(tokenizers, kind, unit):
    tokenizer, text = tokenizers[kind], unit * (200_000 // len(unit))
    pieces = list(tokenizer.pieces(text))
    assert len(pieces) > 2 or (kind == "huggingface" and unit[-1] != "\n")
    tokens = tokenizer.encode(text)
    assert tokens == [token for piece in pieces for token in tokenizer.encode(piece)]
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text)
@settings(deadline=None)
def test_no_text_encodes_to_end_of_document_or_past_the_vocabulary(tokenizers, kind, text):
    tokens = tokenizers[kind].encode(text)
    assert tokenizers[kind].eos_id not in tokens
    assert all(0 <= token < tokenizers[kind].vocab_size for token in tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_skips_end_of_document_and_marks_ids_that_a_padded_model_may_sample(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eos_id, tokenizer.vocab_size, *tokenizer.encode("c")]) == "ab\ufffdc"


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_is_refused_by_name(tokenizers, kind):
    with pytest.raises(ValueError, match=r"character 2 of a text is the lone surrogate '\\ud800'"):
        tokenizers[kind].encode("ab\ud800")


def test_frequent_words_are_fewer_tokens_than_bytes(tokenizers):
    assert len(tokenizers["sentencepiece"].encode("the memory learns")) < 10


def test_the_same_texts_train_the_same_file(tokenizers, tmp_path):
    again = train_sentencepiece(iter(TEXTS), tmp_path / "again.model", 330)
    assert again.fingerprint == tokenizers["sentencepiece"].fingerprint
    assert again.fingerprint == hashlib.sha256((tmp_path / "again.model").read_bytes()).hexdigest()


def test_texts_with_characters_that_sentencepiece_skips_are_learned_from(tmp_path):
    spoiled = [f"\u2585\0{text}" for text in TEXTS]
    assert train_sentencepiece(spoiled, tmp_path / "m", 300).vocab_size == 300


def test_training_text_may_be_one_long_line(tmp_path):
    tokenizer = train_sentencepiece([("memory " * 50_000)], tmp_path / "m", 270)
    assert len(tokenizer.encode(" memory memory")) <= 4


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=30), max_bytes=st.integers(1, 100))
def test_training_takes_about_max_bytes_evenly_in_the_order_of_the_texts(lengths, max_bytes):
    texts = [f"{number:03d}{'x' * length}" for number, length in enumerate(lengths)]
    selected = training._selection(iter(texts), max_bytes=max_bytes)
    rank = {text: hashlib.sha256(text.encode()).digest()[:8] for text in texts}
    total = sum(map(len, selected))
    assert selected == sorted(selected)
    assert total >= min(max_bytes, sum(map(len, texts)))
    assert not selected or total - len(max(selected, key=rank.get)) < max_bytes
    assert set(selected) == set(sorted(texts, key=rank.get)[: len(selected)])


@pytest.mark.parametrize(("option", "value"), [("max_bytes", 0), ("character_coverage", 0.0), ("character_coverage", 1.1)])
def test_training_refuses_options_that_cannot_be(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}; it must be"):
        train_sentencepiece(TEXTS, tmp_path / "m", 300, **{option: value})


def test_a_vocabulary_beyond_the_text_names_the_largest_that_works(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size 5000 is more than this text supports; the largest that works is \d+") as raised:
        train_sentencepiece(TEXTS, tmp_path / "m", 5000)
    assert not list(tmp_path.iterdir())
    largest = int(str(raised.value).rsplit(" ", 1)[1])
    assert train_sentencepiece(TEXTS, tmp_path / "m", largest).vocab_size == largest


def test_a_vocabulary_below_the_characters_names_the_smallest_that_works(tmp_path):
    with pytest.raises(ValueError, match="cannot hold the characters") as raised:
        train_sentencepiece(TEXTS, tmp_path / "m", 260)
    smallest = int(str(raised.value).rsplit(" ", 1)[1])
    assert train_sentencepiece(TEXTS, tmp_path / "m", smallest).vocab_size == smallest


@pytest.mark.parametrize("texts", [[], [""], ["", "\n"]])
def test_no_text_to_train_on_is_said(tmp_path, texts):
    with pytest.raises(ValueError, match=r"no text|more than this text supports"):
        train_sentencepiece(texts, tmp_path / "m", 300)


def test_load_tokenizer_takes_byte_or_a_model_file(tokenizers):
    trained = tokenizers["sentencepiece"]
    loaded = load_tokenizer(trained.spec)
    assert (loaded.fingerprint, loaded.spec, loaded.vocab_size) == (trained.fingerprint, trained.spec, 330)
    assert (load_tokenizer("byte").vocab_size, load_tokenizer("byte").eos_id) == (257, 256)


def test_load_tokenizer_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="'bite' is neither 'byte' nor a file"):
        load_tokenizer("bite")
    with pytest.raises(ValueError, match="holds no tokenizer: no "):
        load_tokenizer(tmp_path)
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "text.model")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_goes_to_another_process(tokenizers, kind):
    assert pickle.loads(pickle.dumps(tokenizers[kind])).encode(TEXTS[1]) == tokenizers[kind].encode(TEXTS[1])


def test_a_model_made_elsewhere_that_adds_a_blank_is_not_cut_up(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5),
        model_prefix=str(tmp_path / "m"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=3,
    )
    tokenizer = load_tokenizer(tmp_path / "m.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    text = "the memory\u2581learns " * 5000
    assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_beside_the_shards_is_the_same_tokenizer_and_is_written_once(tokenizers, tmp_path, kind):
    original = tokenizers[kind]
    name = original.save(tmp_path)
    assert name == {"byte": "byte", "sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}[kind]
    copy = load_tokenizer(name if kind == "byte" else tmp_path / name)
    assert (copy.fingerprint, copy.vocab_size, copy.eos_id) == (original.fingerprint, original.vocab_size, original.eos_id)
    assert copy.encode(TEXTS[1]) == original.encode(TEXTS[1])
    assert bool(list(tmp_path.iterdir())) == (kind != "byte")
    before = {file: file.stat().st_ino for file in tmp_path.iterdir()}
    assert copy.save(tmp_path) == name
    assert {file: file.stat().st_ino for file in tmp_path.iterdir()} == before
    if kind == "sentencepiece":
        assert load_tokenizer(tmp_path).fingerprint == original.fingerprint  # a folder will do

import hashlib
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_scale.data import ByteTokenizer, load_tokenizer, train_sentencepiece

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
]
any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("\u2581\u2585 \n\tae<>/s\0\U0001f600"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    model = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return {"byte": ByteTokenizer(), "sentencepiece": train_sentencepiece(TEXTS, model, 330)}


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@given(text=any_text)
@settings(deadline=None)
def test_decoding_gives_any_text_back(tokenizers, kind, text):
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize("text", AWKWARD)
def test_decoding_gives_awkward_texts_back(tokenizers, kind, text):
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize("unit", ["a line of text\n", "no newline ", "\u8a18\u2581" + "m" * 900])
def test_a_text_of_many_pieces_comes_back_and_its_tokens_are_those_of_its_pieces(tokenizers, kind, unit):
    tokenizer, text = tokenizers[kind], unit * (200_000 // len(unit))
    pieces = list(tokenizer.pieces(text))
    assert len(pieces) > 2
    tokens = tokenizer.encode(text)
    assert tokens == [token for piece in pieces for token in tokenizer.encode(piece)]
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@given(text=any_text)
@settings(deadline=None)
def test_no_text_encodes_to_end_of_document_or_past_the_vocabulary(tokenizers, kind, text):
    tokens = tokenizers[kind].encode(text)
    assert tokenizers[kind].eos_id not in tokens
    assert all(0 <= token < tokenizers[kind].vocab_size for token in tokens)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_threads_do_not_change_the_tokens(tokenizers, kind):
    one, three = (tokenizers[kind].encode_pieces(TEXTS * 5, num_threads=threads) for threads in (1, 3))
    assert [ids.tolist() for ids in one] == [ids.tolist() for ids in three]


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_decode_skips_end_of_document_and_marks_ids_that_a_padded_model_may_sample(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eos_id, tokenizer.vocab_size, *tokenizer.encode("c")]) == "ab\ufffdc"


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
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


@pytest.mark.parametrize("total_bytes", [None, 2_000_000])
def test_training_reads_about_max_bytes(tmp_path, total_bytes):
    seen = []
    texts = (seen.append(n) or f"{n} abc " * 200 for n in range(1400))
    train_sentencepiece(texts, tmp_path / "m", 274, max_bytes=100_000, total_bytes=total_bytes)
    assert len(seen) < 120 if total_bytes is None else len(seen) > 700


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
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "text.model")


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
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

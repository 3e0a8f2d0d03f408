"""Bits per byte: what a model pays for a text, and what gzip and xz do."""

import gzip
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import VARIANTS, perturbed_model

from titans_scale import TitansLM
from titans_scale.data import load_tokenizer
from titans_scale.evaluation.bits_per_byte import code_length, compressor_bits_per_byte
from titans_scale.evaluation.documents import first_bytes, read_documents

BYTES = load_tokenizer("byte")
DOCUMENTS = ["def f(x):\n    return x\n", "short", "na\u00efve caf\u00e9 \u4e2d\u6587 " * 5, "x"]


def byte_model(variant: str = "mac") -> TitansLM:
    return perturbed_model(variant, "vocab_size=257")


def bits_in_one_pass(model: TitansLM, document: str) -> float:
    """Straight from the definition: no padding, no pieces, no state."""
    tokens = torch.tensor([BYTES.eos_id, *BYTES.encode(document), BYTES.eos_id])
    with torch.no_grad():
        log_p = F.log_softmax(model(tokens[None, :-1]).logits[0], dim=-1)
    return -log_p.gather(1, tokens[1:, None]).sum().item() / math.log(2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("piece_tokens", "batch_size"), [(7, 3), (512, 1), (1, 8)])
def test_streamed_and_padded_code_length_equals_one_pass_over_each_document(variant, piece_tokens, batch_size):
    model = byte_model(variant)
    length = code_length(model, DOCUMENTS, BYTES, piece_tokens=piece_tokens, batch_size=batch_size)
    assert length.bits == pytest.approx(sum(bits_in_one_pass(model, document) for document in DOCUMENTS), rel=1e-5)  # logits in float32
    assert length.num_bytes == sum(len(document.encode()) for document in DOCUMENTS)
    assert length.num_tokens == length.num_bytes + len(DOCUMENTS)


def test_bits_per_byte_of_a_model_that_knows_nothing_is_the_logarithm_of_its_vocabulary():
    model = byte_model()
    with torch.no_grad():
        model.embedding.weight.zero_()  # tied: every logit is 0
    length = code_length(model, ["abc"], BYTES)
    assert length.bits_per_byte == pytest.approx(4 * math.log2(257) / 3)  # three bytes and the end of the document


def test_evaluation_changes_neither_the_weights_nor_the_mode():
    model = byte_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    code_length(model, DOCUMENTS, BYTES)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tokenizer_that_loses_bytes_is_refused():
    class Lowercase:
        eos_id = 256

        def encode(self, text):
            return BYTES.encode(text.lower())

        def decode(self, ids):
            return BYTES.decode(ids)

    with pytest.raises(ValueError, match="does not give the document that starts with 'ABC' back"):
        code_length(byte_model(), ["ABC"], Lowercase())


@pytest.mark.parametrize("documents", [[], [""]])
def test_no_text_is_an_error(documents):
    with pytest.raises(ValueError, match="no text"):
        code_length(byte_model(), documents, BYTES)


def test_compressors_see_the_same_bytes_laid_end_to_end():
    scores = compressor_bits_per_byte(DOCUMENTS)
    data = "".join(DOCUMENTS).encode()
    assert scores["gzip -9"] == 8 * len(gzip.compress(data, 9)) / len(data)
    assert set(scores) == {"gzip -9", "xz -9e"}


def test_first_bytes_cuts_between_characters_and_takes_no_more():
    assert first_bytes(iter(["abc", "\u4e2d\u6587", "d"]), 5) == ["abc"]  # two of a character's three bytes do not make one
    assert first_bytes(iter(["abc", "\u4e2d\u6587", "d"]), 7) == ["abc", "\u4e2d"]
    assert first_bytes(iter(["abc", "d"]), None) == ["abc", "d"]


def test_documents_come_from_a_corpus_a_file_or_a_folder(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "plain.txt").write_text("three")
    assert list(read_documents(tmp_path / "corpus.jsonl")) == ["one", "two"]
    assert list(read_documents(tmp_path / "plain.txt")) == ["three"]
    assert sorted(read_documents(tmp_path)) == ["one", "three", "two"]

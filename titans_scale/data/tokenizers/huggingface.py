"""Tokenizers of the Hugging Face package `tokenizers`: a tokenizer.json, or GPT-2's older pair of vocabulary and merges."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from titans_scale.data.tokenizers.tokenizer import PIECE_CHARACTERS, Tokenizer, write_if_other

MODEL_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
USUAL_EOS = ("<|endoftext|>", "</s>", "<eos>")
VOCABULARY_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
WORD_PATTERNS = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
)
"""Of Qwen 2 and of Llama 3. As with GPT-2's, no word of theirs spans a newline between two characters, nor depends on what is beyond."""
LINE_END = re.compile(r"(?<=\S\n)(?=\S)")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, or a folder with one or with vocab.json and merges.txt.

    Special tokens are never read out of a text, and none is added: "<|endoftext|>" in a text is encoded as any other text. The
    end-of-document token is the "eos_token" of a tokenizer_config.json or special_tokens_map.json beside it, else the first of
    <|endoftext|>, </s> and <eos> that there is.

    Raises:
        ValueError: the package is missing, it is no such tokenizer, or it has no end-of-document token, or one that a text may encode to.
    """

    def __init__(self, path: str | Path) -> None:
        if find_spec("tokenizers") is None:
            raise ValueError(f'the tokenizer {path} takes the package tokenizers: pip install "titans-scale[data]"')
        self.spec = str(path)
        self.model = _read_model(Path(path))
        self._load(_named_eos(Path(path)))

    def _load(self, named_eos: str | None) -> None:
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(self.model.decode())
        except Exception as error:  # tokenizers raises nothing narrower
            raise _no_tokenizer(self.spec, error) from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        candidates = USUAL_EOS if named_eos is None else (named_eos,)
        self.eos_token = next((token for token in candidates if token in vocabulary), "")
        if not self.eos_token:
            raise ValueError(
                f"{self.spec} has no end-of-document token: its vocabulary lacks {', '.join(candidates)};"
                f' name one as "eos_token" in {CONFIG_NAME} beside it'
            )
        self.eos_id = vocabulary[self.eos_token]
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.sha256(self.model + b"\0" + self.eos_token.encode()).hexdigest()
        definition = json.loads(self.model)
        if definition["model"].get("dropout"):
            self._tokenizer.model.dropout = None  # it would encode a text differently each time
        is_unknown = self.eos_token == definition["model"].get("unk_token") or self.eos_id == definition["model"].get("unk_id")
        if is_unknown or self.eos_id in self.encode_pieces([self.eos_token])[0]:
            raise ValueError(f"{self.spec} encodes some text to {self.eos_token}, so that token cannot part the documents; use another")
        self._can_be_cut = _words_end_with_lines(definition)

    def cut(self, text: str) -> Iterator[str]:
        """In one piece, but for tokenizers that are known to give the same tokens when a long text is cut at some newlines."""
        start = 0
        if self._can_be_cut and len(text) > PIECE_CHARACTERS:
            for line_end in LINE_END.finditer(text):
                if line_end.start() - start >= PIECE_CHARACTERS:
                    yield text[start : line_end.start()]
                    start = line_end.start()
        yield text[start:]

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = [self._tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
        except Exception as error:  # a vocabulary of words that knows no "unknown"
            raise ValueError(f"{self.spec} cannot encode every text: {error}") from error
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode_known(self, ids: list[int]) -> str:
        return self._tokenizer.decode([token for token in ids if token != self.eos_id], skip_special_tokens=False)

    def save(self, folder: str | Path) -> str:
        write_if_other(Path(folder) / CONFIG_NAME, json.dumps({"eos_token": self.eos_token}).encode())
        write_if_other(Path(folder) / MODEL_NAME, self.model)
        return MODEL_NAME

    def __getstate__(self) -> dict[str, Any]:
        """Without the package's object, which forgets on its way how to treat special tokens."""
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load(self.eos_token)


def is_huggingface(path: Path) -> bool:
    """Whether a path is a folder or a file of this kind, as far as names and the first character tell."""
    if path.is_dir():
        return any((path / name).is_file() for name in (MODEL_NAME, *(vocabulary for vocabulary, _ in VOCABULARY_AND_MERGES)))
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def _read_model(path: Path) -> bytes:
    """The content of the tokenizer.json, made up for the older pair of files."""
    model = path / MODEL_NAME if path.is_dir() else path
    pairs = [(path / vocabulary, path / merges) for vocabulary, merges in VOCABULARY_AND_MERGES]
    pair = next((pair for pair in pairs if pair[0].is_file()), None)
    if model.is_file() or pair is None:
        return model.read_bytes()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(pair[0]), str(pair[1])))
    except Exception as error:  # tokenizers raises nothing narrower
        raise _no_tokenizer(path, error) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def _no_tokenizer(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a tokenizer of the package tokenizers: {' '.join(str(error).split())}")


def _named_eos(path: Path) -> str | None:
    """What the files beside a model call its end-of-document token."""
    for name in (CONFIG_NAME, "special_tokens_map.json"):
        file = (path if path.is_dir() else path.parent) / name
        if not file.is_file():
            continue
        try:
            token = json.loads(file.read_bytes()).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not a JSON object") from error
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def _words_end_with_lines(definition: dict[str, Any]) -> bool:
    """Whether a newline between two characters that are no blanks always ends a word, so that both sides may be encoded apart."""
    plain_added_tokens = [token for token in definition.get("added_tokens") or () if not token.get("special")]
    if definition.get("normalizer") is not None or plain_added_tokens:
        return False
    steps = definition.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space", True):
        return False
    if len(steps) == 1:
        return bool(byte_level.get("use_regex", True))
    split = steps[0]
    pattern = (split.get("pattern") or {}).get("Regex")
    is_plain_split = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    return len(steps) == 2 and is_plain_split and pattern in WORD_PATTERNS and not byte_level.get("use_regex", True)

"""Any tokenizer from its spec."""

from pathlib import Path

from titans_scale.data.tokenizers.huggingface import HuggingFaceTokenizer, is_huggingface
from titans_scale.data.tokenizers.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer of a spec: "byte", a SentencePiece model, a tokenizer.json, or a folder with one of the two or with GPT-2's two files.

    Raises:
        ValueError: none of these.
    """
    path = Path(spec)
    if str(spec) == "byte":
        return ByteTokenizer()
    if path.is_dir() and not is_huggingface(path):
        if not (path / "tokenizer.model").is_file():
            raise ValueError(f"the folder {path} holds no tokenizer: no tokenizer.json, no vocab.json with merges.txt, no tokenizer.model")
        path /= "tokenizer.model"
    if not path.exists():
        raise ValueError(f"tokenizer {str(spec)!r} is neither 'byte' nor a file nor a folder; make one with tools/train_tokenizer.py")
    return HuggingFaceTokenizer(path) if is_huggingface(path) else SentencePieceTokenizer(path)

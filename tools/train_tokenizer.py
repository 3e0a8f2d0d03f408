"""Train a SentencePiece tokenizer (byte pairs, lossless, bytes for what is rare) on the train split of a corpus."""

import argparse
import json
import sys
from pathlib import Path

from titans_scale.data import load_tokenizer, read_corpus, train_sentencepiece
from titans_scale.data.corpus import corpus_fingerprint
from titans_scale.data.files import atomic_write


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--corpus", type=Path, default=Path("data/corpus"), help="folder with train.jsonl (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("data/tokenizer.model"), help="model file to write (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=4096, metavar="N", help="number of tokens (default: %(default)s)")
    parser.add_argument(
        "--max_bytes",
        type=int,
        default=50_000_000,
        metavar="N",
        help="learn from about this much of the text, taken evenly (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another tokenizer")
    options = parser.parse_args(arguments)
    try:
        print(_train(options))
    except (ValueError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_tokenizer: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> str:
    corpus = options.corpus / "train.jsonl"
    texts = read_corpus(corpus)
    if options.output.is_dir():
        raise ValueError(f"--output {options.output} is a folder; name the model file, for example {options.output / 'tokenizer.model'}")
    made_with = {"vocab_size": options.vocab_size, "max_bytes": options.max_bytes, "corpus": corpus_fingerprint(corpus)}
    note = options.output.with_name(f"{options.output.name}.json")
    if options.output.exists() and not options.overwrite:
        if not note.is_file() or json.loads(note.read_bytes()) != made_with:
            raise ValueError(f"{options.output} is there, made of another corpus or in another way; use --overwrite, or another --output")
        return f"already there: {options.output}, {load_tokenizer(options.output).vocab_size:,} tokens"
    note.unlink(missing_ok=True)  # it must never stand beside a model that it does not describe
    tokenizer = train_sentencepiece(
        texts, options.output, options.vocab_size, max_bytes=options.max_bytes, total_bytes=corpus.stat().st_size
    )
    with atomic_write(note) as file:
        file.write(json.dumps(made_with).encode())
    return f"wrote {options.output}: {tokenizer.vocab_size:,} tokens"


if __name__ == "__main__":
    sys.exit(main())

"""Train a SentencePiece tokenizer (byte pairs, lossless, bytes for what is rare) on text of any kind, or on a corpus's train split."""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from titans_scale.data import load_tokenizer, train_sentencepiece
from titans_scale.data.files import atomic_write
from titans_scale.data.text.corpus import corpus_file
from titans_scale.data.text.inputs import FORMATS, find_inputs, inputs_fingerprint, read_texts, separator, total_bytes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="file, folder, glob, or - for standard input: text, JSON lines, Parquet, WebDataset tars (default: the corpus)",
    )
    parser.add_argument("--corpus", type=Path, default=Path("data/corpus"), help="folder with train.jsonl (default: %(default)s)")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="of all inputs (default: by each one's name)")
    parser.add_argument("--text_key", default="text", metavar="NAME", help="key or column that holds the text (default: %(default)s)")
    parser.add_argument("--split_text_on", type=separator, metavar="TEXT", help=r"parts the documents of a text file, for example '\n\n'")
    parser.add_argument("--output", type=Path, default=Path("data/tokenizer.model"), help="model file to write (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=4096, metavar="N", help="number of tokens (default: %(default)s)")
    parser.add_argument(
        "--max_bytes",
        type=int,
        default=50_000_000,
        metavar="N",
        help="learn from about this much of the text, taken evenly (default: %(default)s)",
    )
    parser.add_argument(
        "--character_coverage",
        type=float,
        default=0.9995,
        metavar="F",
        help="share of the text's characters that get a token of their own, the rest being bytes (default: %(default)s)",
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
    paths = options.inputs or [corpus_file(options.corpus / "train.jsonl")]
    inputs = find_inputs(paths, format=options.format, text_key=options.text_key, split_text_on=options.split_text_on)
    if options.output.is_dir():
        raise ValueError(f"--output {options.output} is a folder; name the model file, for example {options.output / 'tokenizer.model'}")
    size = total_bytes(inputs)
    made_with = {name: getattr(options, name) for name in ("vocab_size", "max_bytes", "character_coverage")}
    made_with["inputs"] = None if size is None else inputs_fingerprint(inputs)
    note = options.output.with_name(f"{options.output.name}.json")
    if options.output.exists() and not options.overwrite:
        if size is None or not note.is_file() or json.loads(note.read_bytes()) != made_with:
            raise ValueError(f"{options.output} is there, made of another text or in another way; use --overwrite, or another --output")
        return f"already there: {options.output}, {load_tokenizer(options.output).vocab_size:,} tokens"
    note.unlink(missing_ok=True)  # it must never stand beside a model that it does not describe
    chosen = {name: made_with[name] for name in ("max_bytes", "character_coverage")}
    with tqdm(total=size, desc="reading", unit="B", unit_scale=True, disable=None, delay=0.5) as bar:
        tokenizer = train_sentencepiece(read_texts(inputs, on_read=bar.update), options.output, options.vocab_size, **chosen)
    with atomic_write(note) as file:
        file.write(json.dumps(made_with).encode())
    return f"wrote {options.output}: {tokenizer.vocab_size:,} tokens"


if __name__ == "__main__":
    sys.exit(main())

"""Turn a corpus into token shards for training: WebDataset tars with an index, a folder for each split, the tokenizer beside them."""

import argparse
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from titans_scale.data import Tokenizer, load_tokenizer, read_corpus, write_shards
from titans_scale.data.corpus import SPLITS, corpus_fingerprint
from titans_scale.data.index import INDEX_NAME


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--corpus", type=Path, default=Path("data/corpus"), help="folder with train.jsonl and validation.jsonl (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer", default="data/tokenizer.model", metavar="byte|FILE", help="bytes, or a SentencePiece model (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("data/tokens"), help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--sequence_length", type=int, default=1024, metavar="N", help="tokens of a training sequence (default: %(default)s)"
    )
    parser.add_argument("--samples_per_shard", type=int, default=8192, metavar="N", help="sequences of one tar (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="threads that tokenize (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of another corpus or with other settings")
    options = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        if options.overwrite:  # all of them, before one is written anew: a mixture of old and new splits must not pass for whole
            for split in SPLITS:
                (options.output / split / INDEX_NAME).unlink(missing_ok=True)
        for split in SPLITS:
            _write_split(split, tokenizer, options)
    except (ValueError, OSError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_shards: stopped; a split that was not finished will be made anew by the next run", file=sys.stderr)
        return 130
    return 0


def _write_split(split: str, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    corpus, directory = options.corpus / f"{split}.jsonl", options.output / split
    if split == "validation" and not corpus.exists():
        print(f"no {corpus}, so no validation split; training then needs --eval.interval 0")
        return
    source = corpus_fingerprint(corpus)
    start, tokens = time.perf_counter(), 0
    with tqdm(total=corpus.stat().st_size, desc=split, unit="B", unit_scale=True, disable=None, delay=0.5) as bar:

        def count(new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")

        index = write_shards(
            read_corpus(corpus, on_read=bar.update),
            directory,
            tokenizer=tokenizer,
            sequence_length=options.sequence_length,
            samples_per_shard=options.samples_per_shard,
            source=source,
            num_threads=options.threads,
            on_tokens=count,
        )
    did = f"wrote, at {tokens / (time.perf_counter() - start):,.0f} tokens/s:" if tokens else "already there:"
    print(
        f"{directory} {did} documents {index.documents:,}, tokens {index.tokens:,}, samples {index.samples:,}, shards {len(index.shards):,}"
    )


if __name__ == "__main__":
    sys.exit(main())

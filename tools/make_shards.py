"""Turn texts into token shards for training: WebDataset tars with an index, a folder for each split, the tokenizer beside them.

Stopped or killed, it goes on from its last finished shard when it is started again, and the result is the same."""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titans_scale.data import Tokenizer, load_tokenizer, make_split
from titans_scale.data.processes import available_cores
from titans_scale.data.shards.index import INDEX_NAME
from titans_scale.data.shards.info import describe, summary
from titans_scale.data.shards.making import plan_splits
from titans_scale.data.text.inputs import FORMATS, Inputs, separator, total_bytes


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.info:
            print(describe(options.info))
            return 0
        tokenizer = load_tokenizer(options.tokenizer)
        reading = _named(options, "corpus", "format", "text_key", "split_text_on", "split", "validation_fraction")
        splits, fraction = plan_splits(options.inputs, **reading)
        if options.overwrite:  # all of them, before one is written anew: a mixture of old and new splits must not pass for whole
            for split in splits:
                (options.output / split / INDEX_NAME).unlink(missing_ok=True)
        for split, inputs in splits.items():
            _write_split(split, inputs, tokenizer, fraction, options)
        if list(splits) == ["train"]:
            print("no validation split was made; training without one needs --eval.interval 0")
    except (ValueError, OSError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_shards: stopped; finished shards are kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _write_split(split: str, inputs: Inputs, tokenizer: Tokenizer, fraction: float, options: argparse.Namespace) -> None:
    start, seen = time.perf_counter(), Counter[str]()

    def tokens_a_second() -> str:
        return f"{seen['tokens'] / (time.perf_counter() - start):,.0f} tokens/s"

    with tqdm(total=total_bytes(inputs), desc=split, unit="B", unit_scale=True, disable=None, delay=0.5) as bar:

        def count_tokens(tokens: int) -> None:
            seen["tokens"] += tokens
            bar.set_postfix_str(tokens_a_second(), refresh=False)

        index = make_split(
            inputs,
            options.output / split,
            tokenizer=tokenizer,
            validation_fraction=fraction,
            **_named(options, "sequence_length", "samples_per_shard", "on_bad_document", "workers", "overwrite"),
            on_read=bar.update,
            on_tokens=count_tokens,
            on_left_out=lambda member: seen.update(["left out"]),
        )
    did = f"wrote, at {tokens_a_second()}:" if seen["tokens"] else "already there:"
    print(options.output / split, did, summary(index, members_left_out=seen["left out"]))


def _named(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="files, folders, globs, or - for standard input; the default is --corpus")
    add("--corpus", type=Path, help="folder with train.jsonl and validation.jsonl (default: data/corpus)")
    add("--tokenizer", default="data/tokenizer.model", metavar="byte|PATH", help="bytes, or a model (default: %(default)s)")
    add("--output", type=Path, default=Path("data/tokens"), help="folder to write (default: %(default)s)")
    add("--sequence_length", type=int, default=1024, metavar="N", help="tokens of a training sequence (default: %(default)s)")
    add("--samples_per_shard", type=int, default=8192, metavar="N", help="sequences of one tar (default: %(default)s)")
    add("--format", choices=FORMATS, default="auto", help="of each INPUT; auto: by its name (default: %(default)s)")
    add("--text_key", default="text", metavar="KEY", help="JSON key or Parquet column of a text (default: %(default)s)")
    add("--split_text_on", type=separator, metavar="TEXT", help=r"what parts two documents of a text file, such as \n\n")
    add("--split", default="train", metavar="NAME", help="what the documents of INPUT are for (default: %(default)s)")
    add("--validation_fraction", type=float, default=0.005, metavar="F", help="share of INPUT held out (default: %(default)s)")
    add("--on_bad_document", choices=("raise", "skip"), default="raise", help="stop at it, or count it (default: %(default)s)")
    add("--workers", type=int, default=available_cores(), metavar="N", help="processes that tokenize (default: all cores)")
    add("--overwrite", action="store_true", help="begin anew: replace what is there, finished or not")
    add("--info", type=Path, metavar="FOLDER", help="say what a folder of shards holds, and do nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(main())

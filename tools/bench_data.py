"""Reading samples beside a np.memmap loop, start-up over a very large index, tokenizing beside sentencepiece alone, resets at documents."""

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 4096], help="tokens of a sample (default: 512 1024 4096)")
    parser.add_argument("--tokens", type=int, default=1 << 25, help="read in each measurement (default: 33554432)")
    parser.add_argument("--shards", type=int, default=19_074, help="of the large index, 65,536 samples each (default: %(default)s)")
    parser.add_argument("--position", type=int, default=10**9, help="sample to resume at (default: %(default)s)")
    parser.add_argument("--text_bytes", type=int, default=60_000_000, help="text to tokenize; 0: none (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenize (default: all cores)")
    parser.add_argument("--packed_length", type=int, default=2048, help="tokens to train on with resets (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement; the best counts (default: 5)")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="training runs whose waiting for data to add up")
    parser.add_argument("--quick", action="store_true", help="a little of each, once: shows that it works, not how fast it is")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args(arguments)
    if min(*options.lengths, options.tokens, options.shards, options.position, options.workers, options.packed_length, options.repeats) < 1:
        parser.error("--lengths, --tokens, --shards, --position, --workers, --packed_length and --repeats must be at least 1")
    if options.quick:
        options.lengths, options.tokens, options.shards, options.position = [64], 1 << 12, 20, 10**6
        options.text_bytes, options.workers, options.repeats = min(options.text_bytes, 200_000), 1, 1
        options.packed_length = 256

    from titans_scale.evaluation.benchmarks.data_run import benchmark_data  # imports torch: not for --help

    try:
        report = benchmark_data(
            lengths=options.lengths,
            tokens=options.tokens,
            shards=options.shards,
            position=options.position,
            text_bytes=options.text_bytes,
            workers=options.workers,
            packed_length=options.packed_length,
            repeats=options.repeats,
            runs=options.runs,
        )
    except (ValueError, OSError) as error:
        print(f"bench_data: {error}", file=sys.stderr)
        return 2
    report.publish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

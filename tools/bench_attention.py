"""Sliding-window attention's CPU time and memory, as it runs on any device, beside the masked square of all pairs of tokens."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    lengths = [2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths, help="lengths to compare at (default: 2K to 32K, doubling)")
    parser.add_argument("--window", type=int, default=512, help="tokens that a token sees, itself included (default: 512)")
    parser.add_argument("--heads", type=int, default=1, help="attention heads of width 64 (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement, at most; the best counts (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="cores to use (default: 1)")
    parser.add_argument("--quick", action="store_true", help="256 tokens, once: shows that it works, not how fast it is")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args(arguments)
    if min(*options.tokens, options.window, options.heads, options.repeats, options.threads) < 1:
        parser.error("--tokens, --window, --heads, --repeats and --threads must be at least 1")
    if options.quick:
        options.tokens, options.window, options.repeats = [256], 64, 1

    from titans_scale.evaluation.benchmarks.attention_run import benchmark_attention  # imports torch: not for --help

    report = benchmark_attention(
        tokens=options.tokens, window=options.window, heads=options.heads, repeats=options.repeats, threads=options.threads
    )
    report.publish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Context parallelism on this machine's cores: the time of a step beside one rank's, and how long ranks wait for each other."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="that share a sequence, a core each (default: 2)")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8], help="of the models (default: 2 4 8)")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence, over all ranks (default: 2048)")
    parser.add_argument("--repeats", type=int, default=3, help="of each step; the median counts (default: 3)")
    parser.add_argument("--quick", action="store_true", help="128 tokens, one layer, once: shows that it works, not how fast it is")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args(arguments)
    if min(options.ranks, *options.layers, options.tokens, options.repeats) < 1:
        parser.error("--ranks, --layers, --tokens and --repeats must be at least 1")
    if options.quick:
        options.layers, options.tokens, options.repeats = [1], 128, 1
    if options.tokens % options.ranks:
        parser.error(f"--tokens {options.tokens} does not divide by --ranks {options.ranks}")

    from titans_scale.evaluation.benchmarks.context_run import benchmark_context  # imports torch: not for --help

    report = benchmark_context(ranks=options.ranks, layers=options.layers, tokens=options.tokens, repeats=options.repeats)
    report.publish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

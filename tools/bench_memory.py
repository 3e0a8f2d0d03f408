"""The memory layer's CPU time and memory beside titans-pytorch's, and the scan's share of the machine's matrix-product peak."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="lengths to compare at (default: 1024 4096)")
    parser.add_argument("--longest", type=int, default=65536, help="the scan's time a token is taken up to this length (default: 65536)")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement, at most; the best counts (default: 7)")
    parser.add_argument("--skip-peers", action="store_true", help="measure our code only")
    parser.add_argument("--quick", action="store_true", help="64 tokens, once: shows that it works, not how fast it is")
    parser.add_argument("--profile", action="store_true", help="show instead where our time goes, at the first length")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args(arguments)
    if min(*options.tokens, options.longest, options.repeats) < 1:
        parser.error("--tokens, --longest and --repeats must be at least 1")
    if options.quick:
        options.tokens, options.longest, options.repeats = [64], 64, 1

    from titans_scale.evaluation.benchmarks.memory_run import benchmark_memory, profile_memory  # imports torch: not for --help

    if options.profile:
        report = profile_memory(options.tokens[0])
    else:
        report = benchmark_memory(tokens=options.tokens, longest=options.longest, peers=not options.skip_peers, repeats=options.repeats)
    report.publish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

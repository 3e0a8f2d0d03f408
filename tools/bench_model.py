"""Training steps of small MAC, MAG, MAL and LMM models beside titans-pytorch's MAC and a plain transformer: tokens a second, memory."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="lengths to compare at (default: 1024 4096)")
    parser.add_argument("--longest", type=int, default=16384, help="MAG beside the transformer up to this length (default: 16384)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement, at most; the best counts (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="measure these only (default: all; a wrong name lists them)")
    parser.add_argument("--skip-peers", action="store_true", help="leave titans-pytorch out")
    parser.add_argument("--quick", action="store_true", help="64 tokens, once: shows that it works, not how fast it is")
    parser.add_argument("--profile", action="store_true", help="show instead where each model's step spends its time, at the first length")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args(arguments)
    if min(*options.tokens, options.longest, options.repeats) < 1:
        parser.error("--tokens, --longest and --repeats must be at least 1")
    if options.quick:
        options.tokens, options.longest, options.repeats = [64], 64, 1

    from titans_scale.evaluation.benchmarks.model_cases import PEERS, models  # these import torch: not for --help
    from titans_scale.evaluation.benchmarks.model_run import benchmark_models, profile_models

    names = options.models or [name for name in models() if not (options.skip_peers and name in PEERS)]
    if unknown := set(names) - set(models()):
        print(f"bench_model: there is no model {min(unknown)!r} here; choose of {', '.join(map(repr, models()))}", file=sys.stderr)
        return 2
    if options.profile:
        report = profile_models(names, tokens=options.tokens[0], threads=options.threads)
    else:
        report = benchmark_models(
            names=names, tokens=options.tokens, longest=options.longest, repeats=options.repeats, threads=options.threads
        )
    report.publish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

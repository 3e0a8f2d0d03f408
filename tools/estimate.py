"""Parameters, FLOPs, memory of one GPU, and time and tokens of a whole run, before a GPU is asked for. Takes any option of training."""

import json
import sys

from titans_scale.config import config_parser, parse_config


def main(arguments: list[str]) -> int:
    parser = config_parser(prog="estimate.py", description=__doc__)
    parser.add_argument("--world", type=int, default=1, help="GPUs of the run.")
    parser.add_argument("--mfu", type=float, default=0.4, help="Model FLOPs utilisation to expect, above 0 and at most 1.")
    parser.add_argument(
        "--peak_tflops",
        type=float,
        default=None,
        help="Peak of one GPU in TFLOP/s. null: metrics.peak_tflops, or else 989 (H100, bfloat16).",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object in place of the table.")
    config, options = parse_config(parser, arguments)

    from titans_scale.parallel.estimate import estimate, table  # imports torch: not for --help

    result = estimate(config, world_size=options.world, mfu=options.mfu, peak_tflops=options.peak_tflops)
    print(json.dumps(result.to_dict(), indent=2) if options.json else table(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"estimate: {error}", file=sys.stderr)
        sys.exit(2)

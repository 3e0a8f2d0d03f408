"""A run before a GPU is asked for: parameters, FLOPs, one GPU's memory, collectives, time. Takes any option of training.

One rank of the cluster is rehearsed on a fake process group, without memory; --quick leaves that out. Predictions, not measurements.
"""

import json
import sys

from titans_scale.config import config_parser, parse_config


def main(arguments: list[str]) -> int:
    parser = config_parser(prog="estimate.py", description=__doc__)
    parser.add_argument("--world", type=int, default=1, help="GPUs of the run.")
    parser.add_argument(
        "--mesh", default=None, help="Sets parallelism: replicate=64,shard=8,context=1,tensor=1, any of them. null: as configured."
    )
    parser.add_argument("--rank", type=int, default=0, help="The rank that is rehearsed.")
    parser.add_argument("--mfu", type=float, default=0.4, help="Model FLOPs utilisation to expect, above 0 and at most 1.")
    parser.add_argument(
        "--peak_tflops",
        type=float,
        default=None,
        help="Peak of one GPU in TFLOP/s. null: metrics.peak_tflops, or else 989 (H100, bfloat16).",
    )
    parser.add_argument("--nvlink_gbs", type=float, default=450.0, help="One GPU's rate to others of its node, in GB/s, one direction.")
    parser.add_argument("--network_gbs", type=float, default=50.0, help="One GPU's rate to other nodes, in GB/s, one direction.")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs of a node; ranks are numbered node by node.")
    parser.add_argument("--quick", action="store_true", help="Formulas alone, in a second: no collectives, no time of a step.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object in place of the table.")
    config, options = parse_config(parser, arguments)

    from titans_scale.parallel.planning.plan import plan, set_mesh  # imports torch: not for --help
    from titans_scale.parallel.planning.plan_table import table
    from titans_scale.parallel.planning.step_time import Links

    if options.mesh is not None:
        set_mesh(config.parallelism, options.mesh)
    result = plan(
        config,
        world_size=options.world,
        rank=options.rank,
        mfu=options.mfu,
        peak_tflops=options.peak_tflops,
        links=Links(nvlink_gbs=options.nvlink_gbs, network_gbs=options.network_gbs, gpus_per_node=options.gpus_per_node),
        rehearsed=not options.quick,
    )
    print(json.dumps(result.to_dict(), indent=2) if options.json else table(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"estimate: {error}", file=sys.stderr)
        sys.exit(2)

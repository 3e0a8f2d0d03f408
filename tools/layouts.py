"""Tables of docs/scaling.md: presets on several numbers of GPUs, each with its recommended layout and what is predicted for it.

Predictions, not measurements, by the formulas of tools/estimate.py or from its rehearsal.
"""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="layouts.py", description=__doc__)
    parser.add_argument("configs", type=Path, nargs="+", help="Configuration files.")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 8, 64, 512], help="Numbers of GPUs.")
    parser.add_argument(
        "--same_batch", action="store_true", help="With more GPUs than sequences let them share sequences; else the batch grows."
    )
    parser.add_argument("--rehearsed", action="store_true", help="Rehearse a rank of each, which takes a minute, in place of formulas.")
    parser.add_argument("--mfu", type=float, default=0.4, help="Model FLOPs utilisation to expect.")
    parser.add_argument("--nvlink_gbs", type=float, default=450.0, help="One GPU's rate to others of its node, in GB/s, one direction.")
    parser.add_argument("--network_gbs", type=float, default=50.0, help="One GPU's rate to other nodes, in GB/s, one direction.")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs of a node.")
    options = parser.parse_args(arguments)

    from titans_scale.config import load_config  # torch, by way of the next two: not for --help
    from titans_scale.parallel.planning.layouts import HEAD, planned, recommended, row
    from titans_scale.parallel.planning.step_time import Links

    links = Links(nvlink_gbs=options.nvlink_gbs, network_gbs=options.network_gbs, gpus_per_node=options.gpus_per_node)
    print(HEAD, flush=True)
    for path in options.configs:
        config = load_config(path)
        for world_size in options.worlds:
            layout = recommended(config, world_size, gpus_per_node=options.gpus_per_node, same_batch=options.same_batch)
            rehearsed = options.rehearsed or layout.context > 1  # of which there is no formula
            print(row(path.stem, planned(config, layout, mfu=options.mfu, links=links, rehearsed=rehearsed), layout, links), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"layouts: {error}", file=sys.stderr)
        sys.exit(2)

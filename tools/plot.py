"""Draw a run's loss, learning rate, gradient norm and memory metrics into a PNG."""

import argparse
import sys
from pathlib import Path

from titans_scale.evaluation.curves import plot_run, read_metrics


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, help="PNG to write (default: curves.png in the run's folder)")
    parser.add_argument("--title", help="heading of the picture (default: the run's folder)")
    options = parser.parse_args(arguments)
    folder = options.run if options.run.is_dir() else options.run.parent
    output = options.output or folder / "curves.png"
    try:
        plot_run(read_metrics(options.run), output, title=options.title or str(folder))
    except (ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which rank of a run is stuck or gone, where every rank stands, and who waits for whom. For a run that hangs, or has died."""

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run (training.output_dir)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)

    from titans_scale.evaluation.hang_report import report_of_run  # imports torch: not for --help

    try:
        report = report_of_run(options.run)
    except (ValueError, OSError) as error:
        print(f"hang_report: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.as_json(), indent=2) if options.json else report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

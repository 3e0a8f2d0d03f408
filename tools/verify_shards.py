"""See whether token shards are whole and hold what their index says, and whether any of it is there twice.

Exit code: 0, all is well; 1, something is wrong, a line for each finding; 2, there is nothing to look at."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from titans_scale.data.processes import available_cores
from titans_scale.data.shards.verify import Verifier, bytes_of_shards, show_samples


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders that make_shards wrote, or splits of such")
    parser.add_argument("--quick", action="store_true", help="look at the indexes and the sizes of files, and read no shard")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print so many samples of each split as text (default: none)")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), metavar="N", help="processes that read shards (default: all cores)"
    )
    options = parser.parse_args(arguments)
    try:
        return _verify(options)
    except (ValueError, OSError) as error:
        print(f"verify_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("verify_shards: stopped before all was looked at", file=sys.stderr)
        return 130


def _verify(options: argparse.Namespace) -> int:
    findings = 0
    total = 0 if options.quick else sum(map(bytes_of_shards, options.folders))
    with tqdm(total=total, unit="B", unit_scale=True, disable=True if options.quick else None, delay=0.5) as bar:
        verifier = Verifier(quick=options.quick, workers=options.workers, on_bytes=bar.update)
        for finding in verifier.folders(options.folders):
            findings += 1
            tqdm.write(finding)
    looked_at = "the indexes and the sizes of files" if options.quick else f"{total:,} bytes of shards"
    for sample in (text for folder in options.folders if options.show and not findings for text in show_samples(folder, options.show)):
        print(sample)
    print(f"findings: {findings:,} in {looked_at}" if findings else f"nothing is wrong with {looked_at}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

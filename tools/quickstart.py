"""From text to a trained, evaluated model in minutes: what `make quickstart` runs. Run again, it goes on where it stopped."""

import argparse
import sys
from pathlib import Path

from titans_scale.quickstart import StageFailed, Stopped, default_workdir, run_quickstart

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, help="file or folder with your own text (default: the Python standard library's sources)")
    parser.add_argument("--workdir", type=Path, help="folder for all results (default: runs/quickstart, with --corpus -NAME added)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="model and training (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, help="tokens of the tokenizer (default: model.vocab_size of the configuration)")
    parser.add_argument("--processes", type=int, help="processes of torchrun (default: one a GPU; on CPU two, or one on a single core)")
    parser.add_argument("--max_minutes", type=float, default=5.5, help="fewer steps if training would take longer (default: %(default)s)")
    parser.add_argument("--eval_bytes", type=int, default=400_000, help="held-out text to evaluate on at most (default: %(default)s)")
    options = parser.parse_args(arguments)
    workdir = options.workdir or default_workdir(options.corpus)
    try:
        run_quickstart(
            config_file=options.config,
            workdir=workdir,
            corpus=options.corpus,
            vocab_size=options.vocab_size,
            processes=options.processes,
            max_seconds=60 * options.max_minutes,
            eval_bytes=options.eval_bytes,
        )
    except (Stopped, KeyboardInterrupt):
        print("\nStopped (a traceback above is only torchrun's way to end); the same command goes on from here.", file=sys.stderr)
        return 130
    except (ValueError, OSError, StageFailed) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

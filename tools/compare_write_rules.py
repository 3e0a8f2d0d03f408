"""Train small byte models with the memory's write rules and compare them: a JSON file, a PNG and a table of Markdown."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=["transfer", "rules", "long"], help="see titans_scale/evaluation/write_rules/studies.py")
    parser.add_argument("--output", type=Path, default=Path("runs/write_rules"), help="folder for STUDY.json and STUDY.png")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="train these only; the others stay as they are in the JSON file")
    parser.add_argument("--steps", type=int, help="other than the study's own")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--draw", action="store_true", help="train nothing: table and picture of what the JSON file has")
    options = parser.parse_args(arguments)

    import torch  # this and the next import it: not for --help

    from titans_scale.evaluation.write_rules.report import plot, table
    from titans_scale.evaluation.write_rules.studies import STUDIES, read_study, run_study

    cases = STUDIES[options.study].cases
    if unknown := set(options.cases or ()) - set(cases):
        print(f"compare_write_rules: {options.study} has no case {min(unknown)!r}; choose of {', '.join(cases)}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    file = options.output / f"write_rules_{options.study}.json"
    if not options.draw:
        run_study(options.study, file, cases=options.cases, steps=options.steps, say=lambda line: print(line, flush=True))
    if not file.exists():
        print(f"compare_write_rules: {file} does not exist; run the study without --draw first", file=sys.stderr)
        return 2
    rows = read_study(file)
    plot(options.study, rows, file.with_suffix(".png"))
    print(table(options.study, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make a corpus, train.jsonl and validation.jsonl, of your own text files, or of the Python standard library's sources.

A folder is read with all its subfolders, every file that is UTF-8 text being one document. Of JSON lines, Parquet and WebDataset tars, each
line, row and member is one. Files may be compressed as .gz or .zst. What cannot be read is left out and counted.
"""

import argparse
import sys
from pathlib import Path

from titans_scale.data import standard_library, text_files, write_corpus
from titans_scale.data.text.inputs import separator


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("path", nargs="?", type=Path, help="file or folder of your own text (default: the Python standard library)")
    parser.add_argument("--output", type=Path, default=Path("data/corpus"), help="folder to write (default: %(default)s)")
    parser.add_argument("--include", nargs="+", default=["*"], metavar="GLOB", help="take only files whose name or path matches")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="leave out files whose name or path matches")
    parser.add_argument("--text_key", default="text", metavar="NAME", help="key or column that holds the text (default: %(default)s)")
    parser.add_argument("--split_text_on", type=separator, metavar="TEXT", help=r"parts the documents of a text file, for example '\n\n'")
    parser.add_argument("--max_bytes", type=int, metavar="N", help="bytes of text to take at most (default: all)")
    parser.add_argument("--validation_fraction", type=float, default=0.03, metavar="F", help="share held out (default: %(default)s)")
    parser.add_argument("--include_tests", action="store_true", help="take the standard library's own tests as well")
    parser.add_argument("--overwrite", action="store_true", help="replace another corpus in the output folder")
    options = parser.parse_args(arguments)
    try:
        if options.path is None:
            documents = standard_library(include_tests=options.include_tests)
        else:
            output = options.output.resolve()
            if output == (options.path.parent if options.path.is_file() else options.path).resolve():
                raise ValueError(f"--output {options.output} is the folder of the text itself; give another")
            documents = text_files(
                options.path,
                include=options.include,
                exclude=options.exclude,
                enter=lambda folder: folder.resolve() != output,
                text_key=options.text_key,
                split_text_on=options.split_text_on,
            )
        report = write_corpus(
            documents,
            options.output,
            max_bytes=options.max_bytes,
            validation_fraction=options.validation_fraction,
            overwrite=options.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"make_corpus: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_corpus: stopped; nothing was written", file=sys.stderr)
        return 130
    print("already there, unchanged:" if report.unchanged else "wrote:")
    for split, count in report.documents.items():
        print(f"  {options.output / f'{split}.jsonl'}: documents {count:,}, bytes of text {report.text_bytes[split]:,}")
    if report.split_by == "position":
        print("  there is one document, so its last part is the validation split")
    if documents.skipped:
        print(f"  skipped: {', '.join(f'{count:,} {reason}' for reason, count in sorted(documents.skipped.items()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Sample text from a trained model."""

import argparse
import sys
from pathlib import Path

from titans_scale.data.files import atomic_write
from titans_scale.evaluation.sample import continue_text
from titans_scale.evaluation.trained import load_trained


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder of a run (its newest checkpoint) or one of its checkpoint/step-N")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue (default: none, a new document)")
    prompt.add_argument("--prompt_file", type=Path, metavar="FILE", help="file with the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="tokens to add at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)")
    parser.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    parser.add_argument("--top_p", type=float, metavar="P", help="draw from the likeliest tokens that together reach P (default: all)")
    parser.add_argument("--min_p", type=float, metavar="P", help="drop tokens below P times the likeliest's probability (default: none)")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (default: another one each time)")
    parser.add_argument("--tokenizer", metavar="byte|FILE", help="tokenizer (default: that of the run's shards)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--output", type=Path, help="write the text into a file as well")
    options = parser.parse_args(arguments)
    try:
        text = options.prompt_file.read_text(encoding="utf-8") if options.prompt_file else options.prompt
        trained = load_trained(options.checkpoint, tokenizer=options.tokenizer, device=options.device)
        sampled = text + continue_text(
            trained,
            text,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
        )
        if options.output:
            with atomic_write(options.output) as file:
                file.write(f"{sampled}\n".encode())
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(sampled)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Bits per byte of a trained model on held-out text, beside gzip and xz on the same bytes. The memory learns along, as at inference."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from titans_scale.data.files import atomic_write
from titans_scale.evaluation.bits_per_byte import code_length, compressor_bits_per_byte
from titans_scale.evaluation.documents import first_bytes, read_documents
from titans_scale.evaluation.trained import load_trained


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder of a run (its newest checkpoint) or one of its checkpoint/step-N")
    parser.add_argument("--text", type=Path, required=True, help="text file, folder of text files, or .jsonl with a text on each line")
    parser.add_argument("--max_bytes", type=int, metavar="N", help="take the first N bytes of the text (default: all)")
    parser.add_argument("--piece_tokens", type=int, default=512, metavar="N", help="tokens of one forward pass (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="documents side by side (default: %(default)s)")
    parser.add_argument("--tokenizer", metavar="byte|FILE", help="tokenizer (default: that of the run's shards)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--output", type=Path, help="write the result as JSON (default: print it only)")
    options = parser.parse_args(arguments)
    try:
        documents = first_bytes(read_documents(options.text), options.max_bytes)
        trained = load_trained(options.checkpoint, tokenizer=options.tokenizer, device=options.device)
        length = code_length(
            trained.model, documents, trained.tokenizer, piece_tokens=options.piece_tokens, batch_size=options.batch_size, progress=True
        )
        scores = {"model": length.bits_per_byte, **compressor_bits_per_byte(documents)}
        if options.output:
            with atomic_write(options.output) as file:
                result = {"checkpoint": options.checkpoint, "text": str(options.text), "bits_per_byte": scores, **asdict(length)}
                file.write((json.dumps(result, indent=2) + "\n").encode())
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate: stopped; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.text}: {length.num_bytes:,} bytes in {length.num_documents:,} documents, {length.num_tokens:,} tokens")
    print("bits per byte (lower is better):")
    for name, score in sorted(scores.items(), key=lambda item: item[1]):
        print(f"  {name:8s} {score:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

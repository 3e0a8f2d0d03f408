"""Memory and time of the loss, a chunk of tokens at a time, beside the plain form over all logits: forward and backward, one thread."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_loss.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="Tokens of a micro-batch.")
    parser.add_argument("--vocab", type=int, default=32000, help="Rows of the head.")
    parser.add_argument("--dim", type=int, default=768, help="Width of the model.")
    parser.add_argument("--logits_mib", type=int, nargs="+", default=[16, 64, 256], help="Room for logits; one row each.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Of the head and its input.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Where to compute.")
    parser.add_argument("--repeats", type=int, default=3, help="Timed passes of each form; the fastest counts.")
    parser.add_argument("--json", type=Path, default=None, help="Write the numbers to this file too.")
    parser.add_argument("--measure", type=int, default=None, help=argparse.SUPPRESS)  # one form, in a process of its own; 0: plain
    return parser


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Peak and time of one form, in this process."""
    import torch
    import torch.nn.functional as F

    from titans_scale.evaluation.benchmarks.measure import resident_bytes
    from titans_scale.models.loss import cross_entropy_sum, linear_cross_entropy_sum

    torch.set_num_threads(1)
    torch.manual_seed(0)
    on_gpu = options.device == "cuda"
    factory: dict[str, Any] = {"device": options.device, "dtype": getattr(torch, options.dtype), "requires_grad": True}
    x_BTM = torch.randn(1, options.tokens, options.dim, **factory)
    weight_VM = torch.nn.init.normal_(torch.empty(options.vocab, options.dim, **factory), std=0.02)
    targets_BT = torch.randint(options.vocab, (1, options.tokens), device=options.device)

    def one_pass(length: int) -> None:
        x, targets = x_BTM[:, :length], targets_BT[:, :length]
        if options.measure:
            loss = linear_cross_entropy_sum(x, weight_VM, targets, logits_bytes=options.measure * 2**20)
        else:
            loss = cross_entropy_sum(F.linear(x, weight_VM), targets)
        (loss / options.tokens).backward()
        if on_gpu:
            torch.cuda.synchronize()

    def now_and_peak() -> tuple[int, int]:
        return (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if on_gpu else resident_bytes()

    one_pass(1)  # loads the kernels, and leaves both gradients, which any form has to hold
    before, _ = now_and_peak()
    one_pass(options.tokens)
    extra = now_and_peak()[1] - before
    seconds = []
    for _ in range(options.repeats):
        x_BTM.grad = weight_VM.grad = None
        start = time.perf_counter() if on_gpu else time.process_time()
        one_pass(options.tokens)
        seconds.append((time.perf_counter() if on_gpu else time.process_time()) - start)
    return {"extra_mib": extra / 2**20, "seconds": min(seconds)}


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if min(options.tokens, options.vocab, options.dim, options.repeats, *options.logits_mib) < 1:
        parser().error("--tokens, --vocab, --dim, --repeats and --logits_mib must be at least 1")
    if options.measure is not None:
        print(json.dumps(measure(options)))
        return 0
    shared = [f"--{name}={getattr(options, name)}" for name in ("tokens", "vocab", "dim", "dtype", "device", "repeats")]
    results = []
    for logits_mib in (0, *options.logits_mib):
        command = [sys.executable, str(Path(__file__).resolve()), *shared, f"--measure={logits_mib}"]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        results.append({"logits_mib": logits_mib or None, **result})
    plain = results[0]
    for result in results:
        result |= {f"{name}_ratio": result[name] / plain[name] for name in ("extra_mib", "seconds")}
    print(f"{'form':>12}{'extra memory':>16}{'of plain':>10}{'time':>10}{'of plain':>10}")
    for row in results:
        form = f"{row['logits_mib']} MiB" if row["logits_mib"] else "plain"
        memory, seconds = f"{row['extra_mib']:,.0f} MiB", f"{row['seconds']:.2f} s"
        print(f"{form:>12}{memory:>16}{row['extra_mib_ratio']:>10.3f}{seconds:>10}{row['seconds_ratio']:>10.3f}")
    if options.json:
        from titans_scale.evaluation.benchmarks.report import write_json  # imports torch: not for --help

        settings = {name: value for name, value in vars(options).items() if name not in ("json", "measure")}
        write_json(options.json, {"settings": settings, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the data benchmark times: our stream and two other ways to read the same tokens, our tokenizing and the bare library's."""

import json
import time
from itertools import islice
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch

from titans_scale.config import MemoryConfig, ModelConfig, Variant
from titans_scale.data import ByteTokenizer, TokenStream, make_split, open_split, standard_library, train_sentencepiece, write_shards
from titans_scale.data.text.inputs import find_inputs
from titans_scale.data.tokenizers.tokenizer import cut
from titans_scale.evaluation.benchmarks.measure import Step
from titans_scale.models import TitansLM
from titans_scale.models.documents import document_starts

BATCH_SIZE = 8
MEMMAP_FILE = "tokens.bin"
VOCABULARY = 32000
EOS = 0


def write_random_tokens(folder: Path, *, tokens: int, length: int) -> None:
    """The same tokens as shards (split "train") and as one flat file of uint16."""
    generator = np.random.default_rng(0)
    letters = generator.integers(ord("a"), ord("z"), size=tokens - 1, dtype=np.uint8)  # and one end of document
    text = letters.tobytes().decode()
    index = write_shards([text], folder / "train", tokenizer=ByteTokenizer(), sequence_length=length, samples_per_shard=4096)
    assert index.tokens == tokens
    np.array([256, *letters, 256], dtype="<u2").tofile(folder / MEMMAP_FILE)


def stream_step(folder: Path, *, batches: int) -> Step:
    """Micro-batches as a trainer without workers gets them, in shuffled order."""
    stream = TokenStream(open_split(folder, "train"), micro_batch_size=BATCH_SIZE, global_batch_size=BATCH_SIZE)

    def step() -> None:
        for _ in islice(stream, batches):
            pass

    return step


def memmap_step(folder: Path, *, length: int, batches: int) -> Step:
    """Random places of one flat file, inputs and targets copied out of the map one row at a time: the usual small loader."""
    tokens = np.memmap(folder / MEMMAP_FILE, dtype="<u2", mode="r")

    def step() -> None:
        for _ in range(batches):
            starts = torch.randint(len(tokens) - length, (BATCH_SIZE,)).tolist()
            torch.stack([torch.from_numpy(tokens[start : start + length].astype(np.int64)) for start in starts])
            torch.stack([torch.from_numpy(tokens[start + 1 : start + 1 + length].astype(np.int64)) for start in starts])

    return step


def webdataset_step(folder: Path, *, batches: int) -> Step:
    """The same tars through webdataset itself, one after the other, without a shuffle."""
    import webdataset

    shards = sorted(str(shard) for shard in (folder / "train").glob("*.tar"))

    def step() -> None:
        samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode().to_tuple("npy")
        for batch in islice(samples.batched(BATCH_SIZE, partial=False), batches):
            torch.from_numpy(np.stack(batch[0]).astype(np.int64))

    return step


def packed_step(variant: Variant, *, length: int, reset: bool) -> Step:
    """Loss and gradients of a small model over packed documents, a quarter of the sequence long on average."""
    memory = MemoryConfig(num_heads=4)
    model = TitansLM(ModelConfig(variant=variant, dim=128, num_layers=2, num_heads=4, vocab_size=512, memory=memory))
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(1, 512, (2, length), generator=generator) for _ in range(2))
    ends = torch.rand(tokens.shape, generator=generator) < 4 / length
    starts = document_starts(tokens.masked_fill(ends, EOS), EOS) if reset else None

    def step() -> None:
        model.loss_sum(tokens, targets, document_starts=starts).backward()

    return step


def tokenizing_rates(folder: Path, *, text_bytes: int, workers: int, repeats: int) -> dict[str, float]:
    """Tokens a second, by the clock, of all processes together; the best of several runs of each.

    Ours is the whole of make_shards: starting its processes, reading and parsing JSON lines, tokenizing, writing and hashing tars. The bare
    library's processes are running and have the model and the texts, in the same pieces, before their time begins.
    """
    corpus, model = folder / "corpus.jsonl", folder / "tokenizer.model"
    pieces = write_text(corpus, text_bytes)
    tokenizer = train_sentencepiece(pieces, model, min(VOCABULARY, max(300, text_bytes // 200)), max_bytes=10_000_000)
    best = {"titans_scale": 0.0, "sentencepiece": 0.0}
    for repeat in range(repeats):
        start = time.perf_counter()
        index = make_split(
            find_inputs([corpus]), folder / f"{repeat}" / "train", tokenizer=tokenizer, sequence_length=1024, workers=workers
        )
        best["titans_scale"] = max(best["titans_scale"], index.tokens / (time.perf_counter() - start))
        best["sentencepiece"] = max(best["sentencepiece"], _bare_rate(model, pieces, workers=workers))
    return best


def write_text(file: Path, text_bytes: int) -> list[str]:
    """The standard library's sources, as often as it takes, as JSON lines.

    Returns:
        The same cut into the pieces that our tokenizer encodes.
    """
    texts: list[str] = []
    written = 0
    with file.open("w") as lines:
        while written < text_bytes:
            for document in standard_library(include_tests=True):
                lines.write(json.dumps({"text": document.text}) + "\n")
                texts += cut(document.text)
                written += len(document.text)
                if written >= text_bytes:
                    break
    return texts


def _bare_rate(model: Path, pieces: list[str], *, workers: int) -> float:
    shares = [pieces[worker::workers] for worker in range(workers)]
    context = get_context("spawn")
    ready, go = (context.Barrier(workers + 1, timeout=300) for _ in range(2))  # a process that ends early is no reason to wait for ever
    results: SimpleQueue[int] = context.SimpleQueue()
    processes = [context.Process(target=_encode_bare, args=(model, share, ready, go, results), daemon=True) for share in shares]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    go.wait()
    tokens = sum(results.get() for _ in processes)
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    return tokens / seconds


def _encode_bare(model: Path, pieces: list[str], ready: Barrier, go: Barrier, results: "SimpleQueue[int]") -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ready.wait()
    go.wait()
    results.put(sum(map(len, processor.encode(pieces, out_type="numpy", num_threads=1))))  # its fastest way

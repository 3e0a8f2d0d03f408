"""What it takes to start over a very large index, in the middle of its order: measured in a fresh process over files with holes."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titans_scale.data import ByteTokenizer, TokenStream, open_split
from titans_scale.data.reading.mixture import MixedOrder, Mixture, Source
from titans_scale.data.shards.index import FORMAT_VERSION, Shard, ShardIndex, ShardSettings, fingerprint_of
from titans_scale.data.shards.tars import Layout, shard_name
from titans_scale.evaluation.benchmarks.measure import give_back_freed_pages, resident_bytes

SAMPLES_A_SHARD, LENGTH, BATCH_SIZE = 65_536, 8, 8


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """Of one process, its imports left out."""

    shards: int
    samples: int
    tokens: int
    position: int
    open_seconds: float
    """Until the index is read and every shard's size looked at."""
    seconds: float
    """Until the first batch is there."""
    extra_bytes: int
    """Most memory held beyond what the process held before."""


def measure_start_up(folder: Path, *, shards: int, position: int) -> StartUp:
    """Resume at sample `position` of the endless sequence over so many shards."""
    _write_hollow_split(folder / "train", shards=shards, position=position)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_start, folder, position).result()


def _start(folder: Path, position: int) -> StartUp:
    give_back_freed_pages()
    before, _ = resident_bytes()
    start = time.perf_counter()
    dataset = open_split(folder, "train")
    opened = time.perf_counter()
    stream = TokenStream(dataset, micro_batch_size=BATCH_SIZE, global_batch_size=BATCH_SIZE)
    stream.load_state_dict({**stream.state_dict(), "samples_consumed": position})
    next(iter(stream))
    done = time.perf_counter()
    _, most = resident_bytes()
    return StartUp(
        shards=len(dataset.index.shards),
        samples=len(dataset),
        tokens=dataset.index.tokens,
        position=position,
        open_seconds=opened - start,
        seconds=done - start,
        extra_bytes=most - before,
    )


def _write_hollow_split(directory: Path, *, shards: int, position: int) -> None:
    """Shards of the right size with nothing in them but the samples that will be read."""
    tokenizer = ByteTokenizer()
    layout = Layout.of(sequence_length=LENGTH, vocab_size=tokenizer.vocab_size)
    size = SAMPLES_A_SHARD * layout.stride
    index = _index(tokenizer, layout, shards=shards, size=size)
    directory.mkdir(parents=True)
    index.save(directory)
    for shard in index.shards:
        with (directory / shard.name).open("wb") as file:
            os.truncate(file.fileno(), size)
    mixture = Mixture([Source(dataset=open_split(directory.parent, directory.name))])
    wanted = MixedOrder(mixture, shuffle=True, shuffle_window=65_536, seed=0).take(position, BATCH_SIZE)
    tokens = np.zeros(LENGTH + 1, layout.dtype)
    for _, number in wanted:
        in_shard, place = divmod(number, SAMPLES_A_SHARD)
        with (directory / shard_name(in_shard)).open("r+b") as file:
            file.seek(place * layout.stride)
            file.write(layout.tar(tokens, first=number)[: layout.stride])


def _index(tokenizer: ByteTokenizer, layout: Layout, *, shards: int, size: int) -> ShardIndex:
    settings = ShardSettings(
        sequence_length=LENGTH, samples_per_shard=SAMPLES_A_SHARD, tokenizer_fingerprint=tokenizer.fingerprint, source=""
    )
    tokens = SAMPLES_A_SHARD * LENGTH
    entries = tuple(
        Shard(name=shard_name(number), samples=SAMPLES_A_SHARD, tokens=tokens, bytes=size, sha256=f"{number:064x}")
        for number in range(shards)
    )
    return ShardIndex(
        format_version=FORMAT_VERSION,
        settings=settings,
        tokenizer=tokenizer.spec,
        dtype=layout.dtype.str,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        first_offset=layout.first_offset,
        stride=layout.stride,
        samples=shards * SAMPLES_A_SHARD,
        tokens=shards * tokens,
        documents=0,
        text_bytes=0,
        skipped=0,
        inputs=None,
        shards=entries,
        fingerprint=fingerprint_of(settings, entries, vocab_size=tokenizer.vocab_size),
    )

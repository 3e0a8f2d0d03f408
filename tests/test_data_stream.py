import os
import pickle
import random
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
import torch

from titans_scale.data import IGNORED, ByteTokenizer, TokenStream, open_split, validation_batches, write_shards
from titans_scale.data.reading.faults import ReadPolicy
from titans_scale.data.reading.mixture import MixedOrder, Mixture, Source

SEQUENCE_LENGTH = 8
TEXTS = [f"document {number} " * (number % 7) + "end" for number in range(62)]
SHAPES = [(1, 12), (2, 6), (2, 2), (3, 4), (4, 1)]
"""Ranks, and sequences of a micro-batch: all make global batches of 12."""


@pytest.fixture(scope="module")
def tokens_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_shards(TEXTS, folder / "train", tokenizer=ByteTokenizer(), sequence_length=SEQUENCE_LENGTH, samples_per_shard=50)
    return folder


@pytest.fixture
def dataset(tokens_folder):
    dataset = open_split(tokens_folder, "train")
    assert len(dataset.index.shards) > 5
    return dataset


@pytest.fixture(scope="module")
def sixty_samples(tmp_path_factory):
    return letters(tmp_path_factory.mktemp("sixty"), samples=60)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    sizes = {"books": 30, "web": 100}
    sources = {name: letters(tmp_path_factory.mktemp(name), samples=samples) for name, samples in sizes.items()}
    return Mixture([Source(name=name, weight=samples, dataset=sources[name]) for name, samples in sizes.items()])


def letters(folder, *, samples):
    """A split of random letters."""
    text = "".join(random.Random(samples).choices("abcdefgh", k=samples * SEQUENCE_LENGTH - 1))
    write_shards([text], folder / "train", tokenizer=ByteTokenizer(), sequence_length=SEQUENCE_LENGTH, samples_per_shard=16)
    return open_split(folder, "train")


@pytest.fixture
def three_samples(tmp_path):
    write_shards(["x" * 24], tmp_path / "train", tokenizer=ByteTokenizer(), sequence_length=SEQUENCE_LENGTH + 1)
    return open_split(tmp_path, "train")


def streams(dataset, *, ranks=1, micro_batch_size=12, global_batch_size=12, **options):
    """The streams of all ranks."""
    sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": global_batch_size}
    return [TokenStream(dataset, rank=rank, world_size=ranks, **sizes, **options) for rank in range(ranks)]


def rows_of(ranks, steps):
    """(inputs, targets) of the global batches of some steps, in the order of the global sequence: micro-batch, then rank, then row."""
    iterators = [iter(rank) for rank in ranks]
    micro_batches = range(steps * ranks[0].micro_batches_per_step)
    return [row for _ in micro_batches for iterator in iterators for row in rows_of_batch(next(iterator))]


def rows_of_batch(batch):
    return list(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True))


def real_targets(rows):
    return Counter(token for _, targets in rows for token in targets if token != IGNORED)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_token_of_every_document_is_a_target_exactly_once_an_epoch(dataset, ranks, num_workers):
    rows = rows_of(streams(dataset, ranks=ranks, micro_batch_size=12 // ranks, num_workers=num_workers), 2 * len(dataset) // 12 + 1)
    everything = Counter(token for text in TEXTS for token in [*text.encode(), 256])
    assert len(dataset) % 12  # so that an epoch ends inside a global batch
    for epoch in range(2):
        assert real_targets(rows[epoch * len(dataset) : (epoch + 1) * len(dataset)]) == everything


@pytest.mark.parametrize(("ranks", "micro_batch_size"), SHAPES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_workers_and_micro_batches_do_not_change_the_global_batches(dataset, ranks, micro_batch_size, num_workers):
    reference = rows_of(streams(dataset), 5)
    assert rows_of(streams(dataset, ranks=ranks, micro_batch_size=micro_batch_size, num_workers=num_workers), 5) == reference


def test_the_rows_come_in_the_order_s_order(dataset):
    numbers = MixedOrder(Mixture([Source(dataset=dataset)]), shuffle=True, shuffle_window=70, seed=0).take(0, 60)
    assert [inputs for inputs, _ in rows_of(streams(dataset, shuffle_window=70), 5)] == [
        dataset[number][0][:-1].tolist() for _, number in numbers
    ]


def elastic(data, *, before, after, steps, more, **options):
    """Rows of some steps on N ranks x W workers, then of more, resumed from rank 0's state on M x V."""
    (ranks, workers), (other_ranks, other_workers) = before, after
    first = streams(data, ranks=ranks, micro_batch_size=12 // ranks // 2 or 1, num_workers=workers, **options)
    rows = rows_of(first, steps)
    assert all(stream.state_dict() == first[0].state_dict() for stream in first)
    then = streams(data, ranks=other_ranks, micro_batch_size=12 // other_ranks, num_workers=other_workers, **options)
    for stream in then:
        stream.load_state_dict(first[0].state_dict())
    rows += rows_of(then, more)
    assert then[0].metrics() == {name: pytest.approx(value) for name, value in then[-1].metrics().items()}
    return rows, then[0].metrics()


ELASTIC = [((4, 2), (2, 0)), ((2, 1), (3, 2)), ((1, 0), (4, 0)), ((3, 0), (1, 2))]
"""Ranks and workers of each, before and after."""


@pytest.mark.parametrize("options", [{}, {"skip": [(3, 4), (6, 6)], "shuffle_window": 70}])
@pytest.mark.parametrize(("before", "after"), ELASTIC)
def test_resuming_on_other_ranks_and_workers_goes_on_with_the_same_global_batches(dataset, before, after, options):
    whole = streams(dataset, **options)
    rows = rows_of(whole, 9)
    assert elastic(dataset, before=before, after=after, steps=4, more=5, **options) == (rows, whole[0].metrics())


@pytest.mark.parametrize(("before", "after"), ELASTIC)
@pytest.mark.parametrize("steps", [4, 5])
def test_so_it_does_at_the_end_of_an_epoch(sixty_samples, before, after, steps):
    """An epoch is five global batches: the resume is one batch before its end, and at the end exactly."""
    rows, metrics = elastic(sixty_samples, before=before, after=after, steps=steps, more=3, shuffle_window=20)
    assert rows == rows_of(streams(sixty_samples, shuffle_window=20), steps + 3)
    assert metrics["data/epoch"] == (steps + 3) / 5


@pytest.mark.parametrize(("before", "after"), ELASTIC)
@pytest.mark.parametrize("skip", [(), [(2, 3), (5, 50)]])
def test_so_it_does_with_a_mixture(mixture, before, after, skip):
    whole = streams(mixture, shuffle_window=20, skip=skip)
    rows = rows_of(whole, 8)
    assert elastic(mixture, before=before, after=after, steps=3, more=5, shuffle_window=20, skip=skip) == (rows, whole[0].metrics())


def batches_of(rows, numbers):
    """Global batches, counted from 1."""
    return [row for number in numbers for row in rows[12 * (number - 1) : 12 * number]]


@pytest.mark.parametrize(
    ("skip", "trained_on"),
    [
        ([(1, 1)], [2, 3, 4]),
        ([(2, 4)], [1, 5, 6]),
        ([(3, 3), (1, 1)], [2, 4, 5]),
        ([(4, 4), (2, 3)], [1, 5, 6]),
        ([(2, 6), (3, 4)], [1, 7, 8]),
        ([(100, 200)], [1, 2, 3]),
    ],
)
def test_steps_on_the_skip_list_are_passed_over(dataset, skip, trained_on):
    whole = rows_of(streams(dataset), 9)
    stream = streams(dataset, skip=skip)[0]
    assert rows_of([stream], 3) == batches_of(whole, trained_on)
    assert stream.samples_consumed == 12 * trained_on[-1]
    assert stream.metrics()["data/skipped_steps"] == trained_on[-1] - 3


def test_a_skip_list_written_after_the_spike_leaves_the_steps_before_it_as_they_were(dataset):
    """Spike at steps 6 and 7 of a run; it goes on from step 3's checkpoint: 4 and 5 as before, step 6 takes the batch of step 8."""
    whole = rows_of(streams(dataset), 9)
    first = streams(dataset)[0]
    rows_of([first], 3)
    second = streams(dataset, skip=[(6, 7)])[0]
    second.load_state_dict(first.state_dict())
    assert rows_of([second], 3) == batches_of(whole, [4, 5, 8])
    third = streams(dataset)[0]  # the list is taken away again: what was passed over stays so, and stays counted
    third.load_state_dict(second.state_dict())
    assert rows_of([third], 1) == batches_of(whole, [9])
    assert third.metrics()["data/skipped_steps"] == 2


def test_what_a_worker_met_reaches_the_batch(dataset, monkeypatch):
    read = dataset.__getitems__

    def faulty(numbers):
        rows = read(numbers)
        counts = rows.counts.clone()
        counts[1] = 0
        return type(rows)(tokens=rows.tokens, counts=counts, retries=3, skipped=1)

    monkeypatch.setattr(dataset, "__getitems__", faulty, raising=False)
    for num_workers in (0, 1):
        (batch,) = islice(streams(dataset, num_workers=num_workers)[0], 1)
        assert (batch.retries, batch.skipped) == (3, 1)
        assert (batch.to("cpu").retries, batch.to("cpu").skipped) == (3, 1)
        assert batch.targets[1].tolist() == [IGNORED] * SEQUENCE_LENGTH
        assert (batch.targets[[0, 2]] != IGNORED).all()


def test_a_remote_gives_the_same_batches_as_the_folder(tokens_folder, dataset, tmp_path):
    remote = open_split(f"pipe:cat {tokens_folder}/{{}}", "train", policy=ReadPolicy(cache_dir=str(tmp_path)))
    (there,), (here,) = streams(remote, num_workers=1), streams(dataset)
    there.load_state_dict(here.state_dict())
    assert rows_of([there], 5) == rows_of([here], 5)


def test_shards_of_a_remote_are_asked_for_a_window_ahead(dataset, monkeypatch):
    asked = []
    monkeypatch.setattr("titans_scale.data.reading.stream.LOOK_AHEAD", 24)
    monkeypatch.setattr(dataset, "prefetch", lambda numbers: asked.append(list(numbers)))
    (stream,) = streams(dataset, shuffle_window=70)
    rows_of([stream], 5)
    assert asked == []  # it lies on this machine
    stream.dataset.remote = [0]
    rows_of([stream], 5)
    sequence = [number for _, number in MixedOrder(stream.dataset, shuffle=True, shuffle_window=70, seed=0).take(0, 300)]
    assert asked == [sequence[start : start + 24] + sequence[start + 70 : start + 94] for start in (60, 84, 108)]


def test_fewer_samples_than_ranks_is_an_error(three_samples):
    assert len(streams(three_samples, ranks=3, micro_batch_size=4)) == 3
    with pytest.raises(ValueError, match=r"train has too few samples \(3\) to give each of 4 ranks one; use fewer ranks"):
        streams(three_samples, ranks=4, micro_batch_size=3)


def test_resuming_with_another_global_batch_neither_repeats_nor_skips_a_sample(dataset):
    before, after = streams(dataset), streams(dataset, micro_batch_size=10, global_batch_size=20)
    rows = rows_of(before, 3)
    after[0].load_state_dict(before[0].state_dict())
    assert rows + rows_of(after, 2) == rows_of(streams(dataset, micro_batch_size=4, global_batch_size=76), 1)


def test_iterating_anew_goes_on_behind_the_last_whole_global_batch(dataset):
    stream = TokenStream(dataset, micro_batch_size=3, global_batch_size=12)
    reference = rows_of(streams(dataset), 2)
    list(islice(stream, 6))  # a batch and a half
    assert rows_of([stream], 1) == reference[12:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_counts_whole_global_batches_that_were_handed_out_not_those_read_ahead(dataset, num_workers):
    stream = TokenStream(dataset, micro_batch_size=3, global_batch_size=12, rank=0, world_size=2, num_workers=num_workers)
    consumed = [stream.state_dict()["samples_consumed"] for _ in islice(stream, 5)]
    assert consumed == [0, 12, 12, 24, 24]


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"shuffle": False}, "shuffle True -> False"),
        ({"shuffle_window": 100}, "shuffle_window 65536 -> 100"),
    ],
)
def test_a_state_of_another_order_is_refused(dataset, options, change):
    state = streams(dataset)[0].state_dict()
    with pytest.raises(ValueError, match=change):
        streams(dataset, **options)[0].load_state_dict(state)


def test_a_state_of_other_data_is_refused_and_the_change_is_named(dataset, three_samples):
    with pytest.raises(ValueError, match=r"sequence_length 8 -> 9, num_samples \d+ -> 3, fingerprint \w+ -> \w+"):
        streams(three_samples)[0].load_state_dict(streams(dataset)[0].state_dict())


def test_fewer_samples_than_a_global_batch_roll_over_within_it(three_samples):
    (batch,) = islice(streams(three_samples)[0], 1)
    assert batch.inputs.shape == (12, 9)
    rows = Counter(str(row) for row in batch.inputs.tolist())
    assert sorted(rows.values()) == [4, 4, 4]


def test_the_short_last_sample_is_padded_with_targets_that_do_not_count(three_samples):
    tokens, count = three_samples[2]
    assert count == 25 - 2 * 9 + 1
    batch = list(validation_batches(three_samples, micro_batch_size=1))[2]
    assert batch.inputs.tolist() == [tokens[:-1].tolist()]
    assert batch.targets.tolist() == [[*tokens[1:count].tolist(), *[IGNORED] * (10 - count)]]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert set(tokens[count:].tolist()) == {three_samples.eos_id}


def batches_of_ranks(dataset, *, ranks, micro_batch_size, **options):
    return [
        list(validation_batches(dataset, micro_batch_size=micro_batch_size, rank=rank, world_size=ranks, **options))
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 500])
def test_validation_sees_each_sample_once_with_equally_many_batches_a_rank(dataset, ranks, micro_batch_size):
    batches = batches_of_ranks(dataset, ranks=ranks, micro_batch_size=micro_batch_size)
    assert len({len(rank) for rank in batches}) == 1
    assert {batch.inputs.shape for rank in batches for batch in rank} == {(micro_batch_size, SEQUENCE_LENGTH)}
    rows = [row for turn in zip(*batches, strict=True) for batch in turn for row in rows_of_batch(batch)]
    assert [inputs for inputs, _ in rows[: len(dataset)]] == [dataset[number][0][:-1].tolist() for number in range(len(dataset))]
    assert not real_targets(rows[len(dataset) :])
    assert real_targets(rows).total() == dataset.index.tokens


def test_a_few_validation_batches_are_spread_over_the_split(dataset):
    batches = batches_of_ranks(dataset, ranks=2, micro_batch_size=2, max_batches=3)
    assert [len(rank) for rank in batches] == [3, 3]
    rows = [row for turn in zip(*batches, strict=True) for batch in turn for row in rows_of_batch(batch)]
    assert [inputs for inputs, _ in rows] == [dataset[number * len(dataset) // 12][0][:-1].tolist() for number in range(12)]


def test_more_validation_batches_than_there_are_is_all_of_them(dataset):
    assert len(list(validation_batches(dataset, micro_batch_size=100, max_batches=50))) == -(-len(dataset) // 100)


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(5, 1), (2, 5), (1, 0)])
def test_a_global_batch_that_does_not_come_out_even_is_refused(dataset, ranks, micro_batch_size):
    with pytest.raises(ValueError, match="a global batch of 12 sequences does not come out even"):
        streams(dataset, ranks=ranks, micro_batch_size=micro_batch_size)


def test_a_rank_outside_the_world_is_refused(dataset):
    with pytest.raises(ValueError, match="rank 2 is not among 2 ranks"):
        TokenStream(dataset, micro_batch_size=1, global_batch_size=2, rank=2, world_size=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_leaves_torch_s_random_numbers_to_the_model(dataset, num_workers):
    before = torch.get_rng_state()
    list(islice(streams(dataset, num_workers=num_workers)[0], 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_workers_means_no_processes(dataset, monkeypatch):
    monkeypatch.setattr(os, "fork", None)
    monkeypatch.setattr("torch.multiprocessing.Process", None)
    assert len(list(islice(streams(dataset)[0], 2))) == 2


def test_workers_outlive_signals_that_are_meant_for_the_trainer(dataset):
    """Ctrl-C goes to the whole process group: the trainer still needs batches to finish its step and save."""
    iterator = iter(streams(dataset, num_workers=2)[0])
    next(iterator)  # one worker may not even have begun
    workers = [worker.pid for worker in torch.multiprocessing.active_children()]
    assert len(workers) == 2
    numbers = [signal.SIGINT.value, *([signal.SIGTERM.value] if hasattr(signal, "sigwaitinfo") else [])]  # macOS: SIGINT alone
    someone_else = f"import os, sys; [os.kill(int(pid), number) for pid in sys.argv[1:] for number in {numbers}]"
    subprocess.run([sys.executable, "-c", someone_else, *map(str, workers)], check=True)
    assert len(list(islice(iterator, 20))) == 20


def test_workers_end_when_the_trainer_terminates_them(dataset):
    iterator = iter(streams(dataset, num_workers=1)[0])
    next(iterator)
    (worker,) = torch.multiprocessing.active_children()
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode == 0


def test_a_worker_that_is_killed_is_told_of_when_its_batch_is_asked_for(dataset):
    """Not before: an error that breaks into a step of the model leaves the other ranks waiting."""
    list(torch.utils.data.DataLoader([1], num_workers=1))  # leaves a handler of its own behind
    iterator = iter(streams(dataset, num_workers=1)[0])
    next(iterator)
    (worker,) = torch.multiprocessing.active_children()
    worker.kill()
    worker.join(timeout=20)
    with pytest.raises(ChildProcessError, match=rf"is gone \(DataLoader worker \(pid\(s\) {worker.pid}\).*lower data.num_workers"):
        list(islice(iterator, 20))


def test_a_trainer_that_fails_while_its_workers_read_ahead_still_ends(tokens_folder):
    """The traceback keeps the iterator alive until the interpreter waits for its children."""
    code = """
from titans_scale.data import TokenStream, open_split
if __name__ == "__main__":
    iterator = iter(TokenStream(open_split(%r, "train"), micro_batch_size=1, global_batch_size=1, num_workers=2))
    next(iterator)
    raise ValueError("the trainer failed")
"""
    ended = subprocess.run([sys.executable, "-c", code % str(tokens_folder)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.endswith("ValueError: the trainer failed\n")


def test_a_dataset_goes_to_another_process_without_its_open_files(dataset):
    first = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    assert torch.equal(copy[0][0], first[0])


def test_many_shards_need_few_open_files(dataset, monkeypatch):
    monkeypatch.setattr("titans_scale.data.reading.shard_files.MAX_OPEN_FILES", 2)
    before = len(os.listdir("/dev/fd"))
    samples = [dataset[number][0] for number in range(0, len(dataset), 10)]
    assert len(os.listdir("/dev/fd")) - before <= 2
    assert len(samples) > 20
    dataset.close()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("index", [-1, 10_000])
def test_a_sample_that_is_not_there_is_an_index_error(dataset, index):
    with pytest.raises(IndexError):
        dataset[index]


def test_a_batch_moves_as_a_whole(dataset):
    (batch,) = islice(streams(dataset)[0], 1)
    moved = batch.to("meta")
    assert (moved.inputs.device.type, moved.targets.device.type) == ("meta", "meta")


def test_preparing_data_imports_neither_torch_nor_sentencepiece_nor_webdataset():
    code = "import sys, titans_scale.data; print({'torch', 'sentencepiece', 'webdataset'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"

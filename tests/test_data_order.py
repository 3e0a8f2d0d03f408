"""The order of samples: each once an epoch, well mixed, found at any place without a walk, and the same for ever."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from titans_scale.data.reading.order import SampleOrder, random_keys

SHARDS = [50, 50, 1, 37, 50, 13]
SAMPLES = sum(SHARDS)


def order_of(shards=SHARDS, *, shuffle=True, seed=0, window=40):
    return SampleOrder(shards, shuffle=shuffle, seed=seed, window=window)


def epochs_of(order, count, samples=SAMPLES):
    return [order.take(epoch * samples, samples) for epoch in range(count)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("window", [1, 2, 7, 40, 50, SAMPLES - 1, SAMPLES, SAMPLES + 1, 65536])
def test_every_sample_is_read_exactly_once_an_epoch(window, shuffle):
    for epoch in epochs_of(order_of(window=window, shuffle=shuffle), 5):
        assert sorted(epoch) == list(range(SAMPLES))


@pytest.mark.parametrize("window", [7, 40, 65536])
@pytest.mark.parametrize("count", [1, 9, SAMPLES, 500])
def test_any_place_read_in_any_portions_gives_the_same_sequence(window, count):
    sequence = order_of(window=window).take(0, 3 * SAMPLES)
    forward = order_of(window=window)
    assert [number for start in range(0, 3 * SAMPLES, count) for number in forward.take(start, count)][: 3 * SAMPLES] == sequence
    again = order_of(window=window)
    for start in (3 * SAMPLES - 1, 0, SAMPLES - 1, 2 * SAMPLES, 1):
        assert again.take(start, 1) == sequence[start : start + 1]


def test_the_order_is_the_same_in_every_version():
    """A run that goes on after an update must get the samples it has not seen, so these numbers may never change."""
    assert order_of([8]).take(0, 16) == [5, 0, 7, 4, 2, 1, 3, 6, 2, 5, 7, 1, 3, 4, 6, 0]
    assert order_of([3, 5, 4], window=5).take(0, 24) == [3, 0, 7, 5, 4, 6, 2, 10, 8, 1, 9, 11, 1, 0, 2, 10, 8, 9, 11, 5, 7, 3, 6, 4]
    assert random_keys(5, 7, "a seed").tolist() == [1937982003727798896, 1480201775386718660]
    long = np.array(order_of([1000] * 100, window=4096, seed="0 web").take(0, 200_000), dtype="<i8")
    assert hashlib.sha256(long.tobytes()).hexdigest()[:16] == "b8d1bea76d74c7f5"


def test_unshuffled_is_the_written_order_over_and_over():
    assert order_of([2, 3], shuffle=False).take(3, 8) == [3, 4, 0, 1, 2, 3, 4, 0]


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch) for seed in (0, 1, "0 web", "0 books") for epoch in epochs_of(order_of(seed=seed), 5)]
    assert len(set(orders)) == 20


def test_shards_are_read_in_another_order_each_epoch():
    shards = np.repeat(np.arange(100), 10)
    visits = [tuple(dict.fromkeys(shards[epoch].tolist())) for epoch in epochs_of(order_of([10] * 100, window=1), 3, 1000)]
    assert len(set(visits)) == 3
    assert all(sorted(visit) == list(range(100)) for visit in visits)


def test_a_window_reads_few_shards():
    """What makes it kind to disks and caches: 4,000 samples lie in at most six shards of 1,000, and a shard is soon done with."""
    epoch = np.array(order_of([1000] * 100, window=4000).take(0, 100_000)) // 1000
    assert max(len(np.unique(epoch[start : start + 1000])) for start in range(0, 100_000, 1000)) <= 9
    spans = [np.flatnonzero(epoch == shard) for shard in range(100)]
    assert max(places[-1] - places[0] for places in spans) < 8000


def test_inside_a_window_nothing_is_left_of_the_written_order():
    order = np.array(order_of([1000] * 10, window=10_000).take(0, 10_000)).astype(float)
    # neighbours are a third of the range apart, as independent uniform numbers are, and place tells nothing of number; 5 standard errors
    assert abs(np.abs(np.diff(order)).mean() / 10_000 - 1 / 3) < 0.012
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_neighbours_of_a_shard_are_spread_over_the_window():
    """With many windows an epoch: what was written side by side is read far apart, as independent places in a window are."""
    place = np.empty(100_000)
    place[order_of([1000] * 100, window=5000).take(0, 100_000)] = np.arange(100_000)
    apart = np.abs(np.diff(place))[np.arange(1, 100_000) % 1000 != 0]  # neighbours of one shard
    assert abs(np.median(apart) / 5000 - (1 - 0.5**0.5)) < 0.01  # the median of |x - y|, x and y uniform in 0..1
    assert (apart < 5).mean() < 0.004  # uniform: 8 in 5000


def test_samples_parted_by_a_window_s_border_meet_in_another_epoch():
    """The windows begin elsewhere in each epoch: which places they begin at, seen from a shard that never moves."""
    order = order_of([10_000], window=1000)
    borders = []
    for epoch in epochs_of(order, 6, 10_000):
        furthest = np.maximum.accumulate(epoch)
        borders.append(min(np.flatnonzero(furthest == np.arange(10_000))) + 1)
    assert len(set(borders)) == 6
    assert all(border <= 1000 for border in borders)


def test_no_table_of_all_samples_is_ever_made():
    """1.25 * 10^9 samples; one 64-bit number each would be 10 GB."""
    tracemalloc.start()
    order = SampleOrder([62_500] * 20_000, shuffle=True, seed=0, window=65_536)
    taken = order.take(1_000_000_000, 64) + order.take(1_250_000_000 - 32, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert len(set(taken)) == 128 and min(taken) >= 0 and max(taken) < 1_250_000_000

"""Several sources by weight: exact shares, each source's own epochs, and one source alone the plain order."""

from collections import Counter
from itertools import islice, pairwise

import pytest

from titans_scale.data import ByteTokenizer, Mixture, Source, TokenStream, open_split, write_shards
from titans_scale.data.reading.mixture import PERIOD, MixedOrder, shares
from titans_scale.data.reading.order import SampleOrder

SEQUENCE_LENGTH = 8
SIZES = {"books": 30, "code": 400, "web": 90}
"""Samples of each source."""
WEIGHTS = {"books": 0.2, "code": 1, "web": 3}


class LongPieces(ByteTokenizer):
    """Another tokenizer of the same vocabulary."""

    fingerprint = "of another tokenizer"


def make_source(folder, letter, samples, *, tokenizer=None, sequence_length=SEQUENCE_LENGTH):
    """A split whose text is one letter, so that a row tells where it is from."""
    text = letter * (samples * sequence_length - 1)
    write_shards([text], folder, tokenizer=tokenizer or ByteTokenizer(), sequence_length=sequence_length, samples_per_shard=25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    for name, samples in SIZES.items():
        make_source(folder / name / "train", name[0], samples)
    return folder


def mixture_of(folder, weights=WEIGHTS):
    return Mixture([Source(name=name, weight=weight, dataset=open_split(folder / name, "train")) for name, weight in weights.items()])


@pytest.fixture
def mixture(folder):
    mixture = mixture_of(folder)
    assert [len(source.dataset) for source in mixture.sources] == list(SIZES.values())
    return mixture


def order_of(mixture, *, shuffle=True, seed=0):
    return MixedOrder(mixture, shuffle=shuffle, shuffle_window=40, seed=seed)


def test_every_period_holds_each_source_s_share_of_the_tokens_exactly(mixture):
    parts = shares(list(WEIGHTS.values()), of=PERIOD)
    assert parts == [3121, 15604, 46811]  # 65,536 * 0.2 / 4.2 = 3120.76, * 1 / 4.2 = 15603.8, * 3 / 4.2 = 46811.4
    entries = order_of(mixture).take(0, 2 * PERIOD)
    for period in (entries[:PERIOD], entries[PERIOD:]):
        assert Counter(source for source, _ in period) == dict(enumerate(parts))


def test_shares_are_whole_in_proportion_and_never_nothing():
    assert shares([1, 1, 1], of=65536) == [21846, 21845, 21845]
    assert shares([0.8, 0.2], of=10) == shares([4, 1], of=10) == [8, 2]
    assert shares([1e-9, 1, 1e-9], of=10) == [1, 8, 1]
    assert shares([1, 1e-30], of=2) == [1, 1]
    assert sum(shares([0.1 * number for number in range(1, 50)], of=PERIOD)) == PERIOD


def test_sources_are_mixed_not_put_side_by_side(mixture):
    sources = [source for source, _ in order_of(mixture).take(0, PERIOD)]
    for start in range(0, PERIOD, 4096):
        share = Counter(sources[start : start + 4096])[2] / 4096
        assert abs(share - 3 / 4.2) < 0.035  # 5 standard errors
    # places drawn independently: side by side as often as the squares of the shares add up to
    alike = sum(a == b for a, b in pairwise(sources)) / PERIOD
    assert abs(alike - (0.2**2 + 1 + 3**2) / 4.2**2) < 0.01


def test_each_source_goes_through_its_own_endless_order(mixture):
    entries = order_of(mixture, seed=5).take(0, PERIOD + 1000)
    for source, name in enumerate(SIZES):
        drawn = [number for of, number in entries if of == source]
        samples = [shard.samples for shard in mixture.sources[source].dataset.index.shards]
        assert drawn == SampleOrder(samples, shuffle=True, seed=f"5 {name}", window=40).take(0, len(drawn))
        assert len(drawn) > 3 * SIZES[name]


def test_any_place_read_in_any_portions_gives_the_same_sequence(mixture):
    start, end = PERIOD - 300, PERIOD + 300
    sequence = order_of(mixture).take(0, end)[start:]
    for count in (1, 7, 300, 600):
        order = order_of(mixture)
        assert [entry for place in range(start, end, count) for entry in order.take(place, count)][:600] == sequence


def test_what_was_drawn_is_known_at_any_place_without_walking_there(mixture):
    order = order_of(mixture)
    entries = [source for source, _ in order.take(0, 2 * PERIOD)]
    for count in (0, 1, 100, PERIOD, PERIOD + 77):
        assert order.drawn(count) == [Counter(entries[:count])[source] for source in range(3)]
    assert sum(order.drawn(10**12 + 12345)) == 10**12 + 12345


def test_the_mixture_is_the_same_in_every_version(mixture):
    assert order_of(mixture).take(0, 12) == [
        (2, 76),
        (2, 75),
        (2, 9),
        (0, 27),
        (2, 82),
        (2, 10),
        (1, 376),
        (2, 86),
        (0, 12),
        (2, 4),
        (0, 19),
        (2, 17),
    ]


def test_the_order_in_which_sources_are_written_down_does_not_matter(folder, mixture):
    turned = mixture_of(folder, dict(reversed(WEIGHTS.items())))
    assert order_of(turned).take(0, 100) == order_of(mixture).take(0, 100)
    assert [source.name for source in turned.sources] == sorted(WEIGHTS)


def test_one_source_alone_is_the_plain_order(folder):
    dataset = open_split(folder / "code", "train")
    samples = [shard.samples for shard in dataset.index.shards]
    plain = SampleOrder(samples, shuffle=True, seed=3, window=40).take(350, 100)
    assert order_of(Mixture([Source(dataset=dataset)]), seed=3).take(350, 100) == [(0, number) for number in plain]


def test_rows_come_in_the_order_asked_for(mixture):
    rows = mixture.__getitems__([(2, 5), (0, 1), (2, 0), (1, 399), (0, 2)])
    assert ["".join(map(chr, row[2:5])) for row in rows.tokens.tolist()] == ["www", "bbb", "www", "ccc", "bbb"]
    alone = [mixture.sources[source].dataset[number] for source, number in [(2, 5), (0, 1), (2, 0), (1, 399), (0, 2)]]
    assert rows.tokens.tolist() == [tokens.tolist() for tokens, _ in alone]
    assert rows.counts.tolist() == [count for _, count in alone]


def test_retries_and_samples_left_out_are_added_up_over_the_sources(mixture, monkeypatch):
    for number, source in enumerate(mixture.sources):
        dataset = source.dataset

        def faulty(numbers, read=dataset.__getitems__, number=number):
            rows = read(numbers)
            return type(rows)(tokens=rows.tokens, counts=rows.counts, retries=10 * number + 1, skipped=number)

        monkeypatch.setattr(dataset, "__getitems__", faulty, raising=False)
    rows = mixture.__getitems__([(2, 5), (0, 1), (1, 0)])
    assert (rows.retries, rows.skipped) == (1 + 11 + 21, 0 + 1 + 2)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"sequence_length": 9}, "sequence_length 8 in .*/web/train, 9 in .*/zother/train"),
        ({"tokenizer": LongPieces()}, "tokenizer .* in .*/web/train, of another"),
    ],
)
def test_sources_that_do_not_go_together_are_refused_naming_both(folder, tmp_path, options, change):
    make_source(tmp_path / "zother" / "train", "o", 10, **options)
    other = Source(name="zother", dataset=open_split(tmp_path / "zother", "train"))
    with pytest.raises(ValueError, match=f"data.sources web and zother do not go together: {change}"):
        Mixture([other, Source(name="web", dataset=open_split(folder / "web", "train"))])


def letters(batches):
    return Counter(chr(row[2]) for batch in batches for row in batch.inputs.tolist())


def test_the_metrics_count_what_was_trained_on_of_each_source(mixture):
    stream = TokenStream(mixture, micro_batch_size=12, global_batch_size=12, shuffle_window=40)
    seen = letters(islice(stream, 60))
    metrics = stream.metrics()
    assert sum(seen.values()) == 720
    for name, samples in SIZES.items():
        assert metrics[f"data/{name}/tokens"] == seen[name[0]] * SEQUENCE_LENGTH
        assert metrics[f"data/{name}/epoch"] == pytest.approx(seen[name[0]] / samples)


def test_tokens_that_were_passed_over_are_not_counted_as_trained_on(mixture):
    whole = TokenStream(mixture, micro_batch_size=12, global_batch_size=12, shuffle_window=40)
    stream = TokenStream(mixture, micro_batch_size=12, global_batch_size=12, shuffle_window=40, skip=[(3, 40)])
    seen = letters(islice(stream, 10))
    list(islice(whole, 48))
    metrics = stream.metrics()
    assert {name: metrics[f"data/{name}/tokens"] for name in SIZES} == {name: seen[name[0]] * SEQUENCE_LENGTH for name in SIZES}
    assert {name: metrics[f"data/{name}/epoch"] for name in SIZES} == {name: whole.metrics()[f"data/{name}/epoch"] for name in SIZES}
    assert (metrics["data/skipped_steps"], whole.metrics()["data/skipped_steps"]) == (38, 0)


@pytest.mark.parametrize(
    ("weights", "change"),
    [
        ({"books": 0.2, "code": 1}, "source web is gone"),
        ({"books": 0.2, "code": 1, "web": 2.5}, r"web's weight 3 -> 2\.5"),
    ],
)
def test_another_mixture_on_resume_is_refused_saying_what_changed(folder, mixture, weights, change):
    sizes = {"micro_batch_size": 4, "global_batch_size": 4}
    state, other = TokenStream(mixture, **sizes).state_dict(), TokenStream(mixture_of(folder, weights), **sizes)
    with pytest.raises(ValueError, match=rf"\({change}\)"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="source web is new" if "web" not in weights else "weight 2.5 -> 3"):
        TokenStream(mixture, **sizes).load_state_dict(other.state_dict())


def test_a_source_whose_shards_were_made_anew_is_named(mixture, tmp_path):
    for name, samples in SIZES.items():
        make_source(tmp_path / name / "train", name[0] if name != "code" else "k", samples)
    sizes = {"micro_batch_size": 4, "global_batch_size": 4}
    with pytest.raises(ValueError, match=r"\(code's fingerprint \w{12} -> \w{12}\)"):
        TokenStream(mixture_of(tmp_path), **sizes).load_state_dict(TokenStream(mixture, **sizes).state_dict())

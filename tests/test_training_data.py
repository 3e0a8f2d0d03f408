"""Data as the trainer meets it: mixtures, steps passed over, samples that cannot be read, and what the metrics say of them."""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from distributed import run_ranks
from training_runs import GLOBAL_SEQUENCES, SEQUENCE_LENGTH, curve, make_data, records, small_config

from titans_scale.config import ConfigError
from titans_scale.data import ByteTokenizer, open_sources, write_shards
from titans_scale.parallel.context import RunError
from titans_scale.training.checks import check_patience
from titans_scale.training.trainer import Trainer

RUN = {"training.steps": 6, "checkpoint.interval": 4, "checkpoint.keep_last": 0, "eval.interval": 6, "eval.batches": 0}
SKIP = {"data.skip_steps": "[[2, 3], [6, 6]]"}
"""Of the batches 1 to 9, six are trained on: 1, 4, 5, 7, 8, 9."""


class StoppedAfterStep4(Trainer):
    def next_global_batch(self, *arguments):
        if self.step == 4:
            raise KeyboardInterrupt
        return super().next_global_batch(*arguments)


def mixture(folder, *, books=1.0, **more):
    """The dotted keys of a mixture of the folder's two sources."""
    sources = {"web": {"path": folder / "web", "weight": 3.0}, "books": {"path": folder / "books", "weight": books}, **more}
    return {"data.sources": json.dumps(sources, default=str)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    make_data(folder / "web", letters="abcdefgh \n")
    make_data(folder / "books", letters="uvwxyz.,", documents=10)
    return folder


def broken_off(folder, changes):
    """Four steps on as many ranks as this is run on."""
    with pytest.raises(KeyboardInterrupt):
        StoppedAfterStep4(small_config(folder, folder / "resumed", changes)).run()


@pytest.fixture(scope="module")
def runs(folder):
    """Mixtures with steps passed over: one run on one rank; one begun on two ranks with a worker each, ended on one rank without."""
    changes = {**RUN, **mixture(folder), **SKIP}
    run_ranks(broken_off, 2, folder, {**changes, "data.num_workers": 1})
    for name in ("whole", "resumed"):
        Trainer(small_config(folder, folder / name, changes)).run()
    return folder


def sentence_of(config):
    with pytest.raises((RunError, ConfigError)) as raised:
        Trainer(config).run()
    return str(raised.value)


def test_two_ranks_with_workers_go_on_as_one_without(runs):
    whole, resumed = curve(runs / "whole"), curve(runs / "resumed")
    assert [step for step, *_ in resumed] == [1, 2, 3, 4, 5, 6]
    for (_, loss, norm, lr), (_, loss_whole, norm_whole, lr_whole) in zip(resumed, whole, strict=True):
        assert lr == lr_whole
        assert loss == pytest.approx(loss_whole, rel=1e-5)  # float32 sums in another order
        assert norm == pytest.approx(norm_whole, rel=1e-4)


def test_each_record_tells_what_was_trained_on_of_each_source(runs):
    for name in ("whole", "resumed"):
        of_run = records(runs / name)
        assert [record["data/skipped_steps"] for record in of_run] == [0, 2, 2, 3, 3, 3]
        assert [record["data/web/tokens"] + record["data/books/tokens"] for record in of_run] == [
            step * GLOBAL_SEQUENCES * SEQUENCE_LENGTH for step in range(1, 7)
        ]
        assert of_run[-1]["data/web/tokens"] > of_run[-1]["data/books/tokens"] > 0
        assert {"data/web/epoch", "data/books/epoch", "data/retries", "data/skipped_samples"} <= set(of_run[0])
        assert "data/epoch" not in of_run[0]
        assert of_run[0]["time_metrics/data_loading(%)"] < 100


def test_each_source_has_its_validation_loss_and_the_mixture_s_is_their_mean_by_weight(runs):
    record = records(runs / "whole")[-1]
    web, books = record["validation_metrics/web/loss"], record["validation_metrics/books/loss"]
    assert record["validation_metrics/loss"] == pytest.approx((3 * web + books) / 4)
    assert abs(web - books) > 1e-3
    assert "validation_metrics/loss" not in records(runs / "whole")[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"books": 2.0}, "books's weight 1.0 -> 2.0"),
        ({"code": {"path": "web", "weight": 1.0}}, "source code is new"),
    ],
)
def test_another_mixture_is_refused_on_resume_saying_what_changed(runs, monkeypatch, change, sentence):
    monkeypatch.chdir(runs)
    assert f"({sentence})" in sentence_of(small_config(runs, runs / "whole", {**RUN, "training.steps": 7, **mixture(runs, **change)}))


def test_the_sources_may_move_and_the_skip_list_may_change(runs, tmp_path, capsys):
    for name in ("web", "books", "whole"):
        shutil.copytree(runs / name, tmp_path / name)
    changes = {**RUN, "training.steps": 7, **mixture(tmp_path), "data.skip_steps": "[[10, 12]]"}
    Trainer(small_config(tmp_path, tmp_path / "whole", changes)).run()
    assert "data.sources.web.path" in capsys.readouterr().out
    assert records(tmp_path / "whole")[-1]["data/skipped_steps"] == 6


def test_resets_at_documents_may_not_change(runs):
    sentence = sentence_of(small_config(runs, runs / "whole", {**RUN, **mixture(runs), "data.reset_at_document": "true"}))
    assert "data.reset_at_document is True here and False there" in sentence


def spoilt(data, folder, *, split="train", keep=0):
    """A copy in which no sample of a split but the first `keep` is what it should be."""
    shutil.copytree(data, folder)
    for shard in (folder / split).glob("*.tar"):
        content = np.fromfile(shard, dtype=np.uint8)
        stride = json.loads((folder / split / "index.json").read_text())["stride"]
        content[keep * stride :] ^= 0xFF
        content.tofile(shard)
    return folder


def test_steps_whose_samples_all_cannot_be_read_are_gone_through_without_numbers_that_are_not_finite(folder, tmp_path):
    data = spoilt(folder / "web", tmp_path / "web")
    changes = {"training.steps": 2, "data.on_error": "skip", "data.retry_seconds": 0}
    Trainer(small_config(data, tmp_path / "run", changes)).run()
    for step, record in enumerate(records(tmp_path / "run"), start=1):
        assert record["loss_metrics/global_avg_loss"] == record["grad_norm"] == record["n_tokens_seen"] == 0
        assert record["data/skipped_samples"] == step * GLOBAL_SEQUENCES
        assert record["data/retries"] == step * GLOBAL_SEQUENCES


def test_samples_left_out_of_validation_are_counted(folder, tmp_path):
    data = spoilt(folder / "web", tmp_path / "web", split="validation", keep=3)
    changes = {"training.steps": 1, "data.on_error": "skip", "data.retry_seconds": 0, "eval.interval": 1, "eval.batches": 0}
    trainer = Trainer(small_config(data, tmp_path / "run", changes))
    samples = len(trainer.validation_data)
    trainer.run()
    (record,) = records(tmp_path / "run")
    assert record["validation_metrics/skipped_samples"] == samples - 3 > 0
    assert torch.tensor(record["validation_metrics/loss"]).isfinite()
    assert record["data/skipped_samples"] == 0


def test_what_is_validated_on_may_not_be_trained_on(folder, tmp_path):
    shutil.copytree(folder / "web", tmp_path / "web")
    shutil.rmtree(tmp_path / "web" / "validation")
    shutil.copytree(tmp_path / "web" / "train", tmp_path / "web" / "validation")
    config = small_config(tmp_path / "web", tmp_path / "run", {"eval.interval": 1})
    assert "validation/000000.tar is to be validated on and is the same as" in sentence_of(config)
    assert not (tmp_path / "run").exists()


def test_a_source_without_a_validation_split_is_named(folder, tmp_path):
    for name in ("web", "books"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.rmtree(tmp_path / "books" / "validation")
    config = small_config(tmp_path, tmp_path / "run", {"eval.interval": 1, **mixture(tmp_path)})
    assert "books has no split 'validation': it has train" in sentence_of(config)
    Trainer(small_config(tmp_path, tmp_path / "run", {"training.steps": 1, **mixture(tmp_path)})).run()


def sentence_of_rank(data, run):
    return sentence_of(small_config(data, run))


def test_fewer_samples_than_ranks_is_one_sentence_on_all(tmp_path):
    write_shards(["one"], tmp_path / "data" / "train", tokenizer=ByteTokenizer(), sequence_length=SEQUENCE_LENGTH)
    said = run_ranks(sentence_of_rank, 2, tmp_path / "data", tmp_path / "run")
    assert said[0] == said[1]
    assert "data/train has too few samples (1) to give each of 2 ranks one" in said[0]


def test_nothing_of_the_validation_split_is_ever_in_the_training_order(tmp_path):
    for split, letter in (("train", "t"), ("validation", "v")):
        for name in ("web", "books"):
            text = letter * 10 * SEQUENCE_LENGTH
            write_shards([text], tmp_path / name / split, tokenizer=ByteTokenizer(), sequence_length=SEQUENCE_LENGTH)
    config = small_config(tmp_path, tmp_path / "run", {"eval.interval": 1, **mixture(tmp_path)})
    trainer = Trainer(config)
    batches = list(islice(trainer.stream, 20 * trainer.stream.micro_batches_per_step))
    trainer.close()
    assert trainer.stream.metrics()["data/books/epoch"] > 2
    assert {token for batch in batches for token in batch.inputs.unique().tolist()} == {ord("t"), ByteTokenizer().eos_id}
    assert (trainer.validation_data.__getitems__([(0, 1), (1, 1)]).tokens == ord("v")).all()


def test_ranks_must_not_wait_shorter_for_a_remote_than_it_is_tried(folder, tmp_path):
    impatient = {"data.path": f"pipe:cat {folder}/web/{{}}", "data.cache_dir": tmp_path, "comm.train_timeout_seconds": 80}
    config = small_config(folder, tmp_path / "run", impatient)
    data = open_sources(config.data, "train", sequence_length=SEQUENCE_LENGTH)
    check_patience(data, config, 1)
    with pytest.raises(ConfigError, match=r"given up after 82\.5 s .* wait comm\.train_timeout_seconds 80 s; lower the former"):
        check_patience(data, config, 2)
    config.comm.train_timeout_seconds = 90
    check_patience(data, config, 2)

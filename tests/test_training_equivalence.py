"""The same training on any number of ranks, in any number of micro-batches, under any sharding."""

import pytest
from distributed import run_ranks
from training_runs import GLOBAL_SEQUENCES, SEQUENCE_LENGTH, curve, make_data, records, small_config

from titans_scale.training.trainer import Trainer

ON_TWO_RANKS = {
    "one micro-batch": {"training.micro_batch_size": 4},
    "many micro-batches, parameters kept": {"training.micro_batch_size": 1, "parallelism.reshard_after_forward": "false"},
    "replicas": {"parallelism.data_parallel_replicate": 2},
    "recomputed, read by workers": {"activation_checkpoint.mode": "full", "data.num_workers": 1},
    "recomputed in part, all logits at once": {"activation_checkpoint.mode": "selective", "training.max_logits_mib": "null"},
    "untied": {"model.tie_embeddings": "false"},
}
ON_ONE_RANK = {
    "plain": {},
    "again": {},
    "whole batch": {"training.micro_batch_size": GLOBAL_SEQUENCES},
    "untied": {"model.tie_embeddings": "false"},
}
EVERY_RUN = {"training.steps": 3, "eval.interval": 3, "eval.batches": 0, "metrics.memory_interval": 3}


def train_all(data, folder, runs):
    for name, changes in runs.items():
        Trainer(small_config(data, folder / name, {**EVERY_RUN, **changes})).run()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equivalence")
    data = make_data(folder / "data")
    run_ranks(train_all, 1, data, folder / "one", ON_ONE_RANK)
    run_ranks(train_all, 2, data, folder / "two", ON_TWO_RANKS)
    return folder


def test_one_seed_gives_one_loss_curve(runs):
    assert curve(runs / "one" / "plain") == curve(runs / "one" / "again")


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_ranks_train_as_one_does(runs, name):
    alone = curve(runs / "one" / ("untied" if name == "untied" else "plain"))
    together = curve(runs / "two" / name)
    for (step, loss, norm, lr), (step_alone, loss_alone, norm_alone, lr_alone) in zip(together, alone, strict=True):
        assert (step, lr) == (step_alone, lr_alone)
        assert loss == pytest.approx(loss_alone, rel=1e-5)  # float32 sums in another order
        assert norm == pytest.approx(norm_alone, rel=1e-4)


def test_one_whole_batch_trains_as_micro_batches_do(runs):
    for (_, loss, norm, _), (_, loss_parts, norm_parts, _) in zip(
        curve(runs / "one" / "whole batch"), curve(runs / "one" / "plain"), strict=True
    ):
        assert loss == pytest.approx(loss_parts, rel=1e-5)
        assert norm == pytest.approx(norm_parts, rel=1e-4)


def test_untied_is_another_model_so_the_comparisons_can_fail(runs):
    assert curve(runs / "one" / "untied")[0][1] != pytest.approx(curve(runs / "one" / "plain")[0][1], rel=1e-5)


@pytest.mark.parametrize("name", ["one micro-batch", "replicas"])
def test_validation_loss_weighs_every_token_alike_on_any_number_of_ranks(runs, name):
    alone, together = records(runs / "one" / "plain")[-1], records(runs / "two" / name)[-1]
    assert together["validation_metrics/loss"] == pytest.approx(alone["validation_metrics/loss"], rel=1e-5)


def test_memory_metrics_are_logged_when_due_and_only_then(runs):
    first, *_, last = records(runs / "two" / "replicas")
    assert {"titans/inner_loss_before", "titans/inner_loss_after", "titans/surprise_norm", "titans/theta_mean"} <= set(last)
    assert {"titans/eta_mean", "titans/alpha_mean", "titans/state_norm"} <= set(last)
    assert not any(name.startswith("titans/") for name in first)


def test_every_target_token_is_counted_once(runs):
    assert records(runs / "two" / "one micro-batch")[0]["n_tokens_seen"] == GLOBAL_SEQUENCES * SEQUENCE_LENGTH

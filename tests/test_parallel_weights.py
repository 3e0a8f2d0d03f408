"""Sharded models hold the weights, and make the gradients, of the model in one piece; also where ranks do not divide a dimension."""

import pytest
import torch
from distributed import run_ranks
from torch.distributed.tensor import DTensor
from training_runs import SEQUENCE_LENGTH, make_data, small_config

from titans_scale import TitansLM
from titans_scale.data import IGNORED, Batch
from titans_scale.models.loss import next_token_loss
from titans_scale.parallel.fsdp2 import set_learning_rate
from titans_scale.training.optimizer import build_optimizer
from titans_scale.training.trainer import Trainer

RANKS = 3
MICRO_BATCHES = 2
ROWS = 2
SEED = 7
CHANGES = {"training.seed": SEED, "training.global_batch_tokens": SEQUENCE_LENGTH * RANKS * ROWS * MICRO_BATCHES}


def uneven_batches():
    """One batch for each micro-batch of each rank, with 0 to 50 targets."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(RANKS * MICRO_BATCHES):
        tokens = torch.randint(0, 256, (ROWS, SEQUENCE_LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[:, 5 * number :] = IGNORED
        batches.append(Batch(inputs=tokens[:, :-1], targets=targets))
    return batches


def one_step(data, output):
    trainer = Trainer(small_config(data, output, CHANGES))
    weights = {name: parameter.full_tensor() for name, parameter in trainer.model.named_parameters()}
    batches = uneven_batches()
    result = trainer.train_step(batches[trainer.context.rank :: RANKS], sum(int((b.targets != IGNORED).sum()) for b in batches))
    loss = trainer.context.sum(result.loss).item()
    after = {name: parameter.full_tensor() for name, parameter in trainer.model.named_parameters()}
    empty = sum(parameter.to_local().numel() == 0 for parameter in trainer.model.parameters() if isinstance(parameter, DTensor))
    trainer.close()
    return weights, loss, result.grad_norm.item(), after, empty


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return run_ranks(one_step, RANKS, make_data(folder / "data"), folder / "run")


@pytest.fixture(scope="module")
def in_one_piece(tmp_path_factory):
    """The same step by plain autograd: mean loss over all targets at once, and its gradient."""
    folder = tmp_path_factory.mktemp("piece")
    model = TitansLM(small_config(folder, folder, CHANGES).model)
    model.init_weights(SEED)
    batches = uneven_batches()
    inputs, targets = (torch.cat([getattr(batch, part) for batch in batches]) for part in ("inputs", "targets"))
    labels = torch.cat((inputs[:, :1], targets), dim=1)
    loss = next_token_loss(torch.cat((model(inputs).logits, torch.zeros(len(inputs), 1, 257)), dim=1), labels)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return model, loss.item(), norm.item()


def test_every_rank_fills_its_shard_with_the_same_weights(ranks):
    for weights, *_ in ranks:
        for name, value in TitansLM(small_config("data", "run").model).initial_values(SEED):
            assert torch.equal(weights[name], value), name


def test_some_shards_here_are_empty(ranks):
    assert ranks[-1][-1] > 0


def test_ranks_with_fewer_targets_weigh_less(ranks, in_one_piece):
    _, loss, norm = in_one_piece
    for _, sharded_loss, sharded_norm, *_ in ranks:
        assert sharded_loss == pytest.approx(loss, rel=1e-5)
        assert sharded_norm == pytest.approx(norm, rel=1e-4)


def test_the_step_moves_the_weights_as_one_process_would(ranks, in_one_piece):
    model, _, _ = in_one_piece
    config = small_config("data", "run", CHANGES)
    optimizer = build_optimizer(model, config.optimizer)
    lr = config.optimizer.lr / config.lr_scheduler.warmup_steps
    set_learning_rate(optimizer, lr)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        clear = parameter.grad.abs() > 1e-2 * parameter.grad.abs().max()  # Adam's first step is the gradient's sign: noise elsewhere
        moved = (ranks[0][3][name] - ranks[0][0][name]).abs().max()
        assert moved > 0.5 * lr, name
        assert (ranks[0][3][name] - parameter)[clear].abs().max() < 1e-2 * lr, name

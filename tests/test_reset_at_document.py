"""Documents packed into one row, attention and memory beginning anew at each: every document as if it were alone."""

from itertools import pairwise

import pytest
import torch
from distributed import run_ranks
from small_models import VARIANTS, VOCAB, perturbed_model, random_tokens
from training_runs import records, small_config

from titans_scale import TitansLM
from titans_scale.data import load_tokenizer, write_shards
from titans_scale.models.documents import DocumentLayout, document_starts, longest_document
from titans_scale.models.plans import keeps_result
from titans_scale.parallel import Mesh, mesh_sizes
from titans_scale.parallel.apply import checkpoint_blocks, shard
from titans_scale.parallel.materialize import materialize
from titans_scale.training.trainer import Trainer

LENGTHS = [[1, 2, 5, 30, 8, 1, 13], [16, 1, 24, 10, 9], [60]]
"""Documents of each row: single tokens, shorter than the convolution (4), ending where a chunk (8) or a segment (12) does, with the
persistent tokens (3) in front or without, and longer than several segments and windows (10)."""
TOKENS = 60


def starts_of(lengths):
    starts = torch.zeros(len(lengths), sum(lengths[0]), dtype=torch.bool)
    for row, of_row in zip(starts, lengths, strict=True):
        row[torch.tensor([0, *of_row]).cumsum(0)[:-1]] = True
    return starts


def documents_of(lengths):
    """(row, begin, end) of each document."""
    bounds = [torch.tensor([0, *of_row]).cumsum(0).tolist() for of_row in lengths]
    return [(row, begin, end) for row, of_row in enumerate(bounds) for begin, end in pairwise(of_row)]


def loss_and_gradients(model, tokens, **options):
    loss = model.loss_sum(tokens, tokens.roll(-1, 1), **options)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


KINDS = [
    (),
    ("memory.conv_kernel=0", "num_persistent_tokens=0", "memory.depth=1", "memory.momentum=false"),
    ("memory.write_rule=normalized", "memory.depth=3", "num_persistent_tokens=4", "memory.residual_norm=true"),
    ("memory.write_rule=plain", "memory.max_step=0.02", "num_persistent_tokens=0", "memory.state_interval=1"),
    ("memory.write_rule=online", "memory.passes=3", "memory.depth=1", "memory.chunk_size=5", "segment_len=10", "memory.conv_kernel=6"),
]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_have_the_logits_and_gradients_that_they_have_alone(variant, kind):
    model, tokens = perturbed_model(variant, *kind, scale=0.1), random_tokens(3, TOKENS)
    packed = model(tokens, document_starts=starts_of(LENGTHS)).logits
    alone = [(row, begin, end, model(tokens[row : row + 1, begin:end]).logits[0]) for row, begin, end in documents_of(LENGTHS)]
    for row, begin, end, expected in alone:
        torch.testing.assert_close(packed[row, begin:end], expected, rtol=1e-10, atol=1e-10)
    assert (model(tokens).logits - packed)[:2].abs().max() > 1e-3  # two rows have documents to tell apart
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1), dtype=packed.dtype)
    of_alone = sum((expected * weights[row, begin:end]).sum() for row, begin, end, expected in alone)
    gradients = (torch.autograd.grad(total, list(model.parameters())) for total in ((packed * weights).sum(), of_alone))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_token_is_felt_in_its_own_document_alone(variant):
    model, tokens, starts = perturbed_model(variant), random_tokens(3, TOKENS), starts_of(LENGTHS)
    before = model(tokens, document_starts=starts).logits
    for row, begin, end in documents_of(LENGTHS):
        changed = tokens.clone()
        changed[row, begin] = (changed[row, begin] + 1) % VOCAB
        differs = (model(changed, document_starts=starts).logits != before).any(-1)
        assert differs[row, begin:end].all()
        differs[row, begin:end] = False
        assert not differs.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_reaches_another_document(variant):
    model, tokens = perturbed_model(variant, "tie_embeddings=false"), torch.arange(TOKENS)[None]  # each place has a token of its own
    logits = model(tokens, document_starts=starts_of(LENGTHS[1:2])).logits
    for _, begin, end in documents_of(LENGTHS[1:2]):
        (gradient,) = torch.autograd.grad(logits[0, begin:end].square().sum(), model.embedding.weight, retain_graph=True)
        reached = gradient.any(-1).nonzero().flatten().tolist()
        assert reached == list(range(begin, end))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_document_a_row_is_the_row(variant):
    model, tokens = perturbed_model(variant), random_tokens(2, TOKENS)
    starts = torch.zeros(2, TOKENS, dtype=torch.bool)  # the first of a row begins one in any case
    for ours, expected in zip(loss_and_gradients(model, tokens, document_starts=starts), loss_and_gradients(model, tokens), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_changes_no_bit(variant):
    tokens, starts, results = random_tokens(1, TOKENS), starts_of(LENGTHS[:1]), []
    for keeps in (None, lambda operator: False, keeps_result):
        model = perturbed_model(variant)
        if keeps is not None:
            checkpoint_blocks(model, keeps)
        results.append(loss_and_gradients(model, tokens, document_starts=starts))
    for recomputed in results[1:]:
        assert all(torch.equal(ours, expected) for ours, expected in zip(recomputed, results[0], strict=True))


@pytest.mark.parametrize("variant", ["mag", *(pytest.param(variant, marks=pytest.mark.slow) for variant in VARIANTS if variant != "mag")])
def test_traced_blocks_agree_whatever_the_documents(variant):
    torch.compiler.reset()
    model, compiled = (perturbed_model(variant, "num_layers=1") for _ in range(2))
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for lengths in ([[13, 7], [20]], [[1, 3, 16], [9, 10, 1]]):
        tokens = random_tokens(2, 20)
        results = [loss_and_gradients(each, tokens, document_starts=starts_of(lengths)) for each in (compiled, model)]
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * max(1.0, expected.abs().max().item()))


RANKS = [[[5, 27], [32]], [[1, 1, 1, 20, 9], [16, 16]]]
"""The documents of each rank; laid out anew, their rows are of different lengths."""


def tokens_of_rank(rank):
    return torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(rank))


def sharded(variant, precision):
    """A rank's loss, and the gradients of all ranks."""
    config = small_config("data", "run", {"model.variant": variant})
    with torch.device("meta"):
        model = TitansLM(config.model)
    checkpoint_blocks(model, keeps_result)
    shard(model, Mesh(mesh_sizes(config.parallelism, 2), "cpu"), precision=precision, reshard_after_forward=True)
    materialize(model, torch.device("cpu"), seed=0)
    rank = torch.distributed.get_rank()
    tokens = tokens_of_rank(rank)
    loss = model.loss_sum(tokens, tokens.roll(-1, 1), logits_bytes=10_000, document_starts=starts_of(RANKS[rank]))
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    "variant, precision, tolerance", [("mac", "float32", 1e-5), ("mal", "bfloat16", 0.1)]
)  # gradients of bfloat16 have two digits
def test_sharded_ranks_with_other_documents_train_as_one_does(variant, precision, tolerance):
    model = TitansLM(small_config("data", "run", {"model.variant": variant}).model)
    model.init_weights(0)
    losses = []
    for rank, lengths in enumerate(RANKS):
        tokens = tokens_of_rank(rank)
        losses.append(model.loss_sum(tokens, tokens.roll(-1, 1), document_starts=starts_of(lengths)))
    sum(losses).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    for (loss, of_ranks), expected in zip(run_ranks(sharded, 2, variant, precision), losses, strict=True):
        assert loss == pytest.approx(expected.item(), rel=tolerance)
        assert (of_ranks - gradient).norm() < tolerance * gradient.norm()


def test_a_document_begins_at_its_end_token_and_padding_is_one_document():
    eos = 9
    inputs = torch.tensor([[1, 2, 9, 3, 9, 4, 9, 9, 9], [9, 9, 5, 6, 9, 9, 7, 8, 9], [9] * 9])
    assert document_starts(inputs, eos).int().tolist() == [[1, 0, 1, 0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0, 0, 0, 1], [1] + [0] * 8]
    assert longest_document(inputs[:2], document_starts(inputs[:2], eos)).tolist() == [[9, 9, 5, 6]]


def test_rows_come_in_few_lengths_hardly_longer_than_their_documents():
    config = small_config("data", "run", {"model.variant": "mag", "model.memory.chunk_size": 4}).model
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(500):
        starts = torch.rand(4, 512, generator=generator) < 0.05 * torch.rand((), generator=generator)
        slots = DocumentLayout.of(starts, config).starts_BS.shape[1]
        most = 1 + int(starts.sum(1).max())
        around = config.num_persistent_tokens + config.memory.conv_kernel - 1 + 3  # each document, and what its chunk lacks
        assert 512 + config.num_persistent_tokens <= slots <= (512 + most * around) * 17 / 16
        shapes.add(slots)
    assert len(shapes) <= 16


@pytest.mark.parametrize(
    "change, words",
    [({"document_starts": torch.ones(2, 5).bool()}, "must have that of the tokens"), ({"state": 1}, "together with a state")],
)
def test_what_does_not_fit_gets_a_sentence(change, words):
    model, tokens = perturbed_model("lmm"), random_tokens(2, 6)
    if "state" in change:
        change["state"] = model.init_state(2)
    with pytest.raises(ValueError, match=words):
        model(tokens, **{"document_starts": torch.ones(2, 6).bool(), **change})


def loss_alone(model, text):
    """The summed loss of a document by itself, and its targets: as in the shards, the end token stands before it."""
    tokens = torch.tensor([[256, *text.encode(), 256]])
    return model.loss_sum(tokens[:, :-1], tokens[:, 1:]), tokens.shape[1] - 1


@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_training_s_loss_is_the_mean_over_the_tokens_of_each_document_alone(variant, tmp_path):
    texts = {"train": ["a first text", "one more"], "validation": ["the third", "and a last one"]}
    for split, of_split in texts.items():
        write_shards(of_split, tmp_path / "data" / split, tokenizer=load_tokenizer("byte"), sequence_length=32, samples_per_shard=8)
    settings = {"model.variant": variant, "data.reset_at_document": "true", "training.steps": 1, "eval.interval": 1}
    settings |= {"training.global_batch_tokens": 32, "training.micro_batch_size": 1, "optimizer.lr": 1e-30, "metrics.memory_interval": 1}
    config = small_config(tmp_path / "data", tmp_path / "run", settings)
    Trainer(config).run()
    model = TitansLM(config.model)
    model.init_weights(config.training.seed)
    (record,) = records(tmp_path / "run")
    for name, of_split in zip(("loss_metrics/global_avg_loss", "validation_metrics/loss"), texts.values(), strict=True):
        losses, targets = zip(*(loss_alone(model, text) for text in of_split), strict=True)
        assert record[name] == pytest.approx(sum(losses).item() / sum(targets), rel=1e-5)

"""Ranks that share every layer train the model of one rank: the same loss, gradients and logits, in float64."""

from collections import Counter

import pytest
import torch
from distributed import run_ranks
from small_models import VARIANTS, perturbed_model, random_tokens
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from titans_scale.memory import MemoryProbe
from titans_scale.models.loss import IGNORED
from titans_scale.models.plans import keeps_result, tensor_split
from titans_scale.parallel import Mesh, MeshSizes
from titans_scale.parallel.apply import checkpoint_blocks
from titans_scale.parallel.tensor import tensor_parallel

TOKENS = 30
"""Two segments of 12 and a half; a rank's share, 15 or 10, is no whole number of chunks, and 61 words are no whole number a rank."""
A_FEW_TOKENS = 2 * 8 * 31 * 20
"""Bytes of logits and log-probabilities: chunks of uneven lengths in the loss."""
SIZES = ("dim=24", "num_heads=6", "mlp_dim=12", "memory.num_heads=6")
"""Two ranks and three divide them."""
PLAINEST = ("num_persistent_tokens=0", "memory.conv_kernel=0", "memory.momentum=false", "memory.forgetting=false", "memory.depth=1")
DOCUMENTS = [[7, 1, 9, 13], [30]]
LARGE_VOCABULARY = 2048

CASES = [
    *((variant, "tie_embeddings=true", "memory.residual_norm=true") for variant in VARIANTS),
    *((variant, "tie_embeddings=false", "memory.residual_norm=false") for variant in VARIANTS),
    *((variant, "documents", mode) for variant, mode in zip(VARIANTS, ("selective", "full", "selective", "full"), strict=True)),
    *((variant, "hidden", "memory.num_heads=1", "memory.residual_norm=true") for variant in VARIANTS),
    ("mac", "hidden", "documents", "selective", "memory.num_heads=2"),
    ("mal", *PLAINEST),
    ("mag", "compiled"),
]
FEW_CASES = [(variant, "documents") for variant in VARIANTS] + [("mac", "hidden", "memory.num_heads=1")]
"""On three ranks."""


def whole_model(variant, *options):
    return perturbed_model(variant, *SIZES, *(option for option in options if "=" in option))


def shared_model(variant, *options):
    mesh = Mesh(MeshSizes(replicate=1, shard=1, tensor=torch.distributed.get_world_size()), "cpu").tensor
    model = tensor_parallel(whole_model(variant, *options), mesh, memory_split="hidden" if "hidden" in options else "heads")
    if "selective" in options or "full" in options:
        checkpoint_blocks(model, keeps_result if "selective" in options else None)
    if "compiled" in options:
        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    return model


def starts_of(lengths):
    starts = torch.zeros(len(lengths), sum(lengths[0]), dtype=torch.bool)
    for row, of_row in zip(starts, lengths, strict=True):
        row[torch.tensor([0, *of_row]).cumsum(0)[:-1]] = True
    return starts


def results(model, options):
    """Loss, logits and all gradients, whole ones; a factor of the loss stands for the number of targets."""
    tokens, starts = random_tokens(2, TOKENS), starts_of(DOCUMENTS) if "documents" in options else None
    targets = tokens.roll(-1, 1)
    targets[0, 17:] = IGNORED
    loss = model.loss_sum(tokens, targets, logits_bytes=A_FEW_TOKENS, document_starts=starts)
    (loss / 7).backward()
    with torch.no_grad():
        logits = model(tokens, document_starts=starts).logits
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    return {"loss": loss.detach(), "logits": logits, **whole}


def disagreements(cases):
    """Of each case, how far every result is from one rank's, relative to its norm."""
    found = {}
    for case in cases:
        shared = results(shared_model(*case), case)
        if torch.distributed.get_rank() == 0:
            alone = results(whole_model(*case), case)
            assert shared.keys() == alone.keys()
            found[case] = {name: float((shared[name] - alone[name]).norm() / alone[name].norm()) for name in alone}
    return found


def looks(model, alone):
    """Of a rank into its memories, and of one rank into all of them."""
    metrics = []
    for one in (model, alone):
        with torch.no_grad(), MemoryProbe(one) as probe:
            one(random_tokens(2, TOKENS))
        metrics.append(probe.metrics())
    return metrics


def communication(model):
    """How many collectives of each kind a training step takes, also inside our own operators, and the size of the largest tensor in one."""
    tokens = random_tokens(2, TOKENS)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model.loss_sum(tokens, tokens, logits_bytes=2 * 8 * (LARGE_VOCABULARY // 2) * 20).backward()
    events = [event for event in profiler.events() if event.name.startswith("_c10d_functional::") and "wait" not in event.name]
    return Counter(event.name.split("::")[1].strip("_") for event in events), max(
        torch.Size(event.input_shapes[0]).numel() for event in events
    )


class Calls(TorchDispatchMode):
    """Counts operators that really run, by name; to the profiler one that recomputation skips has run too."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name().split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def exchanges(model):
    """Gathers and scattered sums of a training step."""
    tokens = random_tokens(2, TOKENS)
    with Calls() as calls:
        model.loss_sum(tokens, tokens).backward()
    return calls.count["all_gather_into_tensor"], calls.count["reduce_scatter_tensor"]


def refusal(model):
    with pytest.raises(ValueError, match="do not divide") as error:
        model(random_tokens(1, 35))
    return str(error.value)


def on_two_ranks():
    normalized = ("mac", "memory.write_rule=normalized")
    return {
        "disagreements": disagreements(CASES),
        "looks": looks(shared_model(*normalized), whole_model(*normalized)),
        "communication": communication(shared_model("lmm", f"vocab_size={LARGE_VOCABULARY}")),
        "recomputed": {mode: exchanges(shared_model("lmm", mode)) for mode in ("none", "selective", "full")},
        "refusal": refusal(shared_model("lmm")),
    }


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(on_two_ranks, 2, timeout=300)


@pytest.fixture(scope="module")
def three_ranks():
    return run_ranks(disagreements, 3, FEW_CASES, timeout=300)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_ranks_have_the_loss_logits_and_gradients_of_one(two_ranks, case):
    assert_rounding(two_ranks[0]["disagreements"][case])


@pytest.mark.parametrize("case", FEW_CASES, ids="-".join)
def test_three_ranks_have_them_too(three_ranks, case):
    assert_rounding(three_ranks[0][case])


def assert_rounding(disagreement):
    """Of float64 through some thousands of sums; gradients of gates pass through all chunks of a scan and back."""
    assert disagreement["loss"] < 1e-10 and disagreement["logits"] < 1e-10
    assert {name: off for name, off in disagreement.items() if off > 1e-9} == {}


def test_a_look_into_the_memories_of_each_rank_is_on_average_that_into_all(two_ranks):
    (first, truth), (second, _) = (rank["looks"] for rank in two_ranks)
    for name, expected in truth.items():
        assert (first[name] + second[name]) / 2 == pytest.approx(expected, rel=1e-9), name


def test_the_scan_by_heads_exchanges_nothing_and_the_loss_no_logits(two_ranks):
    """A layer: two gathers and two scatters, and the other way round in the backward pass; embedding and head one of each. The loss: two
    sums for each of its three chunks, and one in the end."""
    for rank in two_ranks:
        counts, largest = rank["communication"]
        assert counts == {"all_gather_into_tensor": 2 * (2 + 2) + 2, "reduce_scatter_tensor": 2 * (2 + 2) + 2, "all_reduce": 2 * 3 + 1}
        assert largest == 2 * TOKENS * 24  # all tokens of the model's width; the logits of a chunk are eight times as many


def test_selective_recomputation_gathers_again_and_sums_nothing_again(two_ranks):
    """Of a layer's two gathers both, of its two sums none; full recomputation needs the first again, for what follows it."""
    (gathers, sums), selective, full = (two_ranks[0]["recomputed"][mode] for mode in ("none", "selective", "full"))
    assert selective == (gathers + 2 * 2, sums) and full == (gathers + 2 * 2, sums + 2)


def test_tokens_that_the_ranks_cannot_share_evenly_are_refused(two_ranks):
    for rank in two_ranks:
        assert rank["refusal"] == "35 tokens do not divide by the 2 ranks of parallelism.tensor_parallel; cut or pad them"


@pytest.mark.parametrize("variant", VARIANTS)
def test_by_heads_only_norms_of_the_model_s_width_and_persistent_tokens_are_held_alike(variant):
    alike = {name for name, dimension in tensor_split(whole_model(variant), "heads").items() if dimension is None}
    assert alike == {name for name, _ in whole_model(variant).named_parameters() if name.endswith(("norm.weight", "persistent"))}

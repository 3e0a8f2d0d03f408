"""Attention's kernels, outputs and gradients, against the T x T definition."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from titans_scale.config import ModelConfig
from titans_scale.evaluation.benchmarks.attention_run import benchmark_attention
from titans_scale.models.attention import KeyValue, choose_backend, flex, segment_attention, tiles, window_attention
from titans_scale.models.attention.merge import attend
from titans_scale.models.documents import DocumentLayout
from titans_scale.models.layers import rotate

BATCH, HEADS, DIM, THETA = 2, 3, 8, 100.0
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64: sums in another order
CPU = torch.device("cpu")


class Inputs(NamedTuple):
    """Queries of the last tokens, keys and values of all, and those of the persistent tokens."""

    q: torch.Tensor
    context: KeyValue
    memory: KeyValue
    prefix: KeyValue

    def leaves(self):
        return [self.q, *self.context, *self.memory, *self.prefix]

    def to(self, *target):
        q, *rest = (x.detach().to(*target).requires_grad_() for x in self.leaves())
        return Inputs(q, KeyValue(*rest[:2]), KeyValue(*rest[2:4]), KeyValue(*rest[4:]))


def randn(seed, length, dim=DIM):
    x = torch.randn(BATCH, HEADS, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_()


def key_value(seed, length, dim=DIM):
    return KeyValue(randn(seed, length, dim), randn(seed + 50, length, dim))


def inputs(length, *, past=0, persistent=2, dim=DIM):
    context, memory = key_value(1, past + length, dim), key_value(2, past + length, dim)
    return Inputs(randn(0, length, dim), context, memory, key_value(3, persistent, dim))


def reference(q, contexts, prefix, window, documents=None):
    """Softmax over everything with rotary positions 0, 1, ... on the contexts; the prefix is met without rotation."""
    past = contexts[0].k.shape[2] - q.shape[2]
    distance = past + torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(past + q.shape[2], device=q.device)
    unseen = (distance < 0) | (distance >= window)
    if documents is not None:
        unseen = unseen | (documents.number_BT[:, None, :, None] != documents.number_BT[:, None, None])
    rotated = rotate(q, start=past, theta=THETA)
    scores = [(rotated @ rotate(c.k, start=0, theta=THETA).mT).masked_fill(unseen, -torch.inf) for c in contexts]
    p = (torch.cat((q @ prefix.k.mT, *scores), dim=-1) / q.shape[-1] ** 0.5).softmax(-1)
    return p @ torch.cat((prefix.v, *(c.v for c in contexts)), dim=2)


def window_reference(x, window, documents=None):
    return reference(x.q, [x.context], x.prefix, window, documents)


def segment_reference(x):
    return reference(x.q, [x.memory, x.context], x.prefix, x.context.k.shape[2])


def windowed(x, window, backend="auto", documents=None):
    return window_attention(x.q, x.context, x.prefix, window=window, theta=THETA, backend=backend, documents=documents)


def packed(length, probability=0.1):
    """Documents of random lengths, single tokens among them, others in each row."""
    starts = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(length)) < probability
    return DocumentLayout.of(starts, ModelConfig())


def in_segment(x, backend="auto"):
    return segment_attention(x.q, x.memory, x.context, x.prefix, theta=THETA, backend=backend)


def output_and_gradients(attention, x):
    y = attention(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y)
    return [y, *torch.autograd.grad((y * weights).sum(), x.leaves(), allow_unused=True)]


def assert_same(attention, expected, x, tolerance=EXACT):
    for ours, theirs in zip(output_and_gradients(attention, x), output_and_gradients(expected, x), strict=True):
        if theirs is None or theirs.numel() == 0:
            assert ours is None or ours.count_nonzero() == 0
        else:
            torch.testing.assert_close(ours, theirs, **tolerance)


def assert_near(attention, expected, x, dtype, device, relative):
    """In a lower precision, each output and gradient within `relative` of its largest number in float64."""
    ours, theirs = output_and_gradients(attention, x.to(device, dtype)), output_and_gradients(expected, x)
    for low, exact in zip(ours, theirs, strict=True):
        if exact is not None and exact.numel():
            assert (low.cpu().double() - exact).abs().max() <= relative * exact.abs().max()


@pytest.fixture(params=["cpu kernel", "matrix products"])
def kernel(request, monkeypatch):
    """The tiles as a CPU computes them, and as every other device does."""
    if request.param == "matrix products":
        monkeypatch.setattr(tiles, "_is_one_causal_call", lambda *_: False)
        monkeypatch.setattr(tiles, "_cpu_forward", tiles._product_forward)
        monkeypatch.setattr(tiles, "_cpu_backward", tiles._product_backward)


SHAPES = [(1, 4), (3, 4), (5, 4), (33, 1), (33, 16), (20, 64), (64, 64), (150, 16), (150, 70), (300, 256), (300, 300)]  # tiles: 64 or 128


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("length, window", SHAPES)
def test_a_window_equals_the_masked_square(length, window, persistent):
    x = inputs(length, persistent=persistent)
    assert_same(lambda x: windowed(x, window), lambda x: window_reference(x, window), x)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("length, window", [shape for shape in SHAPES if shape[0] > 1])
def test_a_window_ends_at_the_start_of_its_document(length, window, persistent):
    x, documents = inputs(length, persistent=persistent), packed(length)
    assert_same(lambda x: windowed(x, window, documents=documents), lambda x: window_reference(x, window, documents), x)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("past", [1, 15, 100])
@pytest.mark.parametrize("length", [1, 7, 130])
def test_a_window_reaches_into_earlier_keys(past, length, window=16):
    x = inputs(length, past=past)
    assert_same(lambda x: windowed(x, window), lambda x: window_reference(x, window), x)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("length, past", [(1, 0), (9, 0), (150, 0), (4, 5), (1, 20), (100, 37)])
def test_a_segment_sees_prefix_memory_tokens_and_itself_up_to_its_own_place(length, past, persistent):
    assert_same(in_segment, segment_reference, inputs(length, past=past, persistent=persistent))


@pytest.mark.parametrize("past", [1, 5, 15, 40])
@pytest.mark.parametrize("length", [1, 7, 16, 50])
def test_pieces_of_a_sequence_equal_the_whole(past, length, window=16):
    x = inputs(past + length)
    whole = windowed(x, window)
    kept = x.context.between(max(0, past - window + 1))
    torch.testing.assert_close(windowed(x._replace(q=x.q[:, :, past:], context=kept), window), whole[:, :, past:], **EXACT)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("attention", [lambda x: windowed(x, 16), in_segment], ids=["window", "segment"])
def test_a_later_token_changes_nothing(attention, at=77):
    x = inputs(150)
    before = attention(x)
    with torch.no_grad():
        for part in (*x.context, *x.memory):
            part[:, :, at:] += 1000.0
    after = attention(x)
    assert torch.equal(before[:, :, :at], after[:, :, :at])
    assert not torch.equal(before[:, :, at], after[:, :, at])


@pytest.mark.usefixtures("kernel")
def test_gradients_are_those_of_finite_differences():
    x = inputs(5, past=2, dim=2)
    leaves = [leaf[:1, :1].detach().requires_grad_() for leaf in x.leaves()]

    def both(q, k, v, memory_k, memory_v, prefix_k, prefix_v):
        context, memory, prefix = KeyValue(k, v), KeyValue(memory_k, memory_v), KeyValue(prefix_k, prefix_v)
        y = window_attention(q, context, prefix, window=3, theta=THETA)
        return y + segment_attention(q, memory, context, prefix, theta=THETA)

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize("loud", ["prefix", "context"])
def test_scores_of_any_size_stay_exact(loud):
    """One part of the softmax a thousand nats above the other: exp of either score would overflow or vanish."""
    x = inputs(40)
    with torch.no_grad():
        getattr(x, loud).k.mul_(1000.0)
    near = {"rtol": 1e-10, "atol": 1e-7}  # gradients of the other side's keys are products of 1,000 and rounding errors
    assert_same(lambda x: windowed(x, 16), lambda x: window_reference(x, 16), x, near)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_lower_precisions_are_near_the_definition(dtype, relative):
    """Within a few units in the last place of the largest number: bfloat16 has 2^-8, float16 2^-11."""
    x = inputs(150)
    assert_near(lambda x: windowed(x, 40), lambda x: window_reference(x, 40), x, dtype, CPU, relative)
    assert_near(in_segment, segment_reference, x, dtype, CPU, relative)


def test_rotation_depends_on_distance_alone():
    q, k = randn(0, 6), randn(1, 6)
    near = rotate(q, start=3, theta=THETA) @ rotate(k, start=1, theta=THETA).mT
    far = rotate(q, start=1003, theta=THETA) @ rotate(k, start=1001, theta=THETA).mT
    torch.testing.assert_close(near, far)


def test_positions_far_out_keep_their_precision(far=100_000, window=16):
    """In float32, a window 100,000 tokens into a sequence is as exact as its first; positions in float32 would be off by 0.01."""
    x = inputs(4, past=window)
    zeros = torch.zeros(BATCH, HEADS, far, DIM, dtype=torch.float64)
    moved = x._replace(context=KeyValue(*(torch.cat((zeros, part), dim=2) for part in x.context)))
    ours = windowed(moved.to(torch.float32), window).double()
    torch.testing.assert_close(ours, windowed(x, window), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("kernel")
def test_memory_is_linear_in_the_sequence(length=2048, window=32):
    """Nothing the size of T x T is ever made, forward or backward."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    q, k, v = (randn(seed, length).detach() for seed in range(3))
    with Watch():
        out, lse = tiles.tiled_forward(q, k, v, window)
        tiles.tiled_backward(out, q, k, v, out, lse, window)
    assert 0 < largest <= BATCH * HEADS * length * DIM


def test_the_operator_keeps_what_torch_expects_of_one():
    """Its schema, its shapes on fake tensors, its autograd formula and its tracing, by torch's own check."""
    x = inputs(6)
    parts = ([x.context.k, x.memory.k], [x.context.v, x.memory.v])
    torch.library.opcheck(torch.ops.titans_scale.attention.default, (x.q, *parts, x.q, *x.prefix, 4, "sdpa", None, None))
    without = inputs(6, persistent=0)
    documents = (torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2]]), torch.tensor([0, 2, 6, 7, 10, 12]))
    arguments = (without.q, *parts, without.q[:, :, :0], *without.prefix, 4, "sdpa", *documents)
    torch.library.opcheck(torch.ops.titans_scale.attention.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("attention", [lambda x: windowed(x, 16), in_segment], ids=["window", "segment"])
def test_compiled_attention_is_one_graph_with_the_same_gradients(attention, compiler):
    torch.compiler.reset()
    x = inputs(40)
    assert_same(torch.compile(attention, backend=compiler, fullgraph=True), attention, x)


@pytest.mark.parametrize("attention", [lambda x: windowed(x, 16), in_segment], ids=["window", "segment"])
def test_recomputation_changes_no_gradient(attention):
    x = inputs(40)
    bitwise = {"rtol": 0.0, "atol": 0.0}
    assert_same(lambda x: checkpoint(attention, x, use_reentrant=False), attention, x, bitwise)


@pytest.mark.parametrize("persistent", [0, 3])
def test_flops_are_those_of_the_pairs_that_meet(persistent, length=50, past=20, window=16):
    x = inputs(length, past=past, persistent=persistent)
    distance = past + torch.arange(length)[:, None] - torch.arange(past + length)
    in_window = ((distance >= 0) & (distance < window)).sum().item() + length * persistent
    before = 2 * (distance >= 0).sum().item() + length * persistent
    for attention, pairs in ((lambda x: windowed(x, window), in_window), (in_segment, before)):
        with FlopCounterMode(display=False) as counter:
            y = attention(x)
        assert counter.get_total_flops() == 4 * BATCH * HEADS * DIM * pairs
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 10 * BATCH * HEADS * DIM * pairs


def test_the_backend_is_chosen_with_a_reason():
    name, reason = choose_backend("auto", CPU, torch.float32, head_dim=64)
    assert name == "sdpa" and "the model is on cpu" in reason
    assert choose_backend("sdpa", CPU, torch.float32, head_dim=64) == ("sdpa", "as asked for")


@pytest.mark.parametrize("backend", ["flash", "flex"])
def test_a_backend_that_cannot_run_says_why_and_what_to_choose(backend):
    with pytest.raises(ValueError, match=f"model.attention_backend {backend} cannot run: .* the model is on cpu; choose auto, or sdpa"):
        windowed(inputs(4), 4, backend)


@pytest.mark.parametrize(
    "length, past, window",
    [(128, 0, 512), (300, 0, 1), (300, 0, 100), (300, 0, 128), (600, 0, 129), (600, 0, 255), (1000, 0, 257), (200, 77, 130)],
)
def test_the_block_mask_is_that_of_torch(length, past, window):
    ours = flex.band_mask(length, past + length, window, CPU)

    def band(batch, head, query, key):
        return (query + past - key >= 0) & (query + past - key < window)

    theirs = create_block_mask(band, None, None, length, past + length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.seq_lengths == theirs.seq_lengths


@pytest.mark.parametrize("length, window", [(128, 512), (300, 1), (600, 129), (600, 4096), (1000, 257), (1000, 1000)])
@pytest.mark.parametrize("probability", [0.001, 0.01, 0.2])
def test_the_block_mask_of_documents_is_that_of_torch(length, window, probability):
    number = packed(length, probability).number_BT
    ours = flex.document_mask(number, window)

    def band(batch, head, query, key):
        return (query >= key) & (query - key < window) & (number[batch, query] == number[batch, key])

    theirs = create_block_mask(band, BATCH, None, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_flash_gets_the_documents_for_a_batch(monkeypatch, length=40, window=7):
    """All of the flash path but its kernels, which need a GPU: theirs are the shapes of torch.nn.attention.varlen."""

    def pieces(bounds):
        return [slice(begin, end) for begin, end in pairwise(bounds.tolist()) if end > begin]

    def forward(q, k, v, bounds, _, longest, *rest, window_size_left, window_size_right):
        assert q.shape == (BATCH * length, HEADS, DIM) and longest == length and bounds.dtype == torch.int32 and window_size_right == 0
        parts = [[x[piece].transpose(0, 1)[None] for x in (q, k, v)] for piece in pieces(bounds)]
        done = [tiles.tiled_forward(*part, window_size_left + 1) for part in parts]
        return torch.cat([out[0].transpose(0, 1) for out, _ in done]), torch.cat([lse[0] for _, lse in done], dim=1), None

    def backward(grad, q, k, v, out, lse, bounds, _, *rest, window_size_left, window_size_right):
        assert lse.shape == (HEADS, BATCH * length) and lse.is_contiguous()
        by_piece = []
        for piece in pieces(bounds):
            part = [x[piece].transpose(0, 1)[None] for x in (grad, q, k, v, out)]
            by_piece.append(tiles.tiled_backward(*part, lse[None, :, piece], window_size_left + 1))
        return [torch.cat([x[0].transpose(0, 1) for x in xs]) for xs in zip(*by_piece, strict=True)]

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    x, documents = inputs(length), packed(length)

    def flash(x):
        rotated = [rotate(y, start=0, theta=THETA) for y in (x.q, x.context.k)]
        return attend(rotated[0], [rotated[1]], [x.context.v], x.q, *x.prefix, window, "flash", documents)

    assert_same(flash, lambda x: window_reference(x, window, documents), x)


@pytest.mark.parametrize("persistent", [0, 3])
def test_flex_merges_its_parts_with_exact_gradients(monkeypatch, persistent, length=200, window=70):
    """All of the flex path but its kernel, which has no backward pass on a CPU."""

    class Sums(NamedTuple):
        lse: torch.Tensor

    def plain(q, k, v, *, block_mask, return_aux):
        assert return_aux.lse
        position = torch.arange(length)
        row = torch.arange(BATCH)[:, None, None, None]
        seen = block_mask.mask_mod(row, 0, position[:, None], position)
        scores = (q @ k.mT / DIM**0.5).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ v, Sums(scores.logsumexp(-1))

    monkeypatch.setattr(flex, "_compiled", lambda: plain)
    x = inputs(length, persistent=persistent)

    def arguments(x):
        return x.q, [x.memory.k, x.context.k], [x.memory.v, x.context.v], x.q, *x.prefix, window

    assert_same(lambda x: flex.flex_attend(*arguments(x)), lambda x: attend(*arguments(x), "sdpa"), x)
    documents = packed(length)
    assert_same(lambda x: flex.flex_attend(*arguments(x), documents), lambda x: attend(*arguments(x), "sdpa", documents), x)


@pytest.mark.slow
def test_the_benchmark_holds_both_forms_side_by_side():
    """Too short to be fast: only that both are measured, and compared."""
    report = benchmark_attention(tokens=[128], window=32, heads=1, repeats=1)
    assert [row["form"] for row in report.tables["Attention alone"]] == ["portable", "masked T x T"]
    assert all(row["CPU s, best"] > 0 and row["extra memory, MiB"] is not None for row in report.tables["Attention alone"])
    assert [target.at_least for target in report.targets] == [10]


GPU_SHAPES = [(1, 30, 16), (130, 0, 16), (300, 0, 1), (1000, 0, 257), (700, 60, 64), (256, 0, 4096)]
HALF = [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, relative", [*HALF, (torch.float32, 2e-3)])  # float32 products may run in TF32
@pytest.mark.parametrize("backend", ["flash", "flex", "sdpa"])
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("length, past, window", GPU_SHAPES)
def test_gpu_kernels_give_outputs_and_gradients_of_the_definition(length, past, window, persistent, backend, dtype, relative):
    if backend == "flash" and dtype == torch.float32:
        pytest.skip("flash is for half precision")
    x = inputs(length, past=past, persistent=persistent, dim=64)
    gpu = torch.device("cuda")
    assert_near(lambda x: windowed(x, window, backend), lambda x: window_reference(x, window), x, dtype, gpu, relative)
    assert_near(lambda x: in_segment(x, backend), segment_reference, x, dtype, gpu, relative)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "flex", "sdpa"])
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("length, window", [(130, 16), (1000, 257), (256, 4096)])
def test_gpu_kernels_end_a_window_at_the_start_of_its_document(length, window, persistent, backend):
    x, documents, gpu = inputs(length, persistent=persistent, dim=64), packed(length), torch.device("cuda")
    on_gpu = documents.to(gpu)

    def ours(x):
        return windowed(x, window, backend, on_gpu)

    assert_near(ours, lambda x: window_reference(x, window, documents), x, torch.bfloat16, gpu, 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [None, packed(300)], ids=["", "documents"])
@pytest.mark.parametrize("backend", ["flash", "flex", "sdpa"])
def test_gpu_kernels_compile_into_one_graph(backend, documents):
    torch.compiler.reset()
    x, gpu = inputs(300, dim=64), torch.device("cuda")
    on_gpu = documents.to(gpu) if documents else None
    compiled = torch.compile(lambda x: windowed(x, 64, backend, on_gpu), fullgraph=True)
    assert_near(compiled, lambda x: window_reference(x, 64, documents), x, torch.bfloat16, gpu, 3e-2)


@pytest.mark.gpu
def test_a_gpu_with_half_precision_takes_flash_and_else_flex():
    gpu = torch.device("cuda")
    assert choose_backend("auto", gpu, torch.bfloat16, head_dim=64).name == "flash"
    assert choose_backend("auto", gpu, torch.float32, head_dim=64).name == "flex"
    assert choose_backend("auto", gpu, torch.float64, head_dim=64).name == "sdpa"

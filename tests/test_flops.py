"""The FLOPs formula against torch's own counter, and what a model says about itself."""

import pytest
import torch
from small_models import VARIANTS, small_config
from torch.utils.flop_counter import FlopCounterMode

from titans_scale import TitansLM
from titans_scale.memory.flops import chunk_flops
from titans_scale.memory.groups import Rule, scan_chunks, scan_chunks_vjp
from titans_scale.models.flops import flops_per_token, forward_flops, training_flops
from titans_scale.models.plans import decay_groups, fsdp_groups, num_parameters, parameters_by_part

ALIGNED = ("segment_len=16", "window=16", "memory.state_interval=1")
MEMORIES = [
    (),
    ("memory.write_rule=plain", "memory.depth=1"),
    ("memory.depth=3", "memory.momentum=false", "memory.expansion=3"),
    ("memory.write_rule=online",),
]


def counted(config, length, *, backward):
    model, tokens = TitansLM(config), torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens, labels=tokens).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_formula_is_what_torch_counts(variant, memory):
    config = small_config(variant, *ALIGNED, *memory)
    assert counted(config, 64, backward=False) == sum(forward_flops(config, 64).values())


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_the_training_formula_is_what_torch_counts(memory):
    """Within 1.5%: the first products of the model have no gradient to compute in their input."""
    config = small_config("lmm", *ALIGNED, *memory)
    formula = sum(training_flops(config, 256).values())
    assert counted(config, 256, backward=True) == pytest.approx(formula, rel=0.015)
    assert flops_per_token(config, 256) == round(formula / 256)


@pytest.mark.parametrize("rule, passes", [("plain", 1), ("normalized", 1), ("online", 1), ("online", 3)])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_scan_s_formula_is_what_its_products_are(depth, rule, passes):
    """The operator is opaque to the counter, which takes our formula for it: so here is what is inside."""
    chunk, chunks, heads, widths = 8, 3, 2, [(4, 6), (6, 6), (6, 4)] if depth == 3 else [(4, 6), (6, 4)][:depth]
    widths = [(4, 4)] if depth == 1 else widths
    tokens = [torch.rand(1, heads, chunk * chunks, 4) for _ in range(3)] + [torch.rand(1, heads, chunk * chunks) * 0.1 for _ in range(3)]
    states = [torch.rand(1, heads, 2 * out, into) for into, out in widths]
    options = Rule(chunk, "silu", rule, None, passes, 4.0)
    in_place = {torch.ops.aten.baddbmm_: lambda out, a, b, *_, **__: 2 * a[0] * a[1] * a[2] * b[2]}  # torch counts baddbmm alone
    with FlopCounterMode(display=False, custom_mapping=in_place) as forward:
        y, after, kept = scan_chunks(tokens, states, None, options, chunk, 1, keep=True)
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward:
        scan_chunks_vjp(torch.ones_like(y), after, tokens, kept, None, options, chunk, 1)
    formula = chunk_flops(widths, chunk, rule, passes)
    assert forward.get_total_flops() == heads * chunks * formula.forward
    again = backward.get_total_flops() - heads * chunks * formula.backward
    assert 0 < again < forward.get_total_flops(), "the backward pass runs the writes again, but not the reads"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_parts_add_up_and_groups_cover_the_model(variant, tied):
    config = small_config(variant, f"tie_embeddings={tied}")
    model = TitansLM(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters()) == sum(parameters_by_part(config).values())
    grouped = [p for group in fsdp_groups(model) for module in group for p in module.parameters()]
    assert len(grouped) == len({id(p) for p in grouped})
    left = {id(p) for p in model.parameters()} - {id(p) for p in grouped}
    assert left == ({id(model.embedding.weight), id(model.norm.weight)} if tied == "true" else set())


def test_only_matrices_decay():
    model = TitansLM(small_config("mac", "memory.residual_norm=true"))
    decay, without = decay_groups(model)
    parameters = dict(model.named_parameters())
    assert sorted(decay + without) == sorted(parameters)
    assert all(parameters[name].dim() == 2 and name.endswith("weight") for name in decay)
    assert all("proj" not in name or name.endswith("bias") for name in without)
    assert "embedding.weight" in decay

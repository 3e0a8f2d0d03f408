"""The FLOPs formula against torch's own counter, and what a model says about itself."""

import pytest
import torch
from small_models import VARIANTS, small_config
from torch.utils.flop_counter import FlopCounterMode

from titans_scale import TitansLM
from titans_scale.models.flops import flops_per_token, forward_flops, training_flops
from titans_scale.models.plans import decay_groups, fsdp_groups, num_parameters, parameters_by_part

ALIGNED = ("segment_len=16", "window=16", "memory.state_interval=1")
MEMORIES = [(), ("memory.write_rule=plain", "memory.depth=1"), ("memory.depth=3", "memory.momentum=false", "memory.expansion=3")]


def counted(config, length, *, backward):
    model, tokens = TitansLM(config), torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens, labels=tokens).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


def masked_pairs_flops(config, length):
    """What the portable attention computes beyond the pairs a token sees, and for the wide queries that meet the prefix."""
    if config.variant == "lmm":
        return 0
    persistent, window = config.num_persistent_tokens, config.window
    if config.variant == "mac":
        computed = length * (persistent + 2 * config.segment_len)
        seen = (length // config.segment_len) * sum(persistent + 2 * (i + 1) for i in range(config.segment_len))
    else:
        computed = window * (persistent + window) + (length - window) * (persistent + 2 * window)
        seen = sum(persistent + min(t + 1, window) for t in range(length))
    return config.num_layers * 2 * config.dim * (3 * computed - 2 * seen)


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_formula_is_what_torch_counts(variant, memory):
    config = small_config(variant, *ALIGNED, *memory)
    formula = sum(forward_flops(config, 64).values())
    assert counted(config, 64, backward=False) == formula + masked_pairs_flops(config, 64)


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_the_training_formula_is_what_torch_counts(memory):
    """Within 1.5%: no gradient goes to the zero momentum of the first chunk, nor into the state after the last."""
    config = small_config("lmm", *ALIGNED, *memory)
    formula = sum(training_flops(config, 256).values())
    assert counted(config, 256, backward=True) == pytest.approx(formula, rel=0.015)
    assert flops_per_token(config, 256) == round(formula / 256)


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

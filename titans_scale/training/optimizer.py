"""AdamW over two groups of parameters, with and without weight decay."""

import torch
from torch import nn

from titans_scale.config import OptimizerConfig
from titans_scale.models.plans import decay_groups


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with one fused update for all parameters of a group; the model says which parameters decay."""
    parameters = dict(model.named_parameters())
    decay, no_decay = decay_groups(model)
    assert sorted([*decay, *no_decay]) == sorted(parameters), "decay_groups must name every parameter once"
    groups = [
        {"params": [parameters[name] for name in names], "weight_decay": weight_decay}
        for names, weight_decay in ((decay, config.weight_decay), (no_decay, 0.0))
        if names
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

"""The learning rate as a function of the step: no state, so nothing to save and nothing to get out of step on resume."""

import math

from titans_scale.config import LRSchedulerConfig


def learning_rate_factor(config: LRSchedulerConfig, *, step: int, steps: int) -> float:
    """Factor of the peak learning rate for one optimizer step.

    Args:
        step: the step that is about to be taken, counted from 1.   steps: of the whole run; the last has factor `min_ratio`.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    decay_from = config.warmup_steps
    if config.name == "wsd":
        decay_from = max(decay_from, steps - round(config.decay_ratio * steps))
    if step <= decay_from or decay_from >= steps:
        return 1.0
    progress = min(1.0, (step - decay_from) / (steps - decay_from))
    if config.name == "cosine":
        return config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - (1 - config.min_ratio) * progress

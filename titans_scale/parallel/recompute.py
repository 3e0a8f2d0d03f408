"""Activation checkpointing of a function: what its forward pass keeps for the backward pass, and what is computed again there."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint, create_selective_checkpoint_contexts


def recomputed(forward: Callable[..., Any], keeps: Callable[[OpOverload], bool] | None = None) -> Callable[..., Any]:
    """A function with forward's values and gradients that keeps less in between.

    Args:
        keeps: whether an operator's results are kept. None: the arguments alone are, and everything is computed again.
    """

    # No random number is drawn in a block, so there is no generator to wind back.
    def policy(context: SelectiveCheckpointContext, operator: OpOverload, *arguments: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if keeps is not None and keeps(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    def selectively(*arguments: Any) -> Any:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def wholly(*arguments: Any) -> Any:  # a functools.partial of `checkpoint` would do, but torch.compile passes it over in silence
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return wholly if keeps is None else selectively

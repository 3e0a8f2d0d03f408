"""Which kernels attention runs on, and why: decided from the device, the precision and the head dimension alone."""

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch.utils._triton import has_triton

from titans_scale.models.attention.flash import newest_flash

BackendName = Literal["flash", "flex", "sdpa"]
BackendRequest = Literal["auto", "flash", "flex", "sdpa"]


class Backend(NamedTuple):
    """The kernels chosen, and the reason, for the log."""

    name: BackendName
    reason: str


def choose_backend(requested: BackendRequest, device: torch.device, dtype: torch.dtype, *, head_dim: int) -> Backend:
    """The backend that was asked for, or for auto the fastest that runs: flash, then flex, then sdpa.

    Raises:
        ValueError: what was asked for cannot run here; says why, and what to choose.
    """
    return _choose(requested, device, dtype, head_dim)


# What torch.compiler.assume_constant_result sets; called, it would import the compiler into every process, which takes seconds.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _choose(requested: BackendRequest, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    if device.type == "meta":
        return Backend("sdpa", "shapes only: nothing runs")
    missing = {"flash": _flash_lacks(device, dtype, head_dim), "flex": _flex_lacks(device, dtype, head_dim), "sdpa": None}
    if requested != "auto":
        if (lack := missing[requested]) is not None:
            raise ValueError(f"model.attention_backend {requested} cannot run: {lack}; choose auto, or sdpa, which runs everywhere")
        return Backend(requested, f"as asked for{_version(device) if requested == 'flash' else ''}")
    if missing["flash"] is None:
        return Backend("flash", f"{dtype} on {device.type}{_version(device)}")
    if missing["flex"] is None:
        return Backend("flex", f"no flash: {missing['flash']}")
    return Backend("sdpa", f"no flash: {missing['flash']}; no flex: {missing['flex']}")


def _flash_lacks(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What flash would need and does not have, in words."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the model is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16 (training.dtype), not {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"it needs a head dimension that is a multiple of 8 and at most 256, and model.dim / model.num_heads is {head_dim}"
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no FlashAttention for NVIDIA GPUs; install torch's CUDA build"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or more, and this one has {capability[0]}.{capability[1]}"
    return None


def _flex_lacks(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What flex would need and does not have, in words."""
    if device.type != "cuda":
        return f"its backward pass needs a GPU, and the model is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it needs float32, bfloat16 or float16 (training.dtype), not {dtype}"
    if head_dim < 16:
        return f"it needs a head dimension of at least 16, and model.dim / model.num_heads is {head_dim}"
    if not has_triton():
        return "it needs Triton; install it with pip install triton"
    return None


def _version(device: torch.device) -> str:
    return f", by {newest_flash(torch.cuda.get_device_capability(device))}"

"""The memory layers and scans that are measured: all at one size, as a user would build them.

Size: width 384, 4 heads of 64, a memory MLP of two layers with hidden width 128, float32, a batch of one.
"""

from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_scale.config import MemoryConfig, ModelConfig
from titans_scale.evaluation.benchmarks.measure import Prepare, Step
from titans_scale.memory import NeuralMemory, memory_scan
from titans_scale.memory.write_rule import WriteRule
from titans_scale.models.flops import training_flops

DIM, HEADS, HEAD_DIM, DEPTH, EXPANSION, CHUNK = 384, 4, 64, 2, 2, 64
OURS, PER_TOKEN, PER_CHUNK, AT_START = (
    "titans_scale",
    "titans-pytorch, a gradient per token",
    "titans-pytorch, a gradient per 64 tokens",
    "titans-pytorch, gradients at the initial weights",
)
PEER_CHUNKS: dict[str, tuple[int, int | None]] = {PER_TOKEN: (1, 64), PER_CHUNK: (64, 64), AT_START: (64, None)}
"""chunk_size and batch_size of titans_pytorch.NeuralMemory: tokens that share one gradient and one set of gates; tokens after which
gradients are taken at newer weights (ours: 1 and 64). Without a batch_size they are all taken at the initial weights, which is
another rule: what the memory has learned never enters what it learns."""
RULES: tuple[WriteRule, ...] = get_args(WriteRule)


def layers(*, peers: bool) -> dict[str, Prepare]:
    """By name, forward and backward through a whole memory layer."""
    names = [OURS, *(PEER_CHUNKS if peers else [])]
    return {name: partial(layer_step, name) for name in names}


def layer_step(name: str, tokens: int) -> Step:
    """Ours with the plain write rule, which is the peer's; theirs with the plain MLP as memory, which is ours."""
    torch.manual_seed(0)
    layer = our_layer() if name == OURS else _peer_layer(*PEER_CHUNKS[name])
    x_BTM = torch.randn(1, tokens, DIM, requires_grad=True)
    grad_BTM = torch.randn(1, tokens, DIM)

    def step() -> None:
        layer.zero_grad()
        x_BTM.grad = None
        y_BTM, _ = layer(x_BTM)
        y_BTM.backward(grad_BTM)

    return step


def our_layer() -> NeuralMemory:
    return NeuralMemory(DIM, memory_config())


def memory_config() -> MemoryConfig:
    return MemoryConfig(
        depth=DEPTH,
        expansion=EXPANSION,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        chunk_size=CHUNK,
        write_rule="plain",
        residual_norm=False,
        max_inner_grad_norm=None,
    )


def _peer_layer(chunk_size: int, batch_size: int | None) -> nn.Module:
    from titans_pytorch import MemoryMLP
    from titans_pytorch import NeuralMemory as PeerMemory

    return PeerMemory(
        dim=DIM,
        heads=HEADS,
        dim_head=HEAD_DIM,
        chunk_size=chunk_size,
        batch_size=batch_size,
        model=MemoryMLP(HEAD_DIM, depth=DEPTH, expansion_factor=EXPANSION),
        mem_model_norm_add_residual=False,
    )


def scan_step(rule: WriteRule, tokens: int) -> Step:
    """Forward and backward of `memory_scan` alone, at gates that keep the plain rule stable."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(1, HEADS, tokens, HEAD_DIM), dim=-1) for _ in range(2))
    v, grad_BHTD = torch.randn(1, HEADS, tokens, HEAD_DIM), torch.randn(1, HEADS, tokens, HEAD_DIM)
    theta, eta, alpha = (least + width * torch.rand(1, HEADS, tokens) for least, width in ((1e-3, 1e-3), (0.8, 0.1), (1e-3, 1e-2)))
    weights = list(our_layer().initial_weights)
    leaves: list[Tensor] = [leaf.requires_grad_() for leaf in (q, k, v, theta, eta, alpha, *weights)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        y_BHTD, _ = memory_scan(q, k, v, theta, eta, alpha, weights, chunk_size=CHUNK, write_rule=rule)
        y_BHTD.backward(grad_BHTD)

    return step


def layer_flops(tokens: int) -> int:
    """Of forward and backward through our layer with the plain rule, recomputation not counted."""
    config = ModelConfig(variant="lmm", num_layers=1, dim=DIM, num_persistent_tokens=0, memory=memory_config())
    return training_flops(config, tokens)["memory"]


def scan_flops(tokens: int) -> int:
    """Of its scan alone: what the linear maps around it do not account for."""
    linear = sum(module.weight.numel() for module in our_layer().modules() if isinstance(module, nn.Linear))
    return layer_flops(tokens) - 3 * 2 * tokens * linear

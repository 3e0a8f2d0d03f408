"""The whole models that are measured: ours, titans-pytorch's MAC, and a plain transformer, each with one training step.

All have 4 layers of width 384, 6 attention heads of 64, a vocabulary of 4,096 with a head of its own and MLPs of hidden width 1,024
(the peer's GEGLU has 1,024 too); every memory has 4 heads of 64, two layers, hidden width 128. The transformer gets a wider MLP, up to
the parameters of our MAG: more layers instead would make it slower at long sequences. Loss and optimizer are the same for all.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from titans_scale.config import MemoryConfig, ModelConfig, Variant
from titans_scale.evaluation.benchmarks.measure import Prepare, Step
from titans_scale.evaluation.benchmarks.report import peers_installed
from titans_scale.evaluation.benchmarks.transformer import Transformer
from titans_scale.models import TitansLM
from titans_scale.models.loss import next_token_loss

DIM, LAYERS, HEADS, VOCAB, SEGMENT, PERSISTENT = 384, 4, 6, 4096, 128, 4
MEMORY_HEADS, HEAD_DIM, DEPTH, EXPANSION = 4, 64, 2, 2
MLP_STEP = 16
OURS: dict[str, Variant] = {"MAC": "mac", "MAG": "mag", "MAL": "mal", "LMM": "lmm"}
TRANSFORMER = "transformer"
PEER_FINE, PEER_COARSE = "titans-pytorch MAC, 4 tokens a gradient", "titans-pytorch MAC, 64 tokens a gradient"
PEERS: dict[str, tuple[int, int]] = {PEER_FINE: (4, 128), PEER_COARSE: (64, 64)}
"""neural_memory_segment_len and neural_memory_batch_size: tokens that share one gradient and one set of gates, and tokens after which
gradients are taken at newer weights. The first is what its own training script uses; ours are 1 and 64, at any length."""


def models() -> dict[str, Prepare]:
    """By name, one training step over one sequence; the peer's where it is installed."""
    names = [*OURS, TRANSFORMER, *(PEERS if peers_installed() else [])]
    return {name: partial(training_step, name) for name in names}


def training_step(name: str, tokens: int) -> Step:
    """Forward, backward and an AdamW update, at random tokens."""
    torch.manual_seed(0)
    model, logits = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens_BT = torch.randint(VOCAB, (1, tokens))

    def step() -> None:
        next_token_loss(logits(tokens_BT), tokens_BT).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A model, and the function from tokens (B, T) to its logits (B, T, V)."""
    if name in OURS:
        model = TitansLM(config_of(OURS[name]))
        return model, lambda tokens_BT: model(tokens_BT).logits
    plain = Transformer(_widened(config_of("mag"))) if name == TRANSFORMER else _peer(*PEERS[name])
    return plain, plain


def config_of(variant: Variant) -> ModelConfig:
    """Ours at the size of this page; what is not named is the default, the write rule for one."""
    return ModelConfig(
        variant=variant,
        dim=DIM,
        num_layers=LAYERS,
        num_heads=HEADS,
        vocab_size=VOCAB,
        segment_len=SEGMENT,
        window=SEGMENT,
        num_persistent_tokens=PERSISTENT,
        tie_embeddings=False,
        memory=MemoryConfig(num_heads=MEMORY_HEADS, head_dim=HEAD_DIM, depth=DEPTH, expansion=EXPANSION),
    )


def num_parameters(name: str) -> int:
    with torch.device("meta" if name not in PEERS else "cpu"):  # the peer's constructor computes with its parameters
        return sum(parameter.numel() for parameter in build(name)[0].parameters())


def _widened(config: ModelConfig) -> ModelConfig:
    """With the MLP that gives a transformer as many parameters as our model has, its width a multiple of 16 as products like it."""
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in TitansLM(config).parameters())
        config.mlp_dim = MLP_STEP
        least = sum(parameter.numel() for parameter in Transformer(config).parameters())
    config.mlp_dim = MLP_STEP * (1 + round((wanted - least) / (3 * config.dim * config.num_layers * MLP_STEP)))
    return config


def _peer(segment: int, batch_size: int) -> nn.Module:
    from titans_pytorch import MemoryAsContextTransformer, MemoryMLP

    model = MemoryAsContextTransformer(
        num_tokens=VOCAB,
        dim=DIM,
        depth=LAYERS,
        heads=HEADS,
        dim_head=DIM // HEADS,
        segment_len=SEGMENT,
        num_persist_mem_tokens=PERSISTENT,
        neural_memory_segment_len=segment,
        neural_memory_batch_size=batch_size,
        neural_memory_model=MemoryMLP(HEAD_DIM, depth=DEPTH, expansion_factor=EXPANSION),
        neural_memory_kwargs={"dim_head": HEAD_DIM, "heads": MEMORY_HEADS, "mem_model_norm_add_residual": False},
    )
    for parameter in model.parameters():  # its heads lie in one place of memory, by a stride of 0, where no optimizer can update them
        parameter.data = parameter.data.contiguous()
    return model

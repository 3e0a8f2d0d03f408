"""Small models at random perturbed weights: fresh initialisations hide leaks, as gates and norms start neutral."""

import torch
from torch import Tensor

from titans_scale import TitansLM, load_config
from titans_scale.config import ModelConfig

VARIANTS = ("mac", "mag", "mal", "lmm")
VOCAB = 61


def small_config(variant: str, *overrides: str) -> ModelConfig:
    """Two layers of width 32; segment 12, window 10 and chunk 8 share no common grid."""
    settings = [f"variant={variant}", "dim=32", "num_layers=2", "num_heads=2", f"vocab_size={VOCAB}", "segment_len=12", "window=10"]
    settings += ["num_persistent_tokens=3", "memory.num_heads=2", "memory.chunk_size=8", *overrides]
    return load_config(None, [f"model.{setting}" for setting in settings]).model


def perturbed_model(variant: str, *overrides: str, seed: int = 0, scale: float = 0.2, dtype: torch.dtype = torch.float64) -> TitansLM:
    model = TitansLM(small_config(variant, *overrides)).to(dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * scale)
    return model


def random_tokens(batch_size: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def with_another_token(tokens: Tensor, *, at: int, row: int = 0) -> Tensor:
    changed = tokens.clone()
    changed[row, at] = (changed[row, at] + 1) % VOCAB
    return changed

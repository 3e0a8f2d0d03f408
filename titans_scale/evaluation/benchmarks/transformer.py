"""A plain transformer to measure against: rotary embedding, causal attention over everything, SwiGLU, RMSNorm; and nothing else.

Shape letters: B batch, T tokens, H heads, D head dimension, M model width, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from titans_scale.config import ModelConfig
from titans_scale.models.attention import Attention
from titans_scale.models.layers import SwiGLU, rotate


class Transformer(nn.Module):
    """Built from the parts of our own blocks, so that what is compared is the way tokens are mixed.

    Args:
        config: dim, num_layers, num_heads, mlp_dim, vocab_size, norm_eps and rope_theta are used; the head is not tied.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the next token, (B, T, V)."""
        x_BTM = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTM = block(x_BTM)
        return self.head(self.norm(x_BTM))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rope_theta = config.rope_theta
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_BTM: Tensor) -> Tensor:
        x = self.norm(x_BTM)
        own = self.attention.keys_values(x)
        q_BHTD, k_BHTD = (rotate(heads, start=0, theta=self.rope_theta) for heads in (self.attention.queries(x), own.k))
        x_BTM = x_BTM + self.attention.output(F.scaled_dot_product_attention(q_BHTD, k_BHTD, own.v, is_causal=True))
        return x_BTM + self.mlp(self.mlp_norm(x_BTM))

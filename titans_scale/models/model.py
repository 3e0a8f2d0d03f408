"""TitansLM: the language model around the blocks. Single-device code; sharding happens outside, in titans_scale.parallel.

Shape letters: B batch, T tokens, S a rank's share of the tokens (all of them on one device), M model width, V vocabulary, W a rank's share
of the vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_scale.config import ModelConfig
from titans_scale.memory.layer import Initializer, constant, normal
from titans_scale.memory.state import compact
from titans_scale.models.blocks import BLOCKS, Block
from titans_scale.models.documents import DocumentLayout
from titans_scale.models.generation import generate_tokens
from titans_scale.models.loss import cross_entropy_sum, linear_cross_entropy_sum, next_token_loss
from titans_scale.models.ranks import OneRank, Ranks


class TitansState(NamedTuple):
    """Streaming state of a model: all that the tokens so far have left behind. Its size does not grow with their number."""

    batch_size: int
    layers: list[Any]
    """Each block's own state; None before the first token."""


class TitansOutput(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor
    """(B, T, V)."""
    loss: Tensor | None = None
    """Mean cross-entropy in nats, where labels were given."""
    state: TitansState | None = None
    """The state after the last token, where one was given."""


class Head(nn.Linear):
    """From the final norm's output to logits, or to what a caller makes of that output and the weight, a loss for instance.

    The call is what matters: under `fully_shard` the weight is whole only while the module that owns it is called.
    """

    def forward(self, x_BTM: Tensor, use: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
        return use(x_BTM, self.weight)


class TitansLM(nn.Module):
    """A Titans language model: embedding, blocks of `config.variant`, norm, head.

    May be built under `torch.device("meta")`; then `to_empty` and `init_weights` make it real. Built on a real device, its
    weights are drawn at once, from torch's global seed.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.ranks: Ranks = OneRank()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(BLOCKS[config.variant](config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        # One parameter, not one under two names: `to_empty` and sharding would make two of it.
        self.head = None if config.tie_embeddings else Head(config.dim, config.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            self.init_weights(seed=int(torch.randint(2**31, (), device="cpu").item()))

    def forward(
        self,
        tokens_BT: Tensor,
        state: TitansState | None = None,
        labels: Tensor | None = None,
        document_starts: Tensor | DocumentLayout | None = None,
    ) -> TitansOutput:
        """Logits of the next token at every position.

        Args:
            tokens_BT: token ids, (B, T).
            state: from `init_state` or an earlier output; the tokens continue what it has seen.
            labels: (B, T), usually the tokens themselves: the shift by one happens here, and -100 marks positions without a target.
            document_starts: bool, (B, T), where documents begin in rows that several are packed in: logits are those of each
                document by itself. Or the `DocumentLayout` made of it, which spares a GPU's host the wait for its shape.
        Raises:
            ValueError: no tokens, a state of another batch size, or document starts of another shape or together with a state.
        """
        if tokens_BT.dim() != 2 or tokens_BT.shape[1] == 0:
            raise ValueError(f"tokens have shape {tuple(tokens_BT.shape)}; they must be (batch, tokens) with at least one token")
        if state is not None and state.batch_size != tokens_BT.shape[0]:
            raise ValueError(f"the state is for a batch of {state.batch_size}, the tokens are a batch of {tokens_BT.shape[0]}")
        x_BTM, layers = self._hidden(tokens_BT, state, document_starts)
        logits_BTV = self.ranks.join_words(self._through_head(x_BTM, F.linear), self.config.vocab_size)
        return TitansOutput(
            logits_BTV,
            None if labels is None else next_token_loss(logits_BTV, labels),
            None if state is None else TitansState(state.batch_size, layers),
        )

    def loss_sum(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        *,
        logits_bytes: int | None = None,
        document_starts: Tensor | DocumentLayout | None = None,
    ) -> Tensor:
        """What training minimises: cross-entropy in nats, summed over the positions that have a target.

        Args:
            tokens_BT: token ids, (B, T).   targets_BT: the next token of each, (B, T); -100 where there is none.
            logits_bytes: how much memory a rank's logits may take: a chunk of tokens at a time goes through the head then, see
                `titans_scale.models.loss`. None: all at once.
            document_starts: see `forward`.
        Returns:
            A scalar in float32 (float64 for a float64 model).
        """
        x_BTM, _ = self._hidden(tokens_BT, None, document_starts)

        def loss(x_BTM: Tensor, weight_WM: Tensor) -> Tensor:
            words = self.ranks.words(self.config.vocab_size)
            if logits_bytes is None and not words.group:
                return cross_entropy_sum(F.linear(x_BTM, weight_WM), targets_BT)
            return linear_cross_entropy_sum(x_BTM, weight_WM, targets_BT, logits_bytes=logits_bytes, words=words)

        return self._through_head(x_BTM, loss)

    def _hidden(
        self, tokens_BT: Tensor, state: TitansState | None, document_starts: Tensor | DocumentLayout | None
    ) -> tuple[Tensor, list[Any]]:
        """The final norm's output for all tokens, and the blocks' states where one was given."""
        documents = self._layout(tokens_BT, state, document_starts)
        x_BSM = self.embedding(tokens_BT)
        layers = []
        for layer, block in enumerate(self.blocks):
            x_BSM, layer_state = block(x_BSM, state.layers[layer] if state else None, documents)
            if state is not None:
                layers.append(compact(layer_state))
        return self.ranks.gather(self.norm(x_BSM)), layers

    def _layout(
        self, tokens_BT: Tensor, state: TitansState | None, document_starts: Tensor | DocumentLayout | None
    ) -> DocumentLayout | None:
        if document_starts is None:
            return None
        if state is not None:
            raise ValueError("document_starts came together with a state: a stream goes on with its document; give one or the other")
        shape = (document_starts.number_BT if isinstance(document_starts, DocumentLayout) else document_starts).shape
        if shape != tokens_BT.shape:
            raise ValueError(f"document_starts have shape {tuple(shape)}; they must have that of the tokens, {tuple(tokens_BT.shape)}")
        if isinstance(document_starts, DocumentLayout):
            return document_starts
        return DocumentLayout.of(document_starts, self.config).to(tokens_BT.device)

    def _through_head(self, x_BTM: Tensor, use: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return use(x_BTM, self.embedding.weight) if self.head is None else self.head(x_BTM, use)

    def init_state(self, batch_size: int = 1) -> TitansState:
        """The state before the first token."""
        return TitansState(batch_size, [None] * len(self.blocks))

    def generate(
        self,
        prompt_BT: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_token: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue a prompt; see `titans_scale.models.generation.generate_tokens`. Returns (B, T + new), the prompt included."""
        return generate_tokens(
            self,
            prompt_BT,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop_token=stop_token,
            seed=seed,
        )

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights anew: the same values for the same seed on any device."""
        parameters = dict(self.named_parameters())
        for name, value in self.initial_values(seed):
            parameters[name].copy_(value)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and whole initial value, one at a time, on the CPU in float32.

        Each is drawn by a generator of its own, seeded by (seed, name): the value depends on nothing else, so any sharding of
        the model on any number of ranks can be filled with the same weights.
        """
        rules = self.initializers()
        for name, parameter in self.named_parameters():
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
            yield name, rules[name](parameter.shape, generator)

    def initializers(self) -> dict[str, Initializer]:
        """For every parameter, by its qualified name, how its initial value is made."""
        table = normal(self.config.init_std)
        rules = {"embedding.weight": table, "head.weight": table, "norm.weight": constant(1.0)}
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            rules |= {f"blocks.{layer}.{name}": rule for name, rule in block.initializers().items()}
        return rules

"""What a block asks of the ranks that share it. On one device each of these is nothing; titans_scale.parallel.tensor has the others.

Where several ranks share every layer, what lies between two layers is a rank's share of the tokens, and what lies inside one is a rank's
share of the heads, or of the hidden width, for all tokens.

Shape letters: B batch, T all tokens, S a rank's share of the tokens (consecutive ones; S = T on one device), M model width, V vocabulary, W
a rank's share of the vocabulary.
"""

from typing import NamedTuple, Protocol

from torch import Tensor


class Words(NamedTuple):
    """A rank's share of the vocabulary."""

    first: int
    most: int
    """As many words each rank has; the last ones perhaps fewer."""
    group: str
    """The name of the process group whose ranks have the others; "": there are none."""


class Ranks(Protocol):
    """The ranks that share every layer, as seen by one of them.

    Gradients: of what all ranks hold or compute alike, each rank has a part, and the parts add up to the true one.
    """

    def gather(self, x_BSM: Tensor) -> Tensor:
        """All tokens (B, T, M), from every rank's share of them."""

    def scatter_sum(self, x_BTM: Tensor) -> Tensor:
        """This rank's share (B, S, M) of the sum of what the ranks have made of all tokens."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what the ranks have made, alike on all of them."""

    def own_tokens(self, x_BTM: Tensor) -> Tensor:
        """This rank's share (B, S, M) of what all ranks hold alike."""

    def join_words(self, logits_BTW: Tensor, vocab_size: int) -> Tensor:
        """Logits of all words (B, T, V), from every rank's share of them. Differentiated, it passes on the gradient of the rank's share."""

    def words(self, vocab_size: int) -> Words:
        """This rank's share of the vocabulary."""


class OneRank:
    """A rank that shares its layers with no other: see `Ranks`."""

    def gather(self, x_BTM: Tensor) -> Tensor:
        return x_BTM

    def scatter_sum(self, x_BTM: Tensor) -> Tensor:
        return x_BTM

    def sum(self, x: Tensor) -> Tensor:
        return x

    def own_tokens(self, x_BTM: Tensor) -> Tensor:
        return x_BTM

    def join_words(self, logits_BTV: Tensor, vocab_size: int) -> Tensor:
        return logits_BTV

    def words(self, vocab_size: int) -> Words:
        return Words(0, vocab_size, "")

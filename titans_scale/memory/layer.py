"""NeuralMemory: the memory as a sequence layer, with projections, convolutions, gates, output norm and state.

Source: Titans (arXiv 2501.00663), sections 3.1 and 4.4.

Shape letters: B batch, T tokens, M model width, I inner width = H * D, H memory heads, D head dimension, K convolution kernel.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from titans_scale.config import MemoryConfig
from titans_scale.memory.around import gated_norm, short_convolution
from titans_scale.memory.mlp import ResidualNorm, memory_mlp
from titans_scale.memory.scan import memory_scan
from titans_scale.memory.state import ScanState, initial_weights

Initializer = Callable[[torch.Size, Generator], Tensor]
SLOWEST_FORGETTING, FASTEST_FORGETTING = 1e-4, 1e-2
"""Heads start with forgetting rates spread between these (half-lives of 7,000 to 70 tokens): some must reach past a training sequence."""
INITIAL_MOMENTUM = 0.9
INITIAL_STEP_SHARE = 0.2
"""theta starts at this share of max_step: small steps first, while keys and values are still noise to the memory."""


class MemoryState(NamedTuple):
    """State of one NeuralMemory between two calls."""

    q_tail_BKI: Tensor
    """The last K - 1 projected queries, which the convolution still needs; likewise below."""
    k_tail_BKI: Tensor
    v_tail_BKI: Tensor
    scan: ScanState


class Gates(NamedTuple):
    """Per token and head, (B, H, T) each, float32 or wider."""

    theta: Tensor
    eta: Tensor
    alpha: Tensor


class NeuralMemory(nn.Module):
    """A long-term memory that is trained while it reads: y_t = M_t(q_t), M_t having just been written with (k_t, v_t).

    Args:
        dim: width of the inputs and outputs.   config: see `MemoryConfig`.
        init_std: standard deviation of the projections' initial weights.   num_layers: of the model; scales the output projection's.
    """

    def __init__(self, dim: int, config: MemoryConfig | None = None, *, init_std: float = 0.02, num_layers: int = 1) -> None:
        super().__init__()
        self.config = config = config or MemoryConfig()
        if config.head_dim is None and dim % config.num_heads:
            raise ValueError(f"dim {dim} does not divide by num_heads {config.num_heads}; choose another, or set head_dim")
        self.head_dim = config.head_dim or dim // config.num_heads
        self.init_std, self.num_layers = init_std, num_layers
        inner = config.num_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        if config.conv_kernel:
            self.q_conv = nn.Parameter(torch.empty(inner, config.conv_kernel))
            self.k_conv = nn.Parameter(torch.empty(inner, config.conv_kernel))
            self.v_conv = nn.Parameter(torch.empty(inner, config.conv_kernel))
        self.theta_proj = nn.Linear(dim, config.num_heads)
        self.eta_proj = nn.Linear(dim, config.num_heads) if config.momentum else None
        self.alpha_proj = nn.Linear(dim, config.num_heads) if config.forgetting else None
        hidden = self.head_dim * config.expansion
        widths = [self.head_dim, *[hidden] * (config.depth - 1), self.head_dim]
        self.initial_weights = nn.ParameterList(torch.empty(config.num_heads, out, into) for into, out in pairwise(widths))
        if config.residual_norm:
            self.memory_scale = nn.Parameter(torch.empty(config.num_heads, self.head_dim))
            self.memory_shift = nn.Parameter(torch.empty(config.num_heads, self.head_dim))
        self.out_norm = nn.Parameter(torch.empty(inner))
        self.out_gate = nn.Linear(dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.group, self._part, self._parts = "", 0, 1
        if not self.q_proj.weight.is_meta:
            self.reset_parameters()

    def split_hidden(self, group: str, rank: int, size: int) -> None:
        """From now on this layer holds one part of its memories' hidden width, and the group's other ranks the rest.

        It has rank's rows of initial_weights[0] and columns of initial_weights[1] and out_proj.weight; all else is whole and alike on all
        ranks. What `forward` and `retrieve` return is then this rank's part of a sum over ranks, a state its part of the memories.

        Args:
            group: name of the process group.   rank: this one's place in it.   size: ranks in it.
        Raises:
            ValueError: a memory of another depth than 2, or a width that does not divide.
        """
        inner, hidden = self.config.num_heads * self.head_dim, self.config.expansion * self.head_dim
        if self.config.depth != 2:
            raise ValueError(f"a memory of depth {self.config.depth} has no one hidden width to split; set model.memory.depth to 2")
        if inner % size or hidden % size:
            raise ValueError(f"neither may leave a rest over {size} ranks: hidden width {hidden}, num_heads * head_dim {inner}; change one")
        self.group, self._part, self._parts = group, rank, size

    def forward(self, x_BTM: Tensor, state: MemoryState | None = None, resets: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        """Write all tokens and read at each of them. Any cut with the state handed on equals one pass.

        Args:
            x_BTM: (B, T, dim).   state: from an earlier call; None: the learned initial memory.
            resets: chunks that begin at the learned initial memory again, (B, chunks), see `memory_scan`. The convolutions do not
                know of them: at least K - 1 tokens of zeros have to lie before such a chunk.
        Returns:
            (B, T, dim) and the state after the last token.
        """
        q, q_tail = self.queries(x_BTM, state.q_tail_BKI if state else None)
        k, k_tail = self.keys(x_BTM, state.k_tail_BKI if state else None)
        v, v_tail = self.values(x_BTM, state.v_tail_BKI if state else None)
        y, scan = self.scan(q, k, v, self.gates(x_BTM), state.scan if state else None, resets)
        return self._output(y, x_BTM), MemoryState(q_tail, k_tail, v_tail, scan)

    def queries(self, x_BTM: Tensor, tail_BKI: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, D) of unit norm, and the tail that the next call's convolution needs."""
        return self._heads(self.q_proj(x_BTM), "q_conv", tail_BKI, unit=True)

    def keys(self, x_BTM: Tensor, tail_BKI: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys (B, H, T, D) of unit norm, and the convolution's tail."""
        return self._heads(self.k_proj(x_BTM), "k_conv", tail_BKI, unit=True)

    def values(self, x_BTM: Tensor, tail_BKI: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values (B, H, T, D), and the convolution's tail."""
        return self._heads(self.v_proj(x_BTM), "v_conv", tail_BKI, unit=False)

    def scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        state: ScanState | None,
        resets: Tensor | None = None,
        *,
        passes: int | None = None,
    ) -> tuple[Tensor, ScanState]:
        """`memory_scan` with this layer's initial weights and options, or with another number of passes."""
        config = self.config
        return memory_scan(
            q,
            k,
            v,
            *gates,
            list(self.initial_weights),
            state,
            config.chunk_size,
            config.activation,
            config.backend,
            write_rule=config.write_rule,
            norm=self.residual_norm(),
            max_inner_grad_norm=config.max_inner_grad_norm,
            passes=passes or config.passes,
            curvature_margin=config.curvature_margin,
            state_interval=config.state_interval,
            resets=resets,
            group=self.group,
        )

    def read(self, q_BHTD: Tensor, weights: list[Tensor]) -> Tensor:
        """M(q_t) of a memory that stands still: the same weights (B, H, out, in) for all T tokens."""
        return memory_mlp(q_BHTD.to(weights[0].dtype), weights, self.config.activation, self.residual_norm(), self.group)

    def retrieve(self, q_BHTD: Tensor, weights: list[Tensor], x_BTM: Tensor) -> Tensor:
        """The layer's output for such a read (equation 15), (B, T, dim).

        Args:
            q_BHTD: from `queries`.   weights: `state.scan.weights` of some moment, or `fresh_weights`.
            x_BTM: the tokens, for the output gate.
        """
        return self._output(self.read(q_BHTD, weights), x_BTM)

    def fresh_weights(self, batch_size: int) -> list[Tensor]:
        """The learned initial memory, (B, H, out, in) a layer, in the precision of the scan."""
        first = self.initial_weights[0]
        return initial_weights(list(self.initial_weights), batch_size, torch.promote_types(first.dtype, torch.float32))

    def gates(self, x_BTM: Tensor) -> Gates:
        """theta in (0, max_step), eta and alpha in (0, 1); eta and alpha are 0 where the option is off.

        For the online rule theta has the factor 1 - eta, so that max_step bounds what a write comes to with all that momentum makes of
        it; `normalized` has that factor in the rule.
        """

        def gate(projection: nn.Linear) -> Tensor:
            logits = projection(x_BTM).mT
            return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))  # 1 - alpha needs the digits

        share = gate(self.theta_proj)
        eta = torch.zeros_like(share) if self.eta_proj is None else gate(self.eta_proj)
        alpha = torch.zeros_like(share) if self.alpha_proj is None else gate(self.alpha_proj)
        max_step = self.config.max_step * (1 - eta) if self.config.write_rule == "online" else self.config.max_step
        return Gates(max_step * share, eta, alpha)

    def _heads(self, x_BTI: Tensor, conv: str, tail_BKI: Tensor | None, *, unit: bool) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution and SiLU, then (B, H, T, D). The paper's 'SiLU on the q, k, v' and its convolutions."""
        kernel = self.config.conv_kernel
        weight_IK = getattr(self, conv) if kernel else None
        tail = x_BTI.new_zeros(x_BTI.shape[0], max(kernel - 1, 0), x_BTI.shape[2]) if tail_BKI is None else tail_BKI
        y = short_convolution(x_BTI, weight_IK, tail, x_BTI.shape[2] // self.head_dim, unit=unit)
        recent = x_BTI[:, max(0, x_BTI.shape[1] - tail.shape[1]) :] if kernel > 1 else x_BTI[:, :0]
        return y, torch.cat((tail[:, recent.shape[1] :], recent), dim=1)

    def _output(self, y_BHTD: Tensor, x_BTM: Tensor) -> Tensor:
        """Norm per head, gate from the tokens, output projection (section 4.4)."""
        out_BTI = gated_norm(y_BHTD, self.out_norm, self.out_gate(x_BTM))
        return self.out_proj(out_BTI.chunk(self._parts, dim=-1)[self._part])

    def residual_norm(self) -> ResidualNorm | None:
        return ResidualNorm(self.memory_scale, self.memory_shift) if self.config.residual_norm else None

    def reset_parameters(self) -> None:
        """Fresh values from torch's global generator."""
        generator = torch.Generator("cpu").manual_seed(int(torch.randint(2**31, (), device="cpu").item()))
        rules = self.initializers()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(rules[name](parameter.shape, generator))

    def initializers(self) -> dict[str, Initializer]:
        """For every parameter, by its name in this module, how its initial value is made."""
        heads = self.config.num_heads
        kernel = max(1, self.config.conv_kernel)
        spread = torch.linspace(math.log(SLOWEST_FORGETTING), math.log(FASTEST_FORGETTING), heads + 2, device="cpu")[1:-1].exp()
        projection, output = normal(self.init_std), normal(self.init_std / math.sqrt(2 * self.num_layers))
        rules = {f"{name}.weight": projection for name in ("q_proj", "k_proj", "v_proj", "out_gate")}
        rules |= {f"{name}.weight": projection for name in ("theta_proj", "eta_proj", "alpha_proj")}
        rules |= {"out_proj.weight": output, "out_norm": constant(1.0), "memory_scale": constant(1.0), "memory_shift": constant(0.0)}
        rules |= {f"{name}_conv": normal(1 / math.sqrt(kernel)) for name in ("q", "k", "v")}
        rules |= {
            "theta_proj.bias": constant(_logit(INITIAL_STEP_SHARE)),
            "eta_proj.bias": constant(_logit(INITIAL_MOMENTUM)),
            "alpha_proj.bias": lambda shape, generator: torch.logit(spread),
        }
        rules |= {f"initial_weights.{i}": normal(1 / math.sqrt(w.shape[-1])) for i, w in enumerate(self.initial_weights)}
        return rules


def normal(std: float) -> Initializer:
    return lambda shape, generator: torch.randn(shape, generator=generator, device="cpu") * std


def constant(value: float) -> Initializer:
    return lambda shape, generator: torch.full(shape, value, device="cpu")


def _logit(p: float) -> float:
    return math.log(p / (1 - p))

"""The memory as a function: an MLP per head, its forward pass, and its gradients by the analytic chain rule.

Shape letters: B batch, H memory heads, T tokens (of a chunk, or any number), D head dimension, I/O a layer's input and output width.
Weights are lists of (B, H, O, I), no bias, the activation between the layers.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu"]
LAYER_NORM_EPS = 1e-6


class ResidualNorm(NamedTuple):
    """M(x) = x + LayerNorm(MLP(x)): scale and shift of the LayerNorm, (H, D) each. Learned outside, never written to."""

    scale_HD: Tensor
    shift_HD: Tensor


class Surprise(NamedTuple):
    """Per-token gradients of |M(k) - v|^2, never materialised: that of layer l is the outer product delta_l (x) feature_l."""

    features: list[Tensor]
    """Input of each layer, (B, H, T, I)."""
    deltas: list[Tensor]
    """Gradient at the output of each layer, (B, H, T, O)."""
    error_BHTD: Tensor
    """2 (M(k) - v)."""

    def squared_norm(self) -> Tensor:
        """|g_t|^2 of every token over all layers, (B, H, T)."""
        pairs = zip(self.features, self.deltas, strict=True)
        return torch.stack([h.square().sum(-1) * delta.square().sum(-1) for h, delta in pairs]).sum(0)

    def gram(self) -> Tensor:
        """<g_t, g_s> of every pair of tokens over all layers, (B, H, T, T)."""
        pairs = zip(self.features, self.deltas, strict=True)
        return torch.stack([(h @ h.mT) * (delta @ delta.mT) for h, delta in pairs]).sum(0)

    def scaled(self, factor_BHT: Tensor) -> "Surprise":
        """Every token's gradient times its factor."""
        return self._replace(deltas=[factor_BHT.unsqueeze(-1) * delta for delta in self.deltas])


def activate(z: Tensor, activation: Activation) -> Tensor:
    return F.silu(z) if activation == "silu" else F.gelu(z)


def activation_derivative(z: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z.square()) * math.sqrt(0.5 / math.pi)


def memory_mlp(x_BHTD: Tensor, weights: list[Tensor], activation: Activation, norm: ResidualNorm | None = None) -> Tensor:
    """M(x): a read of the memory, with the same weights for all T tokens."""
    x = x_BHTD
    for layer, weight in enumerate(weights):
        x = (activate(x, activation) if layer else x) @ weight.mT
    return output_of(x_BHTD, x, norm)


def output_of(x_BHTD: Tensor, z_BHTD: Tensor, norm: ResidualNorm | None) -> Tensor:
    """The memory's output from its input and its last layer's."""
    if norm is None:
        return z_BHTD
    normed, _ = _layer_norm(z_BHTD)
    return x_BHTD + normed * norm.scale_HD.unsqueeze(1) + norm.shift_HD.unsqueeze(1)


def surprise(k_BHTD: Tensor, v_BHTD: Tensor, weights: list[Tensor], activation: Activation, norm: ResidualNorm | None) -> Surprise:
    """Gradients of |M(k_t) - v_t|^2 of every token, all taken at the same weights."""
    features, slopes = [k_BHTD], []
    z = k_BHTD @ weights[0].mT
    for weight in weights[1:]:
        features.append(activate(z, activation))
        slopes.append(activation_derivative(z, activation))
        z = features[-1] @ weight.mT
    error = 2 * (output_of(k_BHTD, z, norm) - v_BHTD)
    deltas = [error if norm is None else _layer_norm_backward(z, error * norm.scale_HD.unsqueeze(1))]
    for weight, slope in zip(reversed(weights[1:]), reversed(slopes), strict=True):
        deltas.insert(0, (deltas[0] @ weight) * slope)
    return Surprise(features, deltas, error)


def _layer_norm(z: Tensor) -> tuple[Tensor, Tensor]:
    centered = z - z.mean(-1, keepdim=True)
    inverse_std = torch.rsqrt(centered.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
    return centered * inverse_std, inverse_std


def _layer_norm_backward(z: Tensor, grad: Tensor) -> Tensor:
    normed, inverse_std = _layer_norm(z)
    return inverse_std * (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True))

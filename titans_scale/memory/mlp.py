"""The memory as a function: an MLP per head, its forward pass, its gradients by the analytic chain rule, and the gradients of those.

Shape letters: ... any leading dimensions that the weights share or broadcast to (batch and heads), T tokens (of a chunk, or any number),
D head dimension, I/O a layer's input and output width. Weights are lists of (..., O, I), no bias, the activation between the layers.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_scale.memory.ranks import differentiable_sum_over, sum_over

Activation = Literal["silu", "gelu"]
LAYER_NORM_EPS = 1e-6


class ResidualNorm(NamedTuple):
    """M(x) = x + LayerNorm(MLP(x)): scale and shift of the LayerNorm, (H, D) each. Learned outside, never written to."""

    scale_HD: Tensor
    shift_HD: Tensor


class Surprise(NamedTuple):
    """Per-token gradients of |M(k) - v|^2, never materialised: that of layer l is the outer product delta_l (x) feature_l."""

    features: list[Tensor]
    """Input of each layer, (..., T, I)."""
    deltas: list[Tensor]
    """Gradient at the output of each layer, (..., T, O)."""
    error_BHTD: Tensor
    """2 (M(k) - v)."""
    group: str
    """Over which the hidden width is split; "": it is whole. Of each layer's feature and delta then one is whole, so that what a rank finds
    of the two results below is its part of a sum."""

    def squared_norm(self) -> Tensor:
        """|g_t|^2 of every token over all layers, (..., T)."""
        return sum_over(self.own_squared_norm(), self.group)

    def own_squared_norm(self) -> Tensor:
        """What this rank's weights have in `squared_norm`."""
        pairs = zip(self.features, self.deltas, strict=True)
        return torch.stack([squared_length(feature) * squared_length(delta) for feature, delta in pairs]).sum(0)

    def gram(self) -> Tensor:
        """<g_t, g_s> of every pair of tokens over all layers, (..., T, T)."""
        pairs = zip(self.features, self.deltas, strict=True)
        return sum_over(torch.stack([(h @ h.mT) * (delta @ delta.mT) for h, delta in pairs]).sum(0), self.group)

    def scaled(self, factor_BHT: Tensor) -> "Surprise":
        """Every token's gradient times its factor."""
        return self._replace(deltas=[factor_BHT.unsqueeze(-1) * delta for delta in self.deltas])


class Activated(NamedTuple):
    """act(z) and act'(z), with what act''(z) needs."""

    value: Tensor
    slope: Tensor
    aside: Tensor
    """silu: sigmoid(z). gelu: z."""
    activation: Activation

    def curvature(self) -> Tensor:
        """act''(z)."""
        if self.activation == "silu":
            return torch.addcmul(self.slope, self.aside, 1 - 2 * self.slope)
        return torch.exp(-0.5 * self.aside.square()) * math.sqrt(0.5 / math.pi) * (2 - self.aside.square())


class SurpriseTape(NamedTuple):
    """What `surprise_vjp` needs beyond the result."""

    hidden: list[Activated]
    """Of the layers between the first and the last, in order."""
    unsloped: list[Tensor]
    """Their deltas before the slope: deltas[l + 1] @ weights[l + 1]."""
    z: Tensor
    """Output of the last layer, before the residual and the norm."""


def squared_length(x: Tensor) -> Tensor:
    """|x_t|^2 of every token, (..., T). That of an outer product is the product of its factors'."""
    return x.square().sum(-1)


def activate(z: Tensor, activation: Activation) -> Tensor:
    return F.silu(z) if activation == "silu" else F.gelu(z)


def activate_with_slope(z: Tensor, activation: Activation) -> Activated:
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        value = z * sigmoid
        return Activated(value, torch.addcmul(sigmoid, sigmoid, z - value), sigmoid, activation)
    normal_cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    slope = normal_cdf + z * torch.exp(-0.5 * z.square()) * math.sqrt(0.5 / math.pi)
    return Activated(z * normal_cdf, slope, z, activation)


def memory_mlp(x_BHTD: Tensor, weights: list[Tensor], activation: Activation, norm: ResidualNorm | None = None, group: str = "") -> Tensor:
    """M(x): a read of the memory, with the same weights for all T tokens."""
    x = x_BHTD
    for layer, weight in enumerate(weights):
        x = (activate(x, activation) if layer else x) @ weight.mT
    return output_of(x_BHTD, differentiable_sum_over(x, group), norm)


def output_of(x_BHTD: Tensor, z_BHTD: Tensor, norm: ResidualNorm | None) -> Tensor:
    """The memory's output from its input and its last layer's."""
    if norm is None:
        return z_BHTD
    normed, _ = _layer_norm(z_BHTD)
    return x_BHTD + normed * norm.scale_HD.unsqueeze(-2) + norm.shift_HD.unsqueeze(-2)


def output_vjp(grad: Tensor, z: Tensor, norm: ResidualNorm, grad_norm: ResidualNorm) -> Tensor:
    """Gradient of `output_of` in z (that in x is `grad` itself), those of scale and shift added to `grad_norm`."""
    normed, _ = _layer_norm(z)
    grad_norm.scale_HD.add_(_sum_to(grad * normed, grad_norm.scale_HD))
    grad_norm.shift_HD.add_(_sum_to(grad, grad_norm.shift_HD))
    return layer_norm_vjp(z, grad * norm.scale_HD.unsqueeze(-2))


def surprise(
    k_BHTD: Tensor, v_BHTD: Tensor, weights: list[Tensor], activation: Activation, norm: ResidualNorm | None, group: str = ""
) -> tuple[Surprise, SurpriseTape]:
    """Gradients of |M(k_t) - v_t|^2 of every token, all taken at the same weights."""
    features, hidden = [k_BHTD], []
    unsloped: list[Tensor] = []
    z = k_BHTD @ weights[0].mT
    for weight in weights[1:]:
        hidden.append(activate_with_slope(z, activation))
        features.append(hidden[-1].value)
        z = features[-1] @ weight.mT
    z = sum_over(z, group)
    error, delta = error_and_delta(k_BHTD, v_BHTD, z, norm)
    deltas = [delta]
    for weight, activated in zip(reversed(weights[1:]), reversed(hidden), strict=True):
        unsloped.insert(0, deltas[0] @ weight)
        deltas.insert(0, unsloped[0] * activated.slope)
    return Surprise(features, deltas, error, group), SurpriseTape(hidden, unsloped, z)


def error_and_delta(k_BHTD: Tensor, v_BHTD: Tensor, z_BHTD: Tensor, norm: ResidualNorm | None) -> tuple[Tensor, Tensor]:
    """2 (M(k) - v), and the gradient of |M(k) - v|^2 at the last layer's output z."""
    error = 2 * (output_of(k_BHTD, z_BHTD, norm) - v_BHTD)
    return error, error if norm is None else layer_norm_vjp(z_BHTD, error * norm.scale_HD.unsqueeze(-2))


def error_and_delta_vjp(
    grad_delta: Tensor,
    error: Tensor,
    z: Tensor,
    norm: ResidualNorm | None,
    grad_norm: ResidualNorm | None,
    grad_k: Tensor,
    grad_v: Tensor,
) -> Tensor:
    """Gradient of `error_and_delta`'s delta in z; those in k, v and the norm are added to what is given."""
    if norm is None or grad_norm is None:
        grad_z = 2 * grad_delta
        grad_v.sub_(grad_z)
        return grad_z
    scale = norm.scale_HD.unsqueeze(-2)
    grad_z, grad_scaled_error = _layer_norm_vjp_vjp(grad_delta, z, error * scale)
    grad_norm.scale_HD.add_(_sum_to(grad_scaled_error * error, grad_norm.scale_HD))
    grad_output = 2 * scale * grad_scaled_error
    grad_k.add_(grad_output)
    grad_v.sub_(grad_output)
    return grad_z + output_vjp(grad_output, z, norm, grad_norm)


def surprise_vjp(
    grad_features: list[Tensor],
    grad_deltas: list[Tensor],
    made: Surprise,
    tape: SurpriseTape,
    weights: list[Tensor],
    norm: ResidualNorm | None,
    grad_weights: list[Tensor],
    grad_norm: ResidualNorm | None,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Gradients of `surprise`, added to those given.

    Args:
        grad_features, grad_deltas: of the result, (M, T, ...); overwritten.   weights, grad_weights: (M, O, I).
    """
    last = len(weights) - 1
    grad_slopes = []
    for layer in range(last):  # the chain of deltas ran from the last layer down
        grad_slopes.append(grad_deltas[layer] * tape.unsloped[layer])
        grad_unsloped = grad_deltas[layer].mul_(tape.hidden[layer].slope)
        grad_deltas[layer + 1].baddbmm_(grad_unsloped, weights[layer + 1].mT)
        grad_weights[layer + 1].baddbmm_(made.deltas[layer + 1].mT, grad_unsloped)
    grad_z = error_and_delta_vjp(grad_deltas[last], made.error_BHTD, tape.z, norm, grad_norm, grad_k, grad_v)
    grad_z = sum_over(grad_z, made.group)
    for layer in range(last, 0, -1):
        grad_weights[layer].baddbmm_(grad_z.mT, made.features[layer])
        grad_value = grad_features[layer].baddbmm_(grad_z, weights[layer])
        activated = tape.hidden[layer - 1]
        grad_z = torch.addcmul(grad_value.mul_(activated.slope), grad_slopes[layer - 1], activated.curvature())
    grad_weights[0].baddbmm_(grad_z.mT, made.features[0])
    grad_k.add_(grad_features[0].baddbmm_(grad_z, weights[0]))


def _sum_to(x: Tensor, like_MD: Tensor) -> Tensor:
    """Sum over tokens, and over the leading dimensions that `like` has not."""
    return x.sum(-2).reshape(-1, *like_MD.shape).sum(0)


def _layer_norm(z: Tensor) -> tuple[Tensor, Tensor]:
    centered = z - z.mean(-1, keepdim=True)
    inverse_std = torch.rsqrt(centered.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
    return centered * inverse_std, inverse_std


def layer_norm_vjp(z: Tensor, grad: Tensor) -> Tensor:
    """Gradient of LayerNorm(z), without scale and shift, in z."""
    normed, inverse_std = _layer_norm(z)
    return inverse_std * (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True))


def _layer_norm_vjp_vjp(grad_result: Tensor, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `layer_norm_vjp` in z and in grad.

    It is inverse_std * P grad with the symmetric P = I - 11'/D - nn'/D, n the normed z, so that in grad is the same map again.
    In z: through n and through inverse_std, both functions of the centered z.
    """
    width = z.shape[-1]
    normed, inverse_std = _layer_norm(z)
    along, grad_along = (x.mul(normed).sum(-1, keepdim=True) for x in (grad, grad_result))
    in_grad = layer_norm_vjp(z, grad_result)
    in_normed = -(inverse_std / width) * (along * grad_result + grad_along * grad)
    in_inverse_std = (in_grad * grad).sum(-1, keepdim=True) / inverse_std + (in_normed * normed).sum(-1, keepdim=True) / inverse_std
    in_centered = inverse_std * in_normed - in_inverse_std * inverse_std.square() * normed / width
    return in_centered - in_centered.mean(-1, keepdim=True), in_grad

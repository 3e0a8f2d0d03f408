"""What a chunk does to the memory and what its tokens read, as matrix products, with their vector-Jacobian products by hand.

Weights W and momentum S of a layer stand on top of each other in one matrix, (M, 2O, I): the products with both are one product.

Shape letters: M memories (batch times heads; for reads also times chunks), C tokens of a chunk, I/O a layer's input and output width.
"""

import torch
from torch import Tensor

from titans_scale.memory.coefficients import ChunkCoefficients
from titans_scale.memory.mlp import Activation, ResidualNorm, Surprise, activate, activate_with_slope, output_of, output_vjp
from titans_scale.memory.ranks import sum_over


def read(
    q_MCD: Tensor,
    states: list[Tensor],
    features: list[Tensor],
    deltas: list[Tensor],
    chunk: ChunkCoefficients,
    activation: Activation,
    norm: ResidualNorm | None,
    group: str,
) -> tuple[Tensor, list[Tensor]]:
    """y_t = M_t(q_t), and the output of every layer before its activation.

    Each layer is a product with the state at the chunk's start plus one masked product with the writes, as in linear attention.
    """
    x = q_MCD
    outputs: list[Tensor] = []
    for layer, (state, feature, delta) in enumerate(zip(states, features, deltas, strict=True)):
        if layer:
            x = activate(outputs[-1], activation)
        outputs.append(layer_at_each_token(x, state, feature, delta, chunk))
    outputs[-1] = sum_over(outputs[-1], group)
    return output_of(q_MCD, outputs[-1], norm), outputs


def read_vjp(
    grad_y: Tensor,
    q_MCD: Tensor,
    outputs: list[Tensor],
    states: list[Tensor],
    features: list[Tensor],
    deltas: list[Tensor],
    chunk: ChunkCoefficients,
    activation: Activation,
    norm: ResidualNorm | None,
    group: str,
    grad_chunk: ChunkCoefficients,
    grad_norm: ResidualNorm | None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of `read` in q, the states, the features and the deltas; that in the coefficients is added to `grad_chunk`.

    Args:
        outputs: of the layers, from `read`; the last is looked at only where there is a norm.
    """
    grad_z = grad_y if norm is None or grad_norm is None else output_vjp(grad_y, outputs[-1], norm, grad_norm)
    grad_z = sum_over(grad_z, group)
    grad_states: list[Tensor] = []
    grad_features: list[Tensor] = []
    grad_deltas: list[Tensor] = []
    for layer in range(len(states) - 1, -1, -1):
        activated = activate_with_slope(outputs[layer - 1], activation) if layer else None
        x = activated.value if activated else q_MCD
        grad_x, grad_state, grad_feature, grad_delta = layer_at_each_token_vjp(
            grad_z, x, states[layer], features[layer], deltas[layer], chunk, grad_chunk
        )
        grad_states.insert(0, grad_state)
        grad_features.insert(0, grad_feature)
        grad_deltas.insert(0, grad_delta)
        grad_z = grad_x.mul_(activated.slope) if activated else grad_x
    return grad_z if norm is None else grad_z.add_(grad_y), grad_states, grad_features, grad_deltas


def layer_at_each_token(x_MCI: Tensor, state: Tensor, feature: Tensor, delta: Tensor, chunk: ChunkCoefficients) -> Tensor:
    """x_t through the layer's weights as they stand at token t: start W x + carry S x - sum_i write_ti (x . feature_i) delta_i."""
    z, _ = through_state(x_MCI, state, chunk)
    return z.baddbmm_(torch.bmm(x_MCI, feature.mT).mul_(chunk.write_CC), delta, alpha=-1)


def through_state(x_MCI: Tensor, state: Tensor, chunk: ChunkCoefficients) -> tuple[Tensor, Tensor]:
    """start W x + carry S x, and the products with weights and momentum side by side, (M, C, 2O)."""
    both = torch.bmm(x_MCI, state.mT)
    from_weights, from_momentum = both.chunk(2, dim=-1)
    return (from_weights * chunk.start_C.unsqueeze(-1)).addcmul_(from_momentum, chunk.carry_C.unsqueeze(-1)), both


def side_by_side(x_MCO: Tensor, pair_MC2: Tensor) -> Tensor:
    """x times the first and x times the second of each token's pair, (M, C, 2O)."""
    return (x_MCO.unsqueeze(-2) * pair_MC2.unsqueeze(-1)).flatten(-2)


def layer_at_each_token_vjp(
    grad_z: Tensor, x_MCI: Tensor, state: Tensor, feature: Tensor, delta: Tensor, chunk: ChunkCoefficients, grad_chunk: ChunkCoefficients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in x, state, feature and delta; those in the coefficients are added to `grad_chunk`."""
    start, carry = chunk.start_C.unsqueeze(-1), chunk.carry_C.unsqueeze(-1)
    alike = torch.bmm(x_MCI, feature.mT)
    grad_pair = torch.bmm(grad_z, delta.mT)
    grad_chunk.write_CC.addcmul_(grad_pair, alike, value=-1)
    grad_alike = grad_pair.mul_(chunk.write_CC)
    grad_delta = torch.bmm(alike.mul_(chunk.write_CC).mT, grad_z).neg_()
    grad_feature = torch.bmm(grad_alike.mT, x_MCI).neg_()
    weights, momentum = state.chunk(2, dim=-2)
    through_weights, through_momentum = torch.bmm(grad_z, weights), torch.bmm(grad_z, momentum)
    grad_chunk.start_C.add_((through_weights * x_MCI).sum(-1))
    grad_chunk.carry_C.add_((through_momentum * x_MCI).sum(-1))
    grad_x = through_weights.mul_(start).addcmul_(through_momentum, carry).baddbmm_(grad_alike, feature, alpha=-1)
    grad_state = torch.bmm(side_by_side(grad_z, torch.stack((chunk.start_C, chunk.carry_C), dim=-1)).mT, x_MCI)
    return grad_x, grad_state, grad_feature, grad_delta


def advance(states: list[Tensor], written: Surprise, chunk: ChunkCoefficients, out: list[Tensor]) -> None:
    """Weights and momentum after the chunk's last token, into `out`."""
    for state, after, feature, delta in zip(states, out, written.features, written.deltas, strict=True):
        torch.bmm(chunk.decay_22, _as_pair(state), out=_as_pair(after))
        after.baddbmm_(side_by_side(delta, chunk.into_C2).mT, feature, alpha=-1)


def advance_vjp(
    grad_after: list[Tensor],
    states: list[Tensor],
    written: Surprise,
    chunk: ChunkCoefficients,
    grad_states: list[Tensor],
    grad_features: list[Tensor],
    grad_deltas: list[Tensor],
    grad_chunk: ChunkCoefficients,
) -> None:
    """Adds the gradients of `advance` to those given."""
    into_weights, into_momentum = chunk.into_C2.unsqueeze(-2).unbind(-1)
    for layer, grad in enumerate(grad_after):
        _as_pair(grad_states[layer]).baddbmm_(chunk.decay_22.mT, _as_pair(grad))
        grad_chunk.decay_22.baddbmm_(_as_pair(grad), _as_pair(states[layer]).mT)
        grad_left = torch.bmm(written.features[layer], grad.mT).unflatten(-1, (2, -1))
        to_weights, to_momentum = grad_left.unbind(-2)
        grad_deltas[layer].addcmul_(to_weights, into_weights, value=-1).addcmul_(to_momentum, into_momentum, value=-1)
        grad_chunk.into_C2.sub_((grad_left * written.deltas[layer].unsqueeze(-2)).sum(-1))
        grad_features[layer].baddbmm_(side_by_side(written.deltas[layer], chunk.into_C2), grad, alpha=-1)


def _as_pair(state: Tensor) -> Tensor:
    """(M, 2O, I) as (M, 2, O * I): the weights and the momentum, a row each."""
    return state.view(state.shape[0], 2, -1)

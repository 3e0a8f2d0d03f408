"""Tensor parallelism: ranks that share every layer, each with a part of its heads, hidden units or words, for all tokens.

Which parameter is split how is the model's own plan (`titans_scale.models.plans.tensor_split`); each becomes a DTensor over the ranks,
split or held alike, under its old name and with its whole shape, and the model's code meets this rank's part of it.

| where | what a rank has |
|---|---|
| between two layers (residual stream, norms, gates, residual sums) | T / ranks consecutive tokens, of the model's width |
| attention | its heads: rows of q, k, v, columns of out_proj |
| MLP | its hidden units: rows of gate and up, columns of down |
| memory by heads | its heads: everything up to the columns of out_proj; the scan exchanges nothing |
| memory by hidden width | its hidden units of every head, columns of out_proj; all else alike; the scan adds up over ranks at each chunk |
| embedding, head, logits, loss | its words: ceil(vocabulary / ranks), the last rank perhaps fewer |
| norms, persistent tokens | all; what every rank needs is computed alike: persistent tokens, what mac recalls and what it writes |

A layer gathers its tokens and scatters its sum, and the other way round in the backward pass: a block has two gathers and two scatters,
mag one scatter more, mal one more of both and a sum for the persistent tokens, mac two sums more for every segment. Gradients of what is
held alike are each rank's part, added up before the optimizer. In bfloat16 training all this is exchanged and added up in bfloat16, as far
as the backend does so; gradients of several micro-batches, and what the loss needs to know of other words, in float32. The order of sums
over ranks is the backend's: results agree with one rank's to rounding, not to the bit.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from titans_scale.memory.ranks import differentiable_sum_over
from titans_scale.models import TitansLM
from titans_scale.models.blocks import Block
from titans_scale.models.plans import MemorySplit, tensor_split
from titans_scale.models.ranks import Words
from titans_scale.parallel.collectives import all_gather_tokens, gathered, reduce_scatter_tokens


class TensorRanks:
    """The ranks of a mesh that share every layer: see `titans_scale.models.ranks.Ranks`."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group: str = mesh.get_group().group_name
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def gather(self, x_BSM: Tensor) -> Tensor:
        return all_gather_tokens(x_BSM, self.group, self.size)

    def scatter_sum(self, x_BTM: Tensor) -> Tensor:
        return reduce_scatter_tokens(x_BTM, self.group, self.size)

    def sum(self, x: Tensor) -> Tensor:
        return differentiable_sum_over(x, self.group) if x.numel() else x

    def own_tokens(self, x_BTM: Tensor) -> Tensor:
        return x_BTM.chunk(self.size, dim=1)[self.rank]

    def join_words(self, logits_BTW: Tensor, vocab_size: int) -> Tensor:
        padded = F.pad(logits_BTW.detach(), (0, self.words(vocab_size).most - logits_BTW.shape[-1]))
        shares = list(gathered(padded, self.group, self.size).chunk(self.size))
        shares[self.rank] = logits_BTW  # through which the gradient goes
        return torch.cat(shares, dim=-1)[..., :vocab_size]

    def words(self, vocab_size: int) -> Words:
        most = -(-vocab_size // self.size)  # as DTensors are split
        return Words(self.rank * most, most, self.group)


def tensor_parallel(model: TitansLM, mesh: DeviceMesh, *, memory_split: MemorySplit) -> TitansLM:
    """Split a model in place over the ranks of a one-dimensional mesh; parameters keep the values they have, if any.

    Its parameters' gradients are DTensors after this. Those of what all ranks hold alike are parts of a sum (`Partial`), which
    `fully_shard` adds up, or `DTensor.full_tensor`.
    """
    # Of the gradients' norm, which takes a sum over each dimension of a mesh: a number each, once a step.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    ranks = TensorRanks(mesh)
    split_parameters(model, mesh, tensor_split(model, memory_split))
    model.ranks = ranks
    for block in model.blocks:
        assert isinstance(block, Block)
        block.ranks = ranks
        if memory_split == "hidden":
            block.memory.split_hidden(ranks.group, ranks.rank, ranks.size)
    embedding: nn.Module = model.embedding
    embedding.forward = word_lookup(model.embedding, ranks)
    return model


def split_parameters(model: nn.Module, mesh: DeviceMesh, dimensions: dict[str, int | None]) -> None:
    """Each parameter as a DTensor, split in its dimension (None: held alike), and as this rank's part of it wherever the code reads it."""
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(prefix=path, recurse=False)):
            dimension = dimensions[name]
            placement: Placement = Replicate() if dimension is None else Shard(dimension)
            whole = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            module.register_parameter(name.rpartition(".")[2], nn.Parameter(whole))
        if module._parameters:
            kind: type[nn.Module] = type(module)
            # mypy takes the modules' __hash__ for that of their class.
            module.__class__ = _reading_local_parts(kind, tuple(module._parameters))  # type: ignore[arg-type]


@cache  # one class for all modules of a kind: torch.compile takes another class for another module
def _reading_local_parts(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose parameters are DTensors to all that asks for its parameters, and local tensors to the code that computes."""
    return type(kind.__name__, (kind,), {name: property(_local_part_of(name)) for name in names})


def _local_part_of(name: str) -> Callable[[nn.Module], Tensor | None]:
    def local_part(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        # While `fully_shard` has it in its own, larger mesh, nobody computes with it, and `fully_shard` itself asks for it here.
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:
            return parameter
        (placement,) = parameter.placements
        return parameter.to_local(grad_placements=[Partial()] if placement.is_replicate() else [placement])

    return local_part


def word_lookup(embedding: nn.Embedding, ranks: TensorRanks) -> Callable[[Tensor], Tensor]:
    """In place of `embedding.forward`: each rank looks up its own words, the sum over ranks is every word, a rank gets its tokens of it."""

    def forward(tokens_BT: Tensor) -> Tensor:
        if tokens_BT.shape[1] % ranks.size:
            raise ValueError(
                f"{tokens_BT.shape[1]} tokens do not divide by the {ranks.size} ranks of parallelism.tensor_parallel; cut or pad them"
            )
        weight_WM = embedding.weight
        own_BT = tokens_BT - ranks.words(embedding.num_embeddings).first
        is_own_BT = (own_BT >= 0) & (own_BT < weight_WM.shape[0])
        x_BTM = F.embedding(own_BT.where(is_own_BT, 0), weight_WM).masked_fill(~is_own_BT[..., None], 0)
        return ranks.scatter_sum(x_BTM)

    return forward

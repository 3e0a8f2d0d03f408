"""Long sequences over several ranks: each has some consecutive tokens of every sequence, and every layer's state goes from rank to rank.

Any cut of a sequence with the state handed on equals one pass, in every block, and the state is differentiable. So each block takes its
state from the rank with the tokens before and hands its own on to the rank with the tokens behind, and in the backward pass the
state's gradients come back the same way. Ranks work as a wavefront over layers: one is at layer l while the next is at l - 1, and of
a pass over L layers R ranks wait about (R - 1) / (L + R - 1). Micro-batches go one after the other, forward and backward.

`fully_shard` over the same ranks holds the wavefront back where it waits for all of them at one layer: in the forward pass unless
parallelism.prefetch is R - 1 or more, in the backward pass by the gradients' reductions, of which a GPU has a few under way, and gloo one,
so that on CPUs ranks do their backward passes one after the other.

What is handed on does not depend on the number of tokens. In a layer, for a batch of B in activations of e bytes:
    weights and momentum of H memory heads    8 B H (parameters of a head's memory)
    the open chunk, R tokens, R < chunk_size  4 B H R (2 D + 3)
    tails of the convolutions, kernel K       3 B (K - 1) H D e, and for mac a fourth for its own queries
    mag, mal: window and P persistent tokens  2 B M (window - 1 + P) e, of the window as many tokens as there are
    mac, inside a chunk: the weights          4 B H (parameters of a head's memory)
That is the neighbour's keys and values where a window reaches back no further, and those of ranks before it where it does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from titans_scale.memory.state import ScanState
from titans_scale.models import TitansLM
from titans_scale.models.blocks import Block

ALIGNMENT = 16
"""Of every tensor in a message: what compiled kernels expect of the memory that they read."""


def hand_states_on(model: TitansLM, group: dist.ProcessGroup) -> None:
    """Join a model's blocks to those of the ranks that share its sequences.

    In place of `forward`: around what recomputes or compiles it, so that nothing is sent twice, and inside the hooks of `fully_shard`,
    which gathers parameters before the wait for a state.

    Args:
        group: these ranks, in the order of their tokens; every rank gives its blocks as many.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        block.forward = handed_on(block, block.forward, Link(group))  # type: ignore[method-assign]


def handed_on(block: Block, forward: Callable[..., Any], link: "Link") -> Callable[..., Any]:
    """A block's forward pass that goes on from the state of the rank before, and returns the tokens alone: the state is with the next."""

    def forward_between_ranks(x_BTM: Tensor, state: None = None, documents: None = None) -> tuple[Tensor, None]:
        assert state is None and documents is None, "the state of a context-parallel block comes from the rank before"
        link.settle()
        x_BTM, before = link.from_before(x_BTM, start_of_sequence_parameters(block))
        x_BTM, after = forward(x_BTM, before, None)
        return link.to_next(x_BTM, after), None

    return forward_between_ranks


def start_of_sequence_parameters(block: Block) -> list[Tensor]:
    """What a block may use at the start of a sequence alone. Elsewhere it still needs a gradient, of zero: a rank that had none for it
    would reduce fewer gradients than the others.
    """
    return [*([block.persistent] if block.config.num_persistent_tokens else []), *block.memory.initial_weights]


class Link:
    """What joins one block to the same block of the ranks with the tokens before and behind."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.last = dist.get_rank(group), dist.get_world_size(group) - 1
        self._known: dict[tuple[Any, ...], Layout] = {}
        self._told: set[tuple[Any, ...]] = set()
        self._on_the_way: list[tuple[dist.Work | None, Tensor]] = []

    def from_before(self, x_BTM: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The tokens, and the state that they go on from; None on the first rank."""
        if self.rank == 0:
            return x_BTM, None
        if (kind := _kind(x_BTM)) not in self._known:
            told: list[Any] = [None]
            dist.recv_object_list(told, group_src=self.rank - 1, group=self.group, device=x_BTM.device)
            self._known[kind] = told[0]
        layout = self._known[kind]
        x_BTM, *tensors = _FromBefore.apply(self, layout, x_BTM, *parameters)
        return x_BTM, layout.state_of(tensors)

    def to_next(self, x_BTM: Tensor, state: Any) -> Tensor:
        """The tokens again; through them the state's gradients will come back. The last rank has nobody to hand it to."""
        if self.rank == self.last:
            return x_BTM
        layout, tensors = Layout.of(what_is_read(state) if torch.is_grad_enabled() else state)
        if (kind := _kind(x_BTM)) not in self._told:
            dist.send_object_list([layout], group_dst=self.rank + 1, group=self.group, device=x_BTM.device)
            self._told.add(kind)
        return _ToNext.apply(self, layout, x_BTM, *tensors)

    def send(self, tensors: Sequence[Tensor], layout: "Layout", to: int) -> None:
        """Without waiting. The message has to live until it has arrived, see `settle`."""
        message = layout.pack(tensors)
        self._on_the_way.append((dist.isend(message, group_dst=to, group=self.group), message))

    def receive(self, layout: "Layout", sender: int, device: torch.device) -> list[Tensor]:
        """Wait for a message; on a GPU the stream does, not the host."""
        message = torch.empty(layout.size, dtype=torch.uint8, device=device)
        dist.recv(message, group_src=sender, group=self.group)
        return layout.unpack(message)

    def settle(self) -> None:
        """Let go of what the block sent in its last pass. Nobody waits here: its neighbours have long gone on with that."""
        for work, _ in self._on_the_way:
            if work is not None:
                work.wait()
        self._on_the_way = []


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies in a message."""

    number: int
    """Of the tensors that travel."""
    begin: int
    """In bytes."""
    shape: torch.Size
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.begin + self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a state becomes one message, and its gradients another. Tensors over the same memory travel once."""

    template: Any
    """The state with a `Place` for each tensor."""
    places: list[Place]
    size: int
    """In bytes."""

    @classmethod
    def of(cls, state: Any) -> tuple["Layout", list[Tensor]]:
        """The layout of a state, and the tensors that travel."""
        places: dict[tuple[Any, ...], Place] = {}
        tensors: list[Tensor] = []
        size = 0

        def place(x: Tensor) -> Place:
            nonlocal size
            memory = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype)
            if memory not in places:
                places[memory] = Place(number=len(tensors), begin=size, shape=x.shape, dtype=x.dtype)
                tensors.append(x)
                size = -(-places[memory].end // ALIGNMENT) * ALIGNMENT
            return places[memory]

        template = tree_map_only(Tensor, place, state)
        return cls(template=template, places=list(places.values()), size=size), tensors

    def state_of(self, tensors: Sequence[Tensor]) -> Any:
        """A state of this layout with these tensors in it."""
        return tree_map_only(Place, lambda place: tensors[place.number], self.template)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """One message of bytes."""
        message = torch.empty(self.size, dtype=torch.uint8, device=tensors[0].device)
        for inside, x in zip(self.unpack(message), tensors, strict=True):
            inside.copy_(x)
        return message

    def unpack(self, message: Tensor) -> list[Tensor]:
        """The tensors, as views of the message."""
        return [message[place.begin : place.end].view(place.dtype).view(place.shape) for place in self.places]


def what_is_read(state: Any) -> Any:
    """A state without what no block reads of it: a scan goes on from the start of its open chunk. (`MemoryProbe` reads the rest.)"""

    def goes_on(scan: ScanState) -> ScanState:
        return scan._replace(weights=scan.chunk_weights, momentum=scan.chunk_momentum)

    return tree_map_only(ScanState, goes_on, state, is_leaf=lambda part: isinstance(part, ScanState))


def _kind(x_BTM: Tensor) -> tuple[Any, ...]:
    """What a state's layout depends on, alike for neighbours, whose tokens are as many."""
    return x_BTM.shape, x_BTM.dtype, torch.is_grad_enabled()


class _FromBefore(torch.autograd.Function):
    """The tokens go through it too. So its gradients leave when the block's backward pass is done, and the neighbours' messages have the
    same order whatever autograd makes of a graph: layer by layer, in either direction.
    """

    @staticmethod
    def forward(ctx: Any, link: Link, layout: Layout, x_BTM: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.link, ctx.layout = link, layout
        ctx.save_for_backward(*parameters)
        return x_BTM, *link.receive(layout, link.rank - 1, x_BTM.device)

    @staticmethod
    def backward(ctx: Any, grad_BTM: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.link.send(grads, ctx.layout, ctx.link.rank - 1)
        return None, None, grad_BTM, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class _ToNext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, layout: Layout, x_BTM: Tensor, *tensors: Tensor) -> Tensor:
        ctx.link, ctx.layout = link, layout
        link.send(tensors, layout, link.rank + 1)
        return x_BTM

    @staticmethod
    def backward(ctx: Any, grad_BTM: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, grad_BTM, *ctx.link.receive(ctx.layout, ctx.link.rank + 1, grad_BTM.device)

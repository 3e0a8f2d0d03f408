"""What a piece of training takes, operator by operator: bytes alive by what they are for, their peak, and the collectives issued.

A dispatch mode, so it sees whatever runs, forward and backward, on real tensors or on tensors without memory. Storages are followed by
weak references: what is freed is subtracted when it is freed. (torch has trackers of its own, `torch.distributed._tools`; they do not see
inside operators like our scan, whose working memory is as large as what it keeps.)
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from titans_scale.parallel.planning.traffic import Dimensions, Traffic, collective_of

ACTIVATIONS = "activations"
"""Whatever has no other name: what autograd keeps, gradients on their way, temporary results."""
GATHERED = "gathered parameters"
WHOLE_GRADIENTS = "gradients before reduction"
GRADIENTS = "gradients"
WORKSPACE = "inside operators"
"""What an operator of ours takes while it runs, its results included."""
KINDS = (GRADIENTS, GATHERED, WHOLE_GRADIENTS, ACTIVATIONS, WORKSPACE)

Inside = dict[Any, tuple[int, Traffic]]
"""Of an operator with tensors of certain shapes: bytes it takes, and collectives."""
KERNELS = ("titans_scale::attention", "titans_scale::attention_group_backward")
"""Operators of ours that on a GPU are a few kernels with next to no memory of their own."""


class Meter(TorchDispatchMode):
    """Counts what is allocated and sent while it is entered, which may be several times.

    Args:
        dimension_of: names the mesh dimension of a collective.
        inside: what was found inside operators by an earlier meter of the same mesh; this one adds to it.
        closed: of an operator of ours, by its name, whether it is taken as it is and not looked into.
    """

    def __init__(
        self,
        dimension_of: Dimensions = lambda group, kind: "all ranks",
        *,
        inside: Inside | None = None,
        closed: Callable[[str], bool] = KERNELS.__contains__,
    ) -> None:
        super().__init__()
        self.live = dict.fromkeys(KINDS, 0)
        """Bytes alive now that were allocated here."""
        self.peak = dict(self.live)
        """Those of the moment when they were most."""
        self.traffic = Traffic()
        """Collectives since it was last put in place by whoever reads it."""
        self._dimension_of, self._closed = dimension_of, closed
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._inside: Inside = {} if inside is None else inside

    def __enter__(self) -> "Meter":
        self._resize, meter = torch.UntypedStorage.resize_, self

        def resize_(storage: Any, size: int) -> Any:
            result = meter._resize(storage, size)
            meter._follow(storage, None)  # FSDP2 frees and refills what it gathers into, and no operator says so
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to its local tensors comes by, operator by operator
        kwargs = kwargs or {}
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        if func.namespace == "titans_scale" and not self._closed(func._schema.name):
            self._look_inside(func, args)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._follow(storage, ACTIVATIONS)
        if func.namespace == "fsdp":
            self._name_buffers(func._schema.name, args, kwargs, result)
        elif (collective := collective_of(func, args, kwargs, result, self._dimension_of)) is not None:
            self.traffic.add(collective)
        return result

    def call_the_rest(self, kind: str) -> None:
        """What is alive and has no name is called so from here on: after a backward pass has freed the activations, its gradients."""
        for key, (reference, known, size) in list(self._known.items()):
            if known == ACTIVATIONS:
                self._known[key] = (reference, kind, size)
                self.live[known] -= size
                self.live[kind] += size

    def _follow(self, storage: torch.UntypedStorage, kind: str | None) -> None:
        """A storage is there, or has another size or name. Kind None: the one it has; of a storage from before the meter, nothing."""
        key, size = storage._cdata, storage.nbytes()
        reference, known, known_size = self._known.get(key, (None, None, 0))
        kind = kind or known
        if kind is None:
            return
        if known is not None:
            self.live[known] -= known_size
        self.live[kind] += size
        self._known[key] = (reference or weakref.ref(storage, partial(_forget, weakref.ref(self), key)), kind, size)
        self._note(self.live)

    def _name_buffers(self, operator: str, args: Any, kwargs: Any, result: Any) -> None:
        """FSDP2's own operators tell what their buffers are for."""
        if "all_gather_copy_in" in operator:
            named, kind = result, GATHERED
        elif "split_with_sizes_copy" in operator:
            named, kind = kwargs["out"], GATHERED
        else:
            assert "chunk_cat" in operator, f"FSDP2 has an operator {operator} that is not known here; say what its buffers are for"
            named, kind = kwargs["out"], WHOLE_GRADIENTS
        for tensor in _tensors(named):
            self._follow(tensor.untyped_storage(), kind)

    def _look_inside(self, func: Any, args: Any) -> None:
        """An operator of ours stands for many: those are run without memory, once for each set of shapes, and what they take is counted."""
        key = (func, tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in tree_leaves(args)))
        if key not in self._inside:
            meter = Meter(self._dimension_of, inside=self._inside, closed=self._closed)
            with unset_fake_temporarily(), torch.no_grad():
                given = tree_map_only(Tensor, _without_memory, args)
                with meter:
                    OPDEFS[func._schema.name]._init_fn(*given)
            self._inside[key] = (sum(meter.peak.values()), meter.traffic)
        taken, traffic = self._inside[key]
        self.traffic.add_all(traffic)
        self._note(self.live | {WORKSPACE: taken})

    def _note(self, live: dict[str, int]) -> None:
        if sum(live.values()) > sum(self.peak.values()):
            self.peak = dict(live)


def _forget(meter: "weakref.ref[Meter]", key: int, _: Any) -> None:
    if (alive := meter()) is not None and (known := alive._known.pop(key, None)) is not None:
        alive.live[known[1]] -= known[2]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

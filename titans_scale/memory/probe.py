"""A look into the memories of a model while it runs, without a word about it in the model's code."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from titans_scale.memory.layer import Gates, MemoryState, NeuralMemory
from titans_scale.memory.mlp import surprise
from titans_scale.memory.ranks import sum_over


class MemoryProbe:
    """Context in which every call of a NeuralMemory is measured; `metrics` averages over layers, heads, tokens and calls.

    Costs about four more scans a layer, so it is for a forward pass now and then, not for every step. Where ranks share memories
    (`NeuralMemory.split_hidden`) all of them measure together.
    """

    def __init__(self, model: nn.Module) -> None:
        self._memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
        self._records: list[dict[str, Tensor]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "MemoryProbe":
        self._handles = [memory.register_forward_hook(self._measure) for memory in self._memories]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def metrics(self) -> dict[str, float]:
        """inner_loss_before, inner_loss_after: |M(k_t) - v_t|^2 per head with the memory as token t found and as it left it;
        surprise_norm: norm of the gradient of the last chunk's tokens; theta, eta, alpha: means; state_norm: norm of a head's weights;
        pass_residual (online rule): how much one pass more would change the reads, relative to their norm.
        """
        if not self._records:
            return {}
        return {key: torch.stack([record[key] for record in self._records]).mean().item() for key in self._records[0]}

    @torch.no_grad()
    def _measure(self, memory: NeuralMemory, inputs: tuple[Any, ...], output: tuple[Tensor, MemoryState]) -> None:
        x = inputs[0]
        state: MemoryState | None = inputs[1] if len(inputs) > 1 else None
        scan = state.scan if state else None
        k, _ = memory.keys(x, state.k_tail_BKI if state else None)
        v, _ = memory.values(x, state.v_tail_BKI if state else None)
        gates = memory.gates(x)

        at_first = scan.weights if scan else memory.fresh_weights(x.shape[0])
        read_next, _ = memory.scan(torch.roll(k, -1, dims=2), k, v, gates, scan)  # M_t(k_{t+1}): what the next token finds
        before = torch.cat((memory.read(k[:, :, :1], at_first).to(v.dtype), read_next[:, :, :-1]), dim=2)
        after, _ = memory.scan(k, k, v, gates, scan)

        tail = max(0, x.shape[1] - memory.config.chunk_size)
        at_tail = at_first
        if tail:
            early = Gates(*(gate[:, :, :tail] for gate in gates))
            at_tail = memory.scan(k[:, :, :tail], k[:, :, :tail], v[:, :, :tail], early, scan)[1].weights
        wide_k, wide_v = k[:, :, tail:].to(at_tail[0].dtype), v[:, :, tail:].to(at_tail[0].dtype)
        last, _ = surprise(wide_k, wide_v, at_tail, memory.config.activation, memory.residual_norm(), memory.group)
        own_square = torch.stack([w.square().sum((-1, -2)) for w in output[1].scan.weights]).sum(0)
        record = {
            "inner_loss_before": (before - v).square().sum(-1).mean(),
            "inner_loss_after": (after - v).square().sum(-1).mean(),
            "surprise_norm": last.squared_norm().sqrt().mean(),
            "theta_mean": gates.theta.mean(),
            "eta_mean": gates.eta.mean(),
            "alpha_mean": gates.alpha.mean(),
            "state_norm": sum_over(own_square, memory.group).sqrt().mean(),
        }
        if memory.config.write_rule == "online":
            once_more, _ = memory.scan(k, k, v, gates, scan, passes=memory.config.passes + 1)
            record["pass_residual"] = (once_more - after).norm() / after.norm().clamp(min=torch.finfo(after.dtype).tiny)
        self._records.append(record)

"""A small byte model, trained on the sources of Python's standard library, with a look into its memories on the way.

Shape letters: B batch, T tokens.
"""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from titans_scale.config import MemoryConfig, ModelConfig, OptimizerConfig
from titans_scale.data.text.sources import standard_library
from titans_scale.memory import MemoryProbe, NeuralMemory
from titans_scale.models.model import TitansLM
from titans_scale.parallel.fsdp2 import set_learning_rate
from titans_scale.training.optimizer import build_optimizer

BYTES = 256
VALIDATION_EVERY = 20
"""Every 20th file is held out."""

LOOKED_AT = ("inner_loss", "relative_inner_loss", "state_norm")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run, but for the model."""

    steps: int
    batch_size: int
    length: int
    """Tokens of a sequence."""
    lr: float = 3e-3
    seed: int = 0
    look_interval: int = 20
    """Steps between two looks into the memories."""


@dataclass(kw_only=True)
class Run:
    """What a training run did."""

    model: TitansLM
    losses: list[float] = field(default_factory=list)
    """Of every step that was finite, nats per byte."""
    grad_norms: list[float] = field(default_factory=list)
    """Likewise, before clipping."""
    looks: list[dict[str, float]] = field(default_factory=list)
    """`look` after every look_interval steps, with "step"."""
    seconds_per_step: float = math.nan
    """CPU time."""
    stopped: str | None = None
    """Why it ended early; None: it did not."""

    def summary(self) -> dict[str, Any]:
        """The run in numbers; train_loss is over the last tenth, maxima are over all steps, or all looks. None: not one was finite."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return {
            "steps": len(self.losses),
            "stopped": self.stopped,
            "train_loss": fmean(tail) if tail else None,
            "grad_norm_max": max(self.grad_norms, default=None),
            **{f"{key}_max": max((look[key] for look in self.looks), default=None) for key in LOOKED_AT},
            "cpu_seconds_per_step": self.seconds_per_step,
        }


class Text:
    """The standard library's bytes: files in a fixed shuffled order, every 20th held out."""

    def __init__(self) -> None:
        texts = [document.text.encode() for document in standard_library()]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        self.held_out = _joined([texts[i] for number, i in enumerate(order) if number % VALIDATION_EVERY == 0])
        self.train = _joined([texts[i] for number, i in enumerate(order) if number % VALIDATION_EVERY])

    def batch(self, recipe: Recipe, step: int) -> Tensor:
        """The tokens (B, T) of a step: the same for every model."""
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - recipe.length, (recipe.batch_size,), generator=generator)
        return torch.stack([self.train[start : start + recipe.length] for start in starts]).long()

    def validation(self, sequences: int, length: int) -> Tensor:
        """Held-out tokens (sequences, length), spread over all of them."""
        starts = torch.linspace(0, len(self.held_out) - length, sequences).long()
        return torch.stack([self.held_out[start : start + length] for start in starts]).long()


def _joined(texts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\0".join(texts)), dtype=torch.uint8)


def byte_model(memory: MemoryConfig, *, dim: int, num_layers: int) -> ModelConfig:
    """An LMM: no attention, so that whatever is further back than the convolution comes through the memory."""
    return ModelConfig(variant="lmm", dim=dim, num_layers=num_layers, vocab_size=BYTES, memory=memory)


def train(config: ModelConfig, text: Text, recipe: Recipe) -> Run:
    """AdamW, a warm-up of 5% of the steps, then a cosine to a tenth; the gradient clipped to norm 1. Stops at what is not finite."""
    model = TitansLM(config)
    model.init_weights(recipe.seed)
    optimizer = build_optimizer(model, OptimizerConfig(lr=recipe.lr))
    held_out = text.validation(recipe.batch_size, recipe.length)
    run = Run(model=model)
    started = time.process_time()
    looking = 0.0
    for step in range(recipe.steps):
        set_learning_rate(optimizer, recipe.lr * _schedule(step, recipe.steps))
        tokens = text.batch(recipe, step)
        loss = model(tokens, labels=tokens).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (loss + grad_norm).isfinite():
            run.stopped = f"{'gradient' if loss.isfinite() else 'loss'} not finite at step {step + 1}"
            break
        run.losses.append(loss.item())
        run.grad_norms.append(grad_norm.item())
        optimizer.step()
        if step == 0 or (step + 1) % recipe.look_interval == 0:
            before = time.process_time()
            run.looks.append({"step": float(step + 1), **look(model, held_out)})
            looking += time.process_time() - before
    run.seconds_per_step = (time.process_time() - started - looking) / max(1, len(run.losses))
    return run


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def look(model: TitansLM, tokens_BT: Tensor) -> dict[str, float]:
    """Means over the memories: the inner loss that a token finds, that over the mean of |v|^2, the values' norm, the state's norm."""
    value_norms: list[Tensor] = []

    def measure(memory: NeuralMemory, inputs: tuple[Tensor, ...], output: object) -> None:
        values, _ = memory.values(inputs[0])
        value_norms.append(values.float().square().sum(-1).mean())

    handles = [module.register_forward_hook(measure) for module in model.modules() if isinstance(module, NeuralMemory)]
    with MemoryProbe(model) as probe:
        model(tokens_BT)
    for handle in handles:
        handle.remove()
    metrics = probe.metrics()
    square = torch.stack(value_norms).mean().item()
    return {
        "inner_loss": metrics["inner_loss_before"],
        "relative_inner_loss": metrics["inner_loss_before"] / square,
        "value_norm": math.sqrt(square),
        "state_norm": metrics["state_norm"],
        "theta": metrics["theta_mean"],
        "eta": metrics["eta_mean"],
    }


@torch.no_grad()
def loss_with(model: TitansLM, tokens_BT: Tensor, memory: MemoryConfig, *, at_once: int = 8) -> float:
    """Mean loss in nats per byte of the same weights with other options of the memory: another chunk size, more passes."""
    other = TitansLM(dataclasses.replace(model.config, memory=memory))
    other.load_state_dict(model.state_dict())
    losses = [other(tokens, labels=tokens).loss * len(tokens) for tokens in tokens_BT.split(at_once)]
    return torch.stack(losses).sum().item() / len(tokens_BT)

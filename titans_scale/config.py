"""The typed configuration of a run: one dataclass a section, YAML files with dotted overrides on top.

This is the lowest floor of the package: it imports nothing of ours, and no torch, so that `--help` answers at once.
"""

import dataclasses
import difflib
import json
import math
import re
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

Variant = Literal["mac", "mag", "mal", "lmm"]


class ConfigError(ValueError):
    """A configuration that cannot work, told in one sentence."""


@dataclass(kw_only=True)
class MemoryConfig:
    """The neural long-term memory of one layer (Titans, section 3)."""

    depth: int = 2
    """Layers of the memory MLP. 1 is a linear memory; the paper's 'deep memory' is 2 or more."""
    expansion: int = 2
    """Hidden width of the memory MLP as a multiple of the head dimension. Unused at depth 1."""
    num_heads: int = 4
    """Independent memories of a layer, each with its own weights, momentum and gates."""
    head_dim: int | None = None
    """Width of one head's keys, queries and values. null: model.dim / model.memory.num_heads."""
    chunk_size: int = 64
    """Tokens written together. Larger is faster; with write_rule plain and normalized also coarser, as their gradients are all taken at
    the weights of the chunk's start (section 3.2)."""
    activation: Literal["silu", "gelu"] = "silu"
    """Non-linearity between the layers of the memory MLP."""
    momentum: bool = True
    """Carry past surprise (eta). false: eta is 0 everywhere."""
    forgetting: bool = True
    """Decay the weights (alpha). false: alpha is 0 everywhere."""
    conv_kernel: int = 4
    """Length of the causal depthwise convolution after the q, k and v projections. 0: no convolution."""
    residual_norm: bool = False
    """Memory as x + LayerNorm(MLP(x)), the form of MIRAS and TTT, in place of the plain MLP."""
    write_rule: Literal["plain", "normalized", "online"] = "online"
    """How theta and the surprise become a step. online: every surprise at the weights one token earlier, whatever chunk_size is.
    normalized: at the chunk's start, bounded by the chunk's own curvature. plain: the paper's rule, can blow up (docs/stability.md)."""
    passes: int = 1
    """Passes over a chunk (online). More come closer to the token-by-token rule; chunk_size of them are exact. One does in training."""
    curvature_margin: float | None = 4.0
    """How far a token's step stays below what its own curvature bears (online). null: no bound."""
    max_step: float = 0.1
    """Upper bound of theta; theta is max_step * sigmoid(a linear function of the token), times 1 - eta with online and normalized. A deep
    memory at larger steps stays finite but turns chaotic: gradients through thousands of tokens then explode (docs/stability.md)."""
    max_inner_grad_norm: float | None = 1.0
    """Clip each token's surprise (the gradient of its inner loss) to this norm: nothing else bounds the values. null: no clip."""
    state_interval: int | None = None
    """Chunks between two states kept for the backward pass, which runs those between again. null: about the square root of half
    the number of chunks, four at least, so that memory grows with the root of the length. 1: keep the state of every chunk."""
    backend: Literal["auto", "torch"] = "auto"
    """Implementation of the scan. auto: the fastest one that runs here."""

    def __post_init__(self) -> None:
        _require(self.depth >= 1, f"model.memory.depth is {self.depth}; a memory needs at least one layer (1 = linear memory)")
        _require(self.expansion >= 1, f"model.memory.expansion is {self.expansion}; it must be at least 1")
        _require(self.num_heads >= 1, f"model.memory.num_heads is {self.num_heads}; it must be at least 1")
        _require(self.chunk_size >= 1, f"model.memory.chunk_size is {self.chunk_size}; it must be at least 1 (1 = the online rule)")
        _require(self.conv_kernel >= 0, f"model.memory.conv_kernel is {self.conv_kernel}; it must be 0 (off) or more")
        _require(self.max_step > 0, f"model.memory.max_step is {self.max_step}; it must be positive, or the memory never learns")
        clip = self.max_inner_grad_norm
        _require(clip is None or clip > 0, f"model.memory.max_inner_grad_norm is {clip}; it must be positive, or null for no clip")
        _require(self.passes >= 1, f"model.memory.passes is {self.passes}; the online rule needs at least one")
        margin = self.curvature_margin
        _require(margin is None or margin > 0, f"model.memory.curvature_margin is {margin}; it must be positive, or null for no bound")
        every = self.state_interval
        _require(every is None or every >= 1, f"model.memory.state_interval is {every}; it must be at least 1, or null")


@dataclass(kw_only=True)
class ModelConfig:
    """The language model: embedding, a stack of Titans blocks, norm, head."""

    variant: Variant = "mac"
    """Where the memory sits: mac (as context), mag (as gate), mal (as layer), lmm (memory alone). Section 4 of the paper."""
    dim: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 4
    """Attention heads. Unused by lmm."""
    mlp_dim: int | None = None
    """Hidden width of the SwiGLU MLP. null: 8/3 of model.dim, rounded up to a multiple of 64."""
    vocab_size: int = 32000
    """Rows of the embedding and of the head; must not be smaller than the tokenizer's vocabulary."""
    segment_len: int = 128
    """Tokens of one segment (mac): attention is causal inside it, and the memory carries everything older."""
    window: int = 128
    """Tokens a token attends to, itself included (mag, mal)."""
    attention_backend: Literal["auto", "flash", "flex", "sdpa"] = "auto"
    """Kernels of attention. flash: FlashAttention, NVIDIA GPU and half precision. flex: torch's flex_attention, GPU. sdpa: portable.
    auto: the first of these that runs."""
    num_persistent_tokens: int = 4
    """Learnable, input-independent tokens before the sequence (section 3.3). 0: none."""
    tie_embeddings: bool = True
    """Use the embedding's weights as the head's."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-5
    """Epsilon of the RMSNorms."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 * num_layers)."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "vocab_size", "segment_len", "window"):
            _require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.num_persistent_tokens >= 0, f"model.num_persistent_tokens is {self.num_persistent_tokens}; it must be 0 or more")
        _require(self.mlp_dim is None or self.mlp_dim >= 1, f"model.mlp_dim is {self.mlp_dim}; it must be at least 1, or null")
        if self.variant != "lmm":
            _require_divides("model.dim", self.dim, "model.num_heads", self.num_heads)
            head_dim = self.dim // self.num_heads
            sentence = f"model.dim {self.dim} / model.num_heads {self.num_heads} is {head_dim}; rotary embeddings need an even number"
            _require(head_dim % 2 == 0, sentence)
        if self.memory.head_dim is None:
            _require_divides("model.dim", self.dim, "model.memory.num_heads", self.memory.num_heads)


@dataclass(kw_only=True)
class SourceConfig:
    """One source of a mixture."""

    path: str = ""
    """Folder or URL of its shards, as data.path."""
    weight: float = 1.0
    """Its share of the tokens trained on, relative to the other sources' weights."""


@dataclass(kw_only=True)
class DataConfig:
    """Token shards (WebDataset tars with an index), made by tools/make_shards.py."""

    path: str = "data/tokens"
    """Folder with the splits train/ and validation/, each a set of shards with its index.json. Also https://HOST/FOLDER, or
    pipe:COMMAND with {} where a file's name in that folder goes."""
    sources: dict[str, SourceConfig] | None = None
    """Several such folders, mixed by weight, in place of path:
    {web: {path: data/web, weight: 0.8}, books: {path: data/books, weight: 0.2}}. null: path alone."""
    format: Literal["tokens", "webdataset"] = "tokens"
    """tokens: our shards. webdataset: tars written by others, whose members .txt, .json or .npy are documents; turned into shards once."""
    tokenizer: str | None = None
    """For format webdataset: "byte", a SentencePiece model, a tokenizer.json or its folder. Shards bring their own."""
    text_key: str = "text"
    """For format webdataset: the key of a .json member that holds its text."""
    cache_dir: str | None = None
    """Where remote shards, and shards made of others' tars, are kept. null: ~/.cache/titans_scale."""
    cache_gib: float | None = None
    """Room for remote shards there, in GiB: the least recently used go first. null: all are kept."""
    reset_at_document: bool = False
    """Begin anew at each document of a packed sequence: attention does not look back over its start, and the memory forgets what was
    before."""
    shuffle: bool = True
    """Draw the samples of an epoch in a random order that is a function of (data.seed, epoch) alone."""
    shuffle_window: int = 65536
    """Samples that are shuffled together, once the shards' own order is drawn. Larger mixes better, smaller keeps fewer shards in use."""
    seed: int = 0
    """Seed of that order."""
    skip_steps: list[tuple[int, int]] | None = None
    """Steps whose batches are left out, as [first, last] pairs, both included: [[1200, 1250]] goes on with the batch of step 1251.
    null: none."""
    num_workers: int = 0
    """Processes a rank that read ahead. 0: the trainer reads by itself. The order does not depend on it."""
    verify: Literal["size", "hash"] = "size"
    """What of a shard is checked against the index: its size at the start, or also its SHA-256 when it is first opened."""
    on_error: Literal["raise", "skip"] = "raise"
    """When a sample cannot be read after all retries. raise: stop and name it. skip: go on without its targets, and count it."""
    retries: int = 4
    """Further attempts to read or fetch what failed, with growing waits between them."""
    retry_seconds: float = 0.5
    """First of those waits; each is about twice the one before, a minute at most."""
    timeout_seconds: float = 15.0
    """How long a remote may stay silent before an attempt counts as failed."""

    def __post_init__(self) -> None:
        _require(self.sources is None or bool(self.sources), "data.sources is empty; name at least one source, or leave it out")
        for name, source in (self.sources or {}).items():
            _require(source.path != "", f"data.sources.{name} has no path; name the folder of its shards")
            positive = math.isfinite(source.weight) and source.weight > 0
            _require(positive, f"data.sources.{name}.weight is {source.weight}; it must be a positive number")
            plain = re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None
            _require(plain, f"data.sources has the name {name!r}; use letters, digits, - and _ only, as metrics are named after it")
        if self.format == "webdataset":
            _require(self.tokenizer is not None, "data.format is webdataset and data.tokenizer is null; name one, for example byte")
        _require(self.shuffle_window >= 1, f"data.shuffle_window is {self.shuffle_window}; it must be at least 1")
        for name in ("num_workers", "retries"):
            _require(getattr(self, name) >= 0, f"data.{name} is {getattr(self, name)}; it must be 0 or more")
        _require(self.retry_seconds >= 0, f"data.retry_seconds is {self.retry_seconds}; it must be 0 or more")
        _require(self.timeout_seconds > 0, f"data.timeout_seconds is {self.timeout_seconds}; it must be positive")
        room = self.cache_gib
        _require(room is None or room > 0, f"data.cache_gib is {room}; it must be positive, or null for no limit")
        for first, last in self.skip_steps or ():
            sentence = f"data.skip_steps has [{first}, {last}]; steps count from 1, and the last must not come before the first"
            _require(1 <= first <= last, sentence)


@dataclass(kw_only=True)
class TrainingConfig:
    """The main loop."""

    output_dir: str = "runs/default"
    """Folder of the run: checkpoints, metrics.jsonl, TensorBoard files, the resolved config."""
    steps: int = 1000
    """Optimizer steps of the whole run, also when it is resumed."""
    sequence_length: int = 1024
    """Tokens of one training sequence; must be that of the shards."""
    global_batch_tokens: int = 65536
    """Tokens of one optimizer step over all ranks; a multiple of sequence_length * micro_batch_size * ranks."""
    micro_batch_size: int = 4
    """Sequences a rank puts through the model at once; the rest of the batch is accumulated."""
    max_logits_mib: int | None = 16
    """Memory for logits, in MiB: the loss takes as many tokens through the head at once as fit. null: all of a micro-batch."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient's global norm to this. null: no clip (the norm is still reported)."""
    seed: int = 0
    """Seed of the initial weights; the same weights on any number of ranks."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of parameters and activations in forward and backward; the optimizer keeps float32. auto: bfloat16 on a GPU,
    float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: a GPU for each rank where there are GPUs, else the CPU."""
    deterministic: bool = False
    """Ask torch for deterministic kernels on a GPU too (slower there; a CPU run repeats itself anyway)."""
    gc_interval: int = 50
    """Steps between two collections of Python's garbage, on all ranks at once: one that stops for it makes all the others wait. 0: left to
    Python."""

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "global_batch_tokens", "micro_batch_size"):
            _require(getattr(self, name) >= 1, f"training.{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.gc_interval >= 0, f"training.gc_interval is {self.gc_interval}; it must be 0 (left to Python) or more")
        room = self.max_logits_mib
        _require(room is None or room >= 1, f"training.max_logits_mib is {room}; it must be at least 1, or null to hold all logits at once")
        unit = self.sequence_length * self.micro_batch_size
        nearest = max(1, round(self.global_batch_tokens / unit)) * unit
        _require(
            self.global_batch_tokens % unit == 0,
            f"training.global_batch_tokens {self.global_batch_tokens} is not a multiple of sequence_length {self.sequence_length}"
            f" * micro_batch_size {self.micro_batch_size} = {unit}; the nearest that is: {nearest}",
        )

    @property
    def logits_bytes(self) -> int | None:
        """max_logits_mib in bytes."""
        return None if self.max_logits_mib is None else self.max_logits_mib * 2**20


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW; weight decay on matrices only."""

    lr: float = 4e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases, gates' biases, persistent tokens and the memory's initial weights have none."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optimizer.lr is {self.lr}; it must be positive")
        _require(self.eps > 0, f"optimizer.eps is {self.eps}; it must be positive")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it must be 0 (none) or more")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas are {self.betas}; each must be at least 0 and below 1")


@dataclass(kw_only=True)
class LRSchedulerConfig:
    """Learning rate over the run, as a factor of optimizer.lr."""

    name: Literal["cosine", "wsd", "linear"] = "cosine"
    """Shape after the warm-up. wsd: constant, then a linear decay over the last decay_ratio of the steps."""
    warmup_steps: int = 100
    """Steps of linear warm-up from zero."""
    min_ratio: float = 0.1
    """Factor at the last step."""
    decay_ratio: float = 0.2
    """Share of the steps that wsd spends decaying."""

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, f"lr_scheduler.warmup_steps is {self.warmup_steps}; it must be 0 or more")
        for name in ("min_ratio", "decay_ratio"):
            _require(0 <= getattr(self, name) <= 1, f"lr_scheduler.{name} is {getattr(self, name)}; it must lie between 0 and 1")


@dataclass(kw_only=True)
class ParallelismConfig:
    """Layout of the ranks: replicate * shard * context * tensor of them, neighbours in tensor first."""

    data_parallel_replicate: int = 1
    """Replicas of the sharded model (HSDP); 1: plain FSDP2."""
    data_parallel_shard: int = -1
    """Ranks over which parameters, gradients and optimizer state are sharded. -1, here or in one of the others: all that are left."""
    context_parallel: int = 1
    """Ranks that share a sequence, each with a block of consecutive tokens; the memory goes from rank to rank. For long sequences."""
    tensor_parallel: int = 1
    """Ranks that share every layer: attention and memory by heads, the MLP by columns, the vocabulary by words."""
    memory_split: Literal["heads", "hidden"] = "heads"
    """What tensor parallelism splits of the memory. heads: no communication inside the scan. hidden: the hidden width of every head, for
    few wide ones, with a sum over ranks for each chunk; needs model.memory.depth 2."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward pass (ZeRO-3). false keeps them (ZeRO-2): faster where they fit."""
    prefetch: int = 1
    """Blocks whose parameters are gathered ahead of the one at work. 0: left to torch."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory, and step there: slow, for models that do not fit otherwise."""

    def __post_init__(self) -> None:
        _require(self.prefetch >= 0, f"parallelism.prefetch is {self.prefetch}; it must be 0 (none) or more")


@dataclass(kw_only=True)
class EngineConfig:
    """What shards and steps the model."""

    name: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """fsdp2: torch's fully_shard, on CPU over gloo too. deepspeed: DeepSpeed's ZeRO, over all ranks alike; needs the extra [deepspeed]."""
    zero_stage: Literal[1, 2, 3] = 2
    """What deepspeed shards: the optimizer's state (1), gradients too (2), parameters too (3)."""
    config: str | None = None
    """Path of a JSON file of further DeepSpeed settings, see configs/deepspeed; one that contradicts ours is an error."""


@dataclass(kw_only=True)
class CompileConfig:
    """torch.compile."""

    enabled: bool = False
    """Compile every block by itself."""


@dataclass(kw_only=True)
class ActivationCheckpointConfig:
    """Recomputation of activations in the backward pass."""

    mode: Literal["none", "selective", "full"] = "none"
    """none: keep what autograd keeps (the scan recomputes by itself, see model.memory.state_interval). selective: of each block keep
    what matrix products, attention and the scan made, recompute the rest. full: keep each block's input, recompute the block."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints in torch.distributed.checkpoint's format, under output_dir/checkpoint/step-N."""

    interval: int = 500
    """Steps between two checkpoints; the last step is always saved. 0: the last step only."""
    keep_last: int = 3
    """Checkpoints kept; older ones are deleted after a newer one is whole. 0: keep all."""
    resume: bool = True
    """Continue from the newest whole checkpoint in output_dir, if there is one. false: refuse to run over it."""

    def __post_init__(self) -> None:
        _require(self.interval >= 0, f"checkpoint.interval is {self.interval}; it must be 0 (last step only) or more")
        _require(self.keep_last >= 0, f"checkpoint.keep_last is {self.keep_last}; it must be 0 (all) or more")


@dataclass(kw_only=True)
class MetricsConfig:
    """What is written down, and how often."""

    log_interval: int = 1
    """Steps between two lines on the console and two records in metrics.jsonl and TensorBoard."""
    memory_interval: int = 50
    """Steps between two looks into the memories (inner loss, surprise, gates, state norms). 0: never."""
    tensorboard: bool = True
    """Write TensorBoard event files under output_dir/tensorboard."""
    peak_tflops: float | None = None
    """Peak of one device for MFU, in TFLOP/s. null: from the GPU's name; on a CPU, measured once with a matrix product."""

    def __post_init__(self) -> None:
        _require(self.log_interval >= 1, f"metrics.log_interval is {self.log_interval}; it must be at least 1")
        _require(self.memory_interval >= 0, f"metrics.memory_interval is {self.memory_interval}; it must be 0 (never) or more")


@dataclass(kw_only=True)
class StabilityConfig:
    """What to do when training goes wrong."""

    stop_on_nonfinite: bool = True
    """Stop, naming the last good checkpoint, when the loss or the gradient norm is not finite. Checked whenever a step is
    logged or saved."""


@dataclass(kw_only=True)
class CommConfig:
    """Process groups."""

    init_timeout_seconds: int = 300
    """Time a rank waits for the others until the first step is done."""
    train_timeout_seconds: int = 100
    """Time a rank waits for the others in a collective after that."""
    trace_collectives: int = 2000
    """Collectives that each rank remembers, to be told from the others' when one hangs (torch's flight recorder). 0: none."""

    def __post_init__(self) -> None:
        for name in ("init_timeout_seconds", "train_timeout_seconds"):
            _require(getattr(self, name) >= 1, f"comm.{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.trace_collectives >= 0, f"comm.trace_collectives is {self.trace_collectives}; it must be 0 (none) or more")


@dataclass(kw_only=True)
class EvalConfig:
    """Validation during training."""

    interval: int = 100
    """Steps between two validations; the last step always has one. 0: none."""
    batches: int = 8
    """Micro-batches a rank takes from the validation split of each source each time. 0: the whole split."""

    def __post_init__(self) -> None:
        _require(self.interval >= 0, f"eval.interval is {self.interval}; it must be 0 (never) or more")
        _require(self.batches >= 0, f"eval.batches is {self.batches}; it must be 0 (the whole split) or more")


@dataclass(kw_only=True)
class TitansConfig:
    """Everything a run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def _require_divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    divisors = [n for n in range(1, whole + 1) if whole % n == 0]
    nearest = min(divisors, key=lambda n: abs(n - part)) if divisors else 1
    _require(whole % part == 0, f"{whole_name} {whole} does not divide by {part_name} {part}; the nearest {part_name} that does: {nearest}")


def config_parser(*, prog: str | None = None, description: str | None = None) -> ArgumentParser:
    """A command line with `--config FILE`, `--print_config` and one dotted option for every field of TitansConfig.

    Tools add options of their own to it before they call `parse_config`.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below; options after it override it.")
    parser.add_class_arguments(TitansConfig, None)
    return parser


def parse_config(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[TitansConfig, Namespace]:
    """The configuration and, beside it, whatever else the parser was given to parse.

    Raises:
        ConfigError: an unknown key (named, with the nearest right one), a value of the wrong type, a missing file,
            or a combination of values that cannot work.
    """
    options = {action.dest for action in parser._actions}
    options |= {f"data.sources.NAME.{source_key.name}" for source_key in dataclasses.fields(SourceConfig)}
    try:
        for file in _config_files(arguments):
            _check_keys(_yaml_keys(file), options, where=f"in {file}")
        _check_keys(_option_names(arguments), options, where="on the command line")
        parsed = parser.parse_args(list(arguments))
        sections = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    names = [section.name for section in dataclasses.fields(TitansConfig)]
    return TitansConfig(**{name: sections[name] for name in names}), sections


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TitansConfig:
    """Read a YAML file and apply dotted overrides, each written as "section.key=value".

    Args:
        path: YAML file; None: the defaults.   overrides: for example ["model.dim=512", "model.memory.chunk_size=64"].
    Raises:
        ConfigError: as `parse_config`.
    """
    for override in overrides:
        _require("=" in override, f"override {override!r} has no value; write it as section.key=value")
    arguments = [f"--config={path}"] if path is not None else []
    config, _ = parse_config(config_parser(), [*arguments, *(f"--{override.lstrip('-')}" for override in overrides)])
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts, lists and scalars, as YAML and JSON know them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def save_config(config: TitansConfig, path: str | Path) -> None:
    """Write every key with its value; `load_config(path)` gives the same configuration back."""
    Path(path).write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))


def config_differences(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with both values; a key that only one side has counts as null on the other."""
    left, right = dict(flatten(config_to_dict(ours))), dict(flatten(config_to_dict(theirs)))
    return {key: (left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)}


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of all that is no mapping itself."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            yield Path(argument.removeprefix("--config="))
        elif argument == "--config" and position + 1 < len(arguments):
            yield Path(arguments[position + 1])


def _yaml_keys(file: Path) -> list[str]:
    _require(file.is_file(), f"configuration file {file} does not exist; the presets are in configs/")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    _require(content is not None, f"{file} is empty; leave --config out to run with the defaults")
    _require(isinstance(content, Mapping), f"{file} holds a {type(content).__name__}; a configuration is a mapping of sections")
    keys = [key for key, _ in flatten(content)]
    sections = {"model.memory", *(section.name for section in dataclasses.fields(TitansConfig))}
    for key in keys:
        _require(key not in sections, f"section {key!r} in {file} is no mapping; write its keys indented below it, or leave it out")
    return keys


def _option_names(arguments: Sequence[str]) -> list[str]:
    return [argument[2:].split("=", 1)[0] for argument in arguments if argument.startswith("--") and len(argument) > 2]


def _check_keys(keys: Iterable[str], options: set[str], *, where: str) -> None:
    """The parser rejects an unknown key too, but says neither where it stands nor what was meant."""
    for key in keys:
        if re.sub(r"^data\.sources\.[^.]+\.", "data.sources.NAME.", key) not in options:
            near = difflib.get_close_matches(key, options, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "; --help lists every key"
            raise ConfigError(f"unknown key {key!r} {where}{hint}")

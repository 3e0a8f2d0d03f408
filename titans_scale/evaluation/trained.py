"""A trained model with its tokenizer, from the folder of a run or of one of its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

import torch

from titans_scale.config import TitansConfig
from titans_scale.data import Tokenizer, load_tokenizer, open_sources
from titans_scale.models import TitansLM
from titans_scale.training.checkpoint import load_model_for_inference


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What evaluation and sampling start from."""

    model: TitansLM
    config: TitansConfig
    tokenizer: Tokenizer


def load_trained(checkpoint: str | Path, *, tokenizer: str | None = None, device: str = "auto") -> Trained:
    """Load a model for inference, in its checkpoint's own configuration.

    Args:
        checkpoint: a run folder (its newest checkpoint) or one step-N folder.
        tokenizer: "byte" or a SentencePiece .model; None: that of the shards the run was trained on.
        device: "cpu", "cuda", ...; "auto": a GPU where there is one.
    Raises:
        ValueError: no such device, no whole checkpoint there, no tokenizer, or one with more tokens than the model knows.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second: a build of torch without CUDA
        raise ValueError(f"device {device!r} is not to be had here: {' '.join(str(error).split())}") from error
    model, config = load_model_for_inference(checkpoint, device)
    found = load_tokenizer(tokenizer) if tokenizer is not None else _tokenizer_of_shards(config)
    if found.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {found.spec} has {found.vocab_size} tokens, the model in {checkpoint} knows {config.model.vocab_size};"
            " name the tokenizer it was trained with (--tokenizer)"
        )
    return Trained(model=model.eval(), config=config, tokenizer=found)


def _tokenizer_of_shards(config: TitansConfig) -> Tokenizer:
    try:
        data = open_sources(config.data, "train", sequence_length=config.training.sequence_length)
        return data.sources[0].dataset.load_tokenizer()
    except (ValueError, OSError) as error:
        raise ValueError(f"the run's tokenizer is not to be had ({error}); name it with --tokenizer FILE.model, or byte") from error

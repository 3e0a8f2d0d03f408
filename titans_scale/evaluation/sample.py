"""Text from a trained model."""

import torch

from titans_scale.evaluation.trained import Trained


def continue_text(
    trained: Trained,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
) -> str:
    """What the model adds to the prompt, to the end of the document at most; see `TitansLM.generate` for the options."""
    tokenizer = trained.tokenizer
    context = [tokenizer.eos_id, *tokenizer.encode(prompt)]  # a document begins after the end of another, as in training
    tokens = trained.model.generate(
        torch.tensor([context], device=next(trained.model.parameters()).device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_token=tokenizer.eos_id,
        seed=seed,
    )
    return tokenizer.decode(tokens[0, len(context) :].tolist())

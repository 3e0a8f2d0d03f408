"""Sampling: what the filters keep, and that the stream behind it changes nothing."""

import pytest
import torch
from small_models import VARIANTS, perturbed_model, random_tokens

from titans_scale.models import generation
from titans_scale.models.generation import filter_logits

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def kept(**options):
    return torch.isfinite(filter_logits(LOGITS, **{"temperature": 1.0, **options}))[0].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_generation_equals_a_full_pass_for_every_token(variant, monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 7)
    model, tokens = perturbed_model(variant), random_tokens(2, 20)
    expected = tokens
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(tokens, max_new_tokens=8, temperature=0), expected)


def test_filters_keep_what_they_say():
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.6) == [True, False, False, False]  # the first alone has 0.64
    assert kept(top_p=0.65) == [True, True, False, False]
    assert kept(min_p=0.2) == [True, True, False, False]  # exp(-1) = 0.37, exp(-2) = 0.14
    assert kept(top_k=100) == [True] * 4
    assert kept(temperature=0) == [True, False, False, False]
    assert kept(temperature=10, min_p=0.2) == [True] * 4


def test_a_seed_repeats_a_draw():
    model, tokens = perturbed_model("lmm"), random_tokens(1, 5)
    first, again = (model.generate(tokens, max_new_tokens=12, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, model.generate(tokens, max_new_tokens=12, seed=4))


def test_generation_stops_when_every_row_has():
    model, tokens = perturbed_model("lmm"), random_tokens(1, 5)
    greedy = model.generate(tokens, max_new_tokens=10, temperature=0)
    stop = greedy[0, 7].item()
    stopped = model.generate(tokens, max_new_tokens=10, temperature=0, stop_token=stop)
    assert stopped[0, -1] == stop and stopped.shape[1] <= 8
    assert torch.equal(stopped, greedy[:, : stopped.shape[1]])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 0.0}, "min_p is 0"),
    ],
)
def test_options_outside_their_range_get_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        perturbed_model("lmm").generate(random_tokens(1, 3), max_new_tokens=1, **options)


def test_an_empty_prompt_gets_a_sentence():
    with pytest.raises(ValueError, match="at least one token"):
        perturbed_model("lmm").generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1)

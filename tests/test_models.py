"""What must hold for every variant, at random perturbed weights, in float64."""

import pytest
import torch
from small_models import VARIANTS, perturbed_model, random_tokens, small_config, with_another_token

from titans_scale import TitansLM

ROUNDING = 1e-10
"""Float64 sums in another order, through two layers of memories whose dynamics amplify rounding."""


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_token_never_changes_the_past(variant):
    model, tokens = perturbed_model(variant), random_tokens(2, 70)
    logits = model(tokens).logits
    for at in (1, 11, 12, 45, 69):
        changed = model(with_another_token(tokens, at=at)).logits
        assert torch.equal(logits[0, :at], changed[0, :at])
        assert not torch.equal(logits[0, at], changed[0, at])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_of_a_batch_do_not_touch_each_other(variant):
    model, tokens = perturbed_model(variant), random_tokens(3, 50)
    logits, changed = model(tokens).logits, model(with_another_token(tokens, at=5, row=1)).logits
    assert torch.equal(logits[0], changed[0])
    assert torch.equal(logits[2], changed[2])
    assert not torch.equal(logits[1], changed[1])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_token_is_felt_thousands_of_tokens_later_through_the_memory_alone(variant):
    tokens = random_tokens(1, 2048)
    changed = with_another_token(tokens, at=3)

    def difference(model: TitansLM) -> float:
        return (model(tokens).logits[0, -1] - model(changed).logits[0, -1]).abs().max().item()

    model = perturbed_model(variant, scale=0.05)
    assert difference(model) > 1e-6
    for block in model.blocks:
        block.memory.theta_proj.bias.fill_(-torch.inf)  # theta = 0: nothing is written
        block.memory.theta_proj.weight.zero_()
        block.memory.alpha_proj.weight.zero_()  # nor forgotten at a pace that a token sets
    assert difference(model) == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "overrides", [(), ("memory.residual_norm=true", "memory.depth=1", "memory.activation=gelu", "tie_embeddings=false")]
)
def test_every_parameter_gets_a_gradient(variant, overrides):
    model, tokens = perturbed_model(variant, *overrides), random_tokens(2, 40)
    model(tokens, labels=tokens).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_call_twice_gives_the_same_numbers_and_leaves_the_model_and_state_alone(variant):
    model, tokens = perturbed_model(variant), random_tokens(1, 40)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = model(tokens[:, :17], state=model.init_state()).state
    first, second = model(tokens[:, 17:], state=state), model(tokens[:, 17:], state=state)
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_cut_anywhere_equals_one_pass(variant):
    model, tokens = perturbed_model(variant), random_tokens(2, 40)
    whole = model(tokens).logits
    for cut in range(1, 40):
        left = model(tokens[:, :cut], state=model.init_state(2))
        right = model(tokens[:, cut:], state=left.state)
        torch.testing.assert_close(torch.cat((left.logits, right.logits), dim=1), whole, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_one_token_at_a_time_equals_one_pass(variant):
    model, tokens = perturbed_model(variant), random_tokens(2, 40)
    state, pieces = model.init_state(2), []
    for t in range(40):
        out = model(tokens[:, t : t + 1], state=state)
        state, pieces = out.state, [*pieces, out.logits]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens).logits, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_through_a_carried_state(variant):
    model, tokens = perturbed_model(variant), random_tokens(1, 40)

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))

    left = model(tokens[:, :19], state=model.init_state())
    right = model(tokens[:, 19:], state=left.state)
    pieces = gradients(torch.cat((left.logits, right.logits), dim=1))
    for a, b in zip(pieces, gradients(model(tokens).logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_state_does_not_grow(variant):
    model = perturbed_model(variant)

    def size(length: int) -> int:
        state = model(random_tokens(1, length), state=model.init_state()).state
        leaves = torch.utils._pytree.tree_leaves(state)
        return sum(leaf.untyped_storage().nbytes() for leaf in leaves if isinstance(leaf, torch.Tensor))

    assert size(24 * 40 + 5) == size(24 * 4 + 5)  # a length of the same place in segment, chunk and window


@pytest.mark.parametrize("theta, eta, alpha, length", [(30, 6, -30, 65536), (30, 30, -30, 4096), (30, -30, 30, 4096), (30, 3, 30, 4096)])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equal_tokens_at_saturated_gates_stay_finite(variant, theta, eta, alpha, length):
    overrides = ("dim=16", "num_layers=1", "num_heads=1", "memory.num_heads=1", "segment_len=64", "window=64", "memory.chunk_size=64")
    model = perturbed_model(variant, *overrides, dtype=torch.float32)
    for gate, value in (("theta", theta), ("eta", eta), ("alpha", alpha)):
        getattr(model.blocks[0].memory, f"{gate}_proj").bias.fill_(float(value))
    assert model(torch.full((1, length), 7)).logits.isfinite().all()


def test_initial_weights_depend_on_the_seed_alone():
    config = small_config("mac")
    with torch.device("meta"):
        model = TitansLM(config)
    model.to_empty(device="cpu")
    model.init_weights(3)
    other = TitansLM(config)
    other.init_weights(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other.init_weights(4)
    assert not torch.equal(model.embedding.weight, other.embedding.weight)


def test_the_global_seed_makes_a_model():
    torch.manual_seed(0)
    first = TitansLM(small_config("lmm"))
    second = TitansLM(small_config("lmm"))
    torch.manual_seed(0)
    again = TitansLM(small_config("lmm"))
    assert torch.equal(first.embedding.weight, again.embedding.weight)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)


def test_labels_are_shifted_inside_and_ignored_where_negative():
    model, tokens = perturbed_model("lmm"), random_tokens(1, 12)
    out = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), tokens[0, 1:])
    torch.testing.assert_close(out.loss, expected)
    labels = tokens.clone()
    labels[0, 6:] = -100
    expected = torch.nn.functional.cross_entropy(out.logits[0, :5].float(), tokens[0, 1:6])
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected)


def test_a_new_model_predicts_nothing_in_particular():
    for variant in VARIANTS:
        model, tokens = TitansLM(small_config(variant)), random_tokens(4, 64)
        model.init_weights(0)
        assert abs(model(tokens, labels=tokens).loss.item() - torch.tensor(61.0).log().item()) < 0.1


@pytest.mark.parametrize(
    "tokens, words", [(torch.zeros(1, 0, dtype=torch.long), "at least one token"), (torch.zeros(3, 4).long(), "batch of 3")]
)
def test_bad_tokens_get_a_sentence(tokens, words):
    model = TitansLM(small_config("mac"))
    with pytest.raises(ValueError, match=words):
        model(tokens, state=model.init_state(1))

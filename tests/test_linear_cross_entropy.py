"""The loss in chunks is the plain loss: the same value and gradients, in little memory, however the model is wrapped."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from small_models import VOCAB, perturbed_model, random_tokens
from training_runs import small_config

from titans_scale import TitansLM
from titans_scale.config import ConfigError, TrainingConfig
from titans_scale.models.loss import IGNORED, _loss_and_gradients, cross_entropy_sum, linear_cross_entropy_sum, tokens_of_a_chunk
from titans_scale.parallel import Mesh, mesh_sizes
from titans_scale.parallel.apply import shard
from titans_scale.parallel.materialize import materialize

BENCH = Path(__file__).parent.parent / "tools" / "bench_loss.py"
ROUNDING = 1e-12
"""Of float64: sums of a few thousand terms of order one in another order."""
A_FEW_TOKENS = 2 * 8 * VOCAB * 5
"""Bytes of the logits and log-probabilities of five tokens in float64: chunks of uneven lengths below."""


def inputs(dtype=torch.float64, tokens=34, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens // 2, 16, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    weight = torch.randn(VOCAB, 16, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    targets = torch.randint(VOCAB, (2, tokens // 2), generator=generator).to(device)
    targets[0, 3:9] = IGNORED
    return x, weight, targets


def loss_and_gradients(loss_of, *leaves):
    """Of loss / 7: training divides by the number of targets, so the upstream gradient is not one."""
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss / 7, leaves)]


def plain(targets):
    return lambda x, weight: cross_entropy_sum(F.linear(x, weight), targets)


def chunked(targets, logits_bytes):
    return lambda x, weight: linear_cross_entropy_sum(x, weight, targets, logits_bytes=logits_bytes)


def assert_equal(results, expected, tolerance=ROUNDING):
    for result, truth in zip(results, expected, strict=True):
        assert (result.double() - truth.double()).abs().max() <= tolerance * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("logits_bytes", [1, A_FEW_TOKENS, 10**9], ids=["one token", "a few", "all"])
def test_loss_and_gradients_are_those_of_the_plain_form_at_any_chunk(logits_bytes):
    x, weight, targets = inputs()
    assert_equal(loss_and_gradients(chunked(targets, logits_bytes), x, weight), loss_and_gradients(plain(targets), x, weight))


def test_in_float32_they_agree_to_rounding():
    x, weight, targets = inputs(torch.float32)
    results = loss_and_gradients(chunked(targets, A_FEW_TOKENS), x, weight)
    assert_equal(results, loss_and_gradients(plain(targets), x, weight), tolerance=2e-6)  # sums of some tens of terms at 6e-8 each


def test_without_any_target_loss_and_gradients_are_zero():
    x, weight, targets = inputs()
    results = loss_and_gradients(chunked(torch.full_like(targets, IGNORED), A_FEW_TOKENS), x, weight)
    assert all((result == 0).all() for result in results)


def test_in_bfloat16_the_weight_s_gradient_is_rounded_once_and_not_once_a_chunk():
    x, weight, targets = inputs(torch.bfloat16, tokens=4096)
    loss, *_, gradient = loss_and_gradients(chunked(targets, A_FEW_TOKENS), x, weight)
    truth, *_, exact = loss_and_gradients(plain(targets), x.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    # One rounding to bfloat16 is at most 2^-9 of a value. Adding up some 800 chunks in bfloat16 is wrong by tens of that.
    assert (gradient.double() - exact).abs().max() < 2**-8 * exact.abs().max()


def test_what_needs_no_gradient_gets_the_same_loss():
    x, weight, targets = inputs()
    with torch.no_grad():
        loss = chunked(targets, A_FEW_TOKENS)(x, weight)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, plain(targets)(x, weight), rtol=ROUNDING, atol=0)


def test_a_second_backward_pass_is_refused():
    x, weight, targets = inputs()
    loss = chunked(targets, A_FEW_TOKENS)(x, weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_operator_is_what_torch_expects_of_one():
    x, weight, targets = inputs()
    arguments = (x.detach().flatten(0, 1).requires_grad_(), weight, targets.flatten(), 5, True, 0, "")
    torch.library.opcheck(_loss_and_gradients, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_compiled_it_is_the_same():
    x, weight, targets = inputs()
    compiled = torch.compile(chunked(targets, A_FEW_TOKENS), backend="aot_eager", fullgraph=True)
    assert_equal(loss_and_gradients(compiled, x, weight), loss_and_gradients(plain(targets), x, weight))


def test_chunks_fit_the_room_and_are_of_nearly_one_length():
    assert tokens_of_a_chunk(1000, 100, bytes_per_logit=4, logits_bytes=300 * 2 * 4 * 100) == 250  # 4 x 250, not 3 x 300 + 100
    assert tokens_of_a_chunk(1000, 100, bytes_per_logit=4, logits_bytes=1) == 1
    assert tokens_of_a_chunk(10, 100, bytes_per_logit=4, logits_bytes=10**9) == 10


def test_room_for_nothing_is_no_setting():
    with pytest.raises(ConfigError, match=r"training\.max_logits_mib is 0; it must be at least 1, or null"):
        TrainingConfig(max_logits_mib=0)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_model_trains_alike_with_and_without_chunks(tied):
    model, tokens = perturbed_model("lmm", f"tie_embeddings={tied}"), random_tokens(2, 20)
    results = [
        [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
        for loss in (model.loss_sum(tokens, tokens, logits_bytes=room) for room in (None, A_FEW_TOKENS))
    ]
    assert_equal(results[1], results[0])


def sharded_gradients(precision):
    """Of every parameter, with and without chunks, tied and untied, and the loss."""
    changes = {"model.variant": "lmm", "model.num_layers": 1}
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for tied in ("true", "false"):
        config = small_config("data", "run", {**changes, "model.tie_embeddings": tied})
        for room in (None, 10_000):
            with torch.device("meta"):
                model = TitansLM(config.model)
            shard(model, Mesh(mesh_sizes(config.parallelism, 2), "cpu"), precision=precision, reshard_after_forward=True)
            materialize(model, torch.device("cpu"), seed=0)
            for _ in range(2):  # twice: hooks must leave the modules as they found them
                model.zero_grad()
                loss = model.loss_sum(tokens, tokens, logits_bytes=room)
                loss.backward()
            gradients = [parameter.grad.full_tensor().flatten() for parameter in model.parameters()]
            results.append((loss.item(), torch.cat(gradients)))
    return results


# Of the whole gradient; in bfloat16 the plain form rounds its logits, by 4e-3 of their size.
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_sharded_models_train_alike_with_and_without_chunks(precision, tolerance):
    for plainly, in_chunks, untied_plainly, untied_in_chunks in run_ranks(sharded_gradients, 2, precision):
        for (loss, gradient), (loss_in_chunks, gradient_in_chunks) in ((plainly, in_chunks), (untied_plainly, untied_in_chunks)):
            assert loss_in_chunks == pytest.approx(loss, rel=tolerance)
            assert (gradient_in_chunks - gradient).norm() < tolerance * gradient.norm()


def test_at_32k_words_it_takes_a_tenth_of_the_plain_form_s_extra_memory(tmp_path):
    main = runpy.run_path(str(BENCH))["main"]
    assert main(["--tokens=1024", "--vocab=32000", "--dim=64", "--logits_mib", "8", "--repeats=1", f"--json={tmp_path}/loss.json"]) == 0
    plainly, in_chunks = json.loads((tmp_path / "loss.json").read_text())["results"]
    assert plainly["extra_mib"] > 2 * 1024 * 32000 * 4 / 2**20  # logits and log-probabilities at least: it measures what it should
    assert in_chunks["extra_mib"] < 0.1 * plainly["extra_mib"]


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_factors_give_float32_sums():
    x, weight, targets = inputs(torch.bfloat16, tokens=4096, device="cuda")
    loss, of_x, of_weight = loss_and_gradients(chunked(targets, 100 * A_FEW_TOKENS), x, weight)
    exact = loss_and_gradients(plain(targets), x.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    assert loss.item() == pytest.approx(exact[0].item(), rel=1e-4)
    assert (of_x.double() - exact[1]).abs().max() < 2e-2 * exact[1].abs().max()  # the logits' gradients are rounded to bfloat16
    assert (of_weight.double() - exact[2]).abs().max() < 1e-2 * exact[2].abs().max()

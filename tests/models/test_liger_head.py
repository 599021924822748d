"""Log-probabilities by Liger's kernel against full logits in float64; without a GPU, Triton interprets the kernel."""

from __future__ import annotations

import pytest
import torch

from prune_opd.core.head import OutputHead
from prune_opd.errors import ModelError
from prune_opd.models.causal_lm import check_liger
from prune_opd.models.liger_head import liger_logprobs
from tests.families import tiny_model
from tests.test_step import gradients, run_step

liger = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy", reason="make setup-liger installs it")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, H, V, PADDED, C = 13, 24, 90, 96, 4


def tensors(dtype, *, bias):
    made = [torch.randn(N, H), torch.randn(PADDED, H)] + [torch.randn(PADDED)] * bias
    return [t.to(DEVICE, dtype).requires_grad_() for t in made]


def by_liger(inputs, ids, scale=1.0, **settings):
    hidden, weight, *bias = inputs
    head = OutputHead(weight, *bias, scale=scale)
    return liger_logprobs(hidden, head, ids, vocab_size=V, **settings)


def by_full_logits(inputs, ids, scale=1.0):
    hidden, weight, *bias = inputs
    return (scale * (hidden @ weight.t() + sum(bias)))[:, :V].log_softmax(-1).gather(-1, ids)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Positions of each call of Liger's forward: without any, equality would be of the chunked head with itself."""
    calls = []
    forward = liger.fused_linear_cross_entropy_forward
    monkeypatch.setattr(
        liger,
        "fused_linear_cross_entropy_forward",
        lambda **given: calls.append(len(given["target"])) or forward(**given),
    )
    return calls


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [1.0, 0.25], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows", [1, 5, N])
def test_log_probs_and_gradients_are_those_of_the_full_logits(rows, bias, scale, dtype, tolerance):
    """With padding rows in the embedding, ids that are asked for twice, and gathered rows in chunks."""
    inputs = tensors(dtype, bias=bias)
    ids = torch.randint(V, (N, C), device=DEVICE)
    ids[:, 1] = ids[:, 0]
    coefficients = torch.randn(N, C, device=DEVICE)
    got = by_liger(inputs, ids, scale, chunk_bytes=rows * C * H * dtype.itemsize)
    assert got.dtype == torch.float32
    found = torch.autograd.grad((coefficients * got).sum(), inputs)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = by_full_logits(exact, ids, scale)
    wanted = torch.autograd.grad((coefficients * expected).sum(), exact)
    for ours, theirs in zip([got, *found], [expected, *wanted], strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < tolerance
    for gradient, given in zip(found, inputs, strict=True):
        assert gradient.dtype == given.dtype
    assert not found[1][V:].any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen):
    hidden, weight = tensors(torch.float32, bias=False)
    ids = torch.randint(V, (N, C), device=DEVICE)
    whole = torch.autograd.grad(by_liger([hidden, weight], ids).square().sum(), (hidden, weight))
    trained = weight if frozen == "hidden" else hidden
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    (alone,) = torch.autograd.grad(by_liger([hidden, weight], ids).square().sum(), (trained,))
    torch.testing.assert_close(alone, whole[trained is weight])


def test_the_kernel_is_the_one_that_runs(kernel_calls):
    inputs, ids = tensors(torch.float32, bias=False), torch.randint(V, (N, C), device=DEVICE)
    by_liger(inputs, ids).sum().backward()
    assert kernel_calls == [N, N]  # forward, and once more in the backward


@pytest.mark.skipif(DEVICE != "cpu", reason="models of this test live on the CPU")
@pytest.mark.parametrize(
    "settings",
    [{}, {"objective.top_k_strategy": "union"}, {"objective.loss": "sampled_token"}],
    ids=lambda settings: next(iter(settings.values()), "topk_reverse_kl"),
)
def test_a_step_is_the_same_step(settings, kernel_calls):
    plain, _, before = run_step(**settings)
    assert not kernel_calls
    fused, _, after = run_step(**settings, **{"model.liger_head": True})
    assert sum(kernel_calls) == 2 * int(fused.rollouts.lengths.sum())
    assert torch.equal(plain.rollouts.response_ids, fused.rollouts.response_ids)
    assert fused.loss == pytest.approx(plain.loss, rel=1e-5)
    torch.testing.assert_close(gradients(after), gradients(before), rtol=1e-4, atol=1e-6)


def test_a_head_that_caps_its_logits_is_refused():
    with pytest.raises(ModelError, match=r"liger_head.*Gemma2ForCausalLM"):
        check_liger(tiny_model("gemma2").to(DEVICE))
    inputs, ids = tensors(torch.float32, bias=False), torch.randint(V, (N, C), device=DEVICE)
    with pytest.raises(ValueError, match="soft-cap"):
        liger_logprobs(inputs[0], OutputHead(inputs[1], softcap=3.0), ids)


def test_a_cpu_is_refused_where_nobody_interprets(monkeypatch):
    model = tiny_model("qwen3")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_liger(model)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ModelError, match=r"liger_head.*this is cpu"):
        check_liger(model)

"""On a CUDA device, what the other tests hold on the CPU: `pytest -m gpu`. Skipped, with the reason, without one."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prune_opd.core.head import OutputHead, differentiable_head_statistics
from prune_opd.errors import ModelError
from prune_opd.models.packed_attention import choose_attention, packed_states, packing_of, use_packed_attention
from prune_opd.models.packing import pack
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from prune_opd.teachers.local import LocalTeacher
from prune_opd.training.build import build_optimizer, build_window
from tests.families import EOS, PAD, VOCAB, tiny_model, tiny_prompts
from tests.models.test_packed_attention import of_tokens
from tests.models.test_packing import rollouts_of
from tests.steps import step_of
from tests.test_step import IN_FLIGHT, by_hand, config_of, gradients, related

DEVICE = "cuda"
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def run_head(hidden, weight, *, top_k=8, chunk_bytes=2**16):
    """(log-probs at top-k and at id 3, gradient of hidden states, gradient of the weight), all on the CPU."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    ids = torch.full((len(hidden), 1), 3, device=hidden.device)
    found = differentiable_head_statistics(hidden, OutputHead(weight), top_k=top_k, ids=ids, chunk_bytes=chunk_bytes)
    (found.topk_logprobs.square().sum() + found.logprobs.sum()).backward()
    return [x.detach().cpu().double() for x in (found.topk_logprobs, found.logprobs, hidden.grad, weight.grad)]


def test_the_chunked_head_agrees_with_float64_on_the_cpu():
    hidden, weight = torch.randn(37, 16), torch.randn(700, 16)
    want = run_head(hidden.double(), weight.double())
    got = run_head(hidden.to(DEVICE), weight.to(DEVICE))
    for ours, theirs in zip(got, want, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


def test_no_full_logits_are_held():
    """Counted bytes: at 12,288 positions of Qwen3's vocabulary full logits would be 7 GiB, several times over."""
    hidden = torch.randn(12_288, 256, device=DEVICE)
    weight = torch.randn(151_936, 256, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_head(hidden, weight, chunk_bytes=256 * 2**20)
    gradients_and_copies = 2 * (hidden.nbytes + weight.nbytes)
    assert torch.cuda.max_memory_allocated() - before - gradients_and_copies < 12_288 * 151_936 * 4 / 10


def test_what_the_sampler_says_of_its_tokens_is_what_the_model_says_of_them():
    """Log-probabilities kept in decoding against one float64 forward on the CPU; no number of slots changes a token."""
    model = tiny_model("qwen3").to(DEVICE)
    prompts = tiny_prompts()
    uniforms = rollout_uniforms(0, 0, range(len(prompts)), 24)
    runs = [
        LocalSampler(model, pad_id=PAD, eos_ids=[EOS], slots=slots).sample(prompts, uniforms, top_k=4)
        for slots in (3, 8)
    ]
    assert torch.equal(runs[0].response_ids, runs[1].response_ids)
    twin = copy.deepcopy(model).cpu().double()
    for b, n in enumerate(runs[0].lengths.tolist()):
        said = runs[0].response_ids[b, :n].cpu()
        logits = twin(torch.tensor([[*prompts[b], *said.tolist()]])).logits[0, len(prompts[b]) - 1 : -1]
        ids = runs[0].student.ids[b, :n].cpu()
        want = logits.log_softmax(-1).gather(-1, ids)
        torch.testing.assert_close(runs[0].student.logprobs[b, :n].cpu().double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, IN_FLIGHT], ids=["window", "in-flight"])
def test_a_step_is_the_method(settings):
    """Events, weights, loss and gradient of a step on the device against float64 on the CPU."""
    config = config_of(**settings)
    before = tiny_model("qwen3", seed=3)
    student = copy.deepcopy(before).to(DEVICE).train()
    result = step_of(
        step=0,
        prompts=tiny_prompts(),
        student=student,
        sampler=LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB, slots=3),
        teacher=LocalTeacher(related(before).to(DEVICE), vocab_size=VOCAB),
        optimizer=build_optimizer(student, config)[0],
        window=build_window(config),
        vocab_size=VOCAB,
        config=config,
    )
    on_cpu = replace(
        result.rollouts,
        response_ids=result.rollouts.response_ids.cpu(),
        response_mask=result.rollouts.response_mask.cpu(),
    )
    events, weight, _, loss, gradient = by_hand(before, related(before), on_cpu, config)
    assert events.any() and np.array_equal(result.events.cpu().numpy(), events)
    np.testing.assert_allclose(result.weight.cpu().numpy(), weight, atol=1e-6)
    assert result.loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(gradients(student).cpu().double(), gradient, rtol=1e-3, atol=1e-5)


def test_a_step_by_ligers_kernel_is_the_same_step():
    """Its numbers against float64: tests/models/test_liger_head.py, which runs on the device where there is one."""
    pytest.importorskip("liger_kernel", reason="make setup-liger installs it")
    found = []
    for liger in (False, True):
        config = config_of(**{"model.liger_head": liger})
        student = tiny_model("qwen3", seed=3).to(DEVICE).train()
        result = step_of(
            step=0,
            prompts=tiny_prompts(),
            student=student,
            sampler=LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB, slots=3),
            teacher=LocalTeacher(related(tiny_model("qwen3", seed=3)).to(DEVICE), vocab_size=VOCAB),
            optimizer=build_optimizer(student, config)[0],
            window=build_window(config),
            vocab_size=VOCAB,
            config=config,
        )
        found.append((result.loss, gradients(student)))
    (loss, gradient), (of_liger, gradient_of_liger) = found
    assert of_liger == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(gradient_of_liger, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("attention", ["varlen", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_packed_rows_without_a_dense_mask_have_its_states_and_gradients(family, attention):
    """Heads of 64, as kernels want them; half precision for flash attention, whose own error is what float64 shows."""
    half = attention != "flex_attention"
    dtype = torch.bfloat16 if half else torch.float32
    model = tiny_model(family, head_dim=64).to(DEVICE, dtype).train()
    exact = copy.deepcopy(model).double()
    try:
        choose_attention(model, attention, device=torch.device(DEVICE), half=half, compile=False)
    except ModelError as error:
        pytest.skip(str(error))
    rollouts = rollouts_of([[2, 7, 3]] * 3 + [[4, 5]] * 2, [300, 1, 170, 25, 160])
    rollouts = replace(
        rollouts, response_ids=rollouts.response_ids.to(DEVICE), response_mask=rollouts.response_mask.to(DEVICE)
    )
    found = []
    for network in (model, exact):
        with use_packed_attention(network):
            parts = list(pack(rollouts, 10**6, **packing_of(network)))
            states = of_tokens(network, parts, packed_states)
            (states * torch.linspace(-1, 1, states.numel(), device=DEVICE).view_as(states)).sum().backward()
        found.append((states.detach().double(), gradients(network).double()))
    for got, want in zip(*found, strict=True):
        assert ((got - want).norm() / want.norm()).item() < (5e-2 if half else 1e-3)


def test_flash_attention_holds_no_mask():
    """Counted bytes: at 16,384 tokens a mask of a byte for each pair is 268 MB, and sdpa copies it in every layer."""
    model = tiny_model("llama", head_dim=64, max_position_embeddings=20_000).to(DEVICE, torch.bfloat16)
    rollouts = rollouts_of([[2, 7, 3]] * 4, [4000] * 4)
    rollouts = replace(
        rollouts, response_ids=rollouts.response_ids.to(DEVICE), response_mask=rollouts.response_mask.to(DEVICE)
    )
    assert choose_attention(model, "auto", device=torch.device(DEVICE), half=True, compile=False) != "sdpa"
    (part,) = pack(rollouts, 20_000, **packing_of(model))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad(), use_packed_attention(model):
        packed_states(model, part)
    assert torch.cuda.max_memory_allocated() - before < 16_000**2 / 2


@pytest.mark.slow
def test_a_step_of_12k_tokens_at_the_shape_of_qwen3_1_7b(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--rollouts", "1", "--repeats", "1"]
    done = subprocess.run([*command, "--output", tmp_path / "gpu.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gpu.json").exists()

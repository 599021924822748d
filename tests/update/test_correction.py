"""A step whose rollouts another engine sampled: here the same network with other weights, so that the gap is wide."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from prune_opd.reporting.metrics import metrics_of
from prune_opd.rollout.local import LocalSampler
from tests.core import reference
from tests.families import EOS, PAD, VOCAB, tiny_model
from tests.test_step import config_of, gradients, related, run_step

CAP = "rollout.importance_sampling_cap"
ENGINE = {"rollout.use_vllm": True}


def logits_of(model, rollouts, b):
    """(n, V) float64 at the response positions of one rollout."""
    n = int(rollouts.lengths[b])
    ids = torch.tensor([[*rollouts.prompts[b], *rollouts.response_ids[b, :n].tolist()]])
    return copy.deepcopy(model).double()(ids).logits[0, len(rollouts.prompts[b]) - 1 : -1]


def at_sampled(model, rollouts, b):
    said = rollouts.response_ids[b, : int(rollouts.lengths[b]), None]
    return logits_of(model, rollouts, b).log_softmax(-1).gather(-1, said).squeeze(-1)


class OtherEngine:
    """Samples from its own weights, and says with what log-probability."""

    def __init__(self, model=None):
        self.model = model or related(tiny_model("qwen3", seed=3), seed=5)

    def sample(self, prompts, uniforms, **settings):
        local = LocalSampler(self.model, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB)
        rollouts = local.sample(prompts, uniforms, **settings)
        logprobs = torch.full(rollouts.response_ids.shape, torch.nan)  # padding may hold anything
        with torch.no_grad():
            for b, n in enumerate(rollouts.lengths.tolist()):
                logprobs[b, :n] = at_sampled(self.model, rollouts, b).float()
        return dataclasses.replace(rollouts, sampled_logprobs=logprobs)


@pytest.fixture(scope="module")
def engine():
    return OtherEngine()


def by_hand(student, rollouts, weight, cap, loss):
    """Loss and gradient in float64 with each weight times min(cap, p/q) of its token or of the one before."""
    student, teacher = copy.deepcopy(student).double(), related(tiny_model("qwen3", seed=3))
    total = torch.zeros((), dtype=torch.float64)
    for b, n in enumerate(rollouts.lengths.tolist()):
        other = logits_of(teacher, rollouts, b).detach()
        ids = torch.tensor([[*rollouts.prompts[b], *rollouts.response_ids[b, :n].tolist()]])
        own = student(ids).logits[0, len(rollouts.prompts[b]) - 1 : -1]
        ratio = (at_sampled(student, rollouts, b).detach() - rollouts.sampled_logprobs[b, :n].double()).exp()
        ratio = ratio.clamp(max=cap)
        if loss == "sampled_token":
            said = rollouts.response_ids[b, :n, None]
            log_p, log_q = (x.log_softmax(-1).gather(-1, said).squeeze(-1) for x in (own, other))
            terms = -(log_q - log_p.detach()) * (log_p - log_p.detach()).exp()
        else:
            ids = rollouts.student.ids[b, :n]
            log_p, log_q = (x.log_softmax(-1).gather(-1, ids) for x in (own, other))
            advantage = log_p.detach().softmax(-1) * (log_q - log_p.detach())
            terms = -(advantage * (log_p - log_p.detach()).exp()).sum(-1)
            ratio = torch.cat([torch.ones(1, dtype=torch.float64), ratio[:-1]])
        total = total + (weight[b, :n].double() * ratio * terms).sum()
    total = total / rollouts.response_mask.sum()
    total.backward()
    return total.item(), gradients(student)


@pytest.mark.parametrize("loss", ["topk_reverse_kl", "sampled_token"])
@pytest.mark.parametrize("cap", [1.2, 1e6])
def test_loss_and_gradient_are_weighted_by_the_truncated_ratio(engine, loss, cap):
    settings = {"objective.loss": loss}
    result, before, after = run_step(sampler=engine, **settings, **ENGINE, **{CAP: cap})
    want, gradient = by_hand(before, result.rollouts, result.weight, cap, loss)
    assert result.loss == pytest.approx(want, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradients(after).double(), gradient, rtol=1e-3, atol=1e-5)
    plain, _, _ = run_step(sampler=engine, **settings, **ENGINE)
    assert abs(plain.loss - want) > 1e-3 * abs(want), "a correction that does nothing would pass"


@pytest.mark.parametrize("loss", ["topk_reverse_kl", "sampled_token", "forward_kl", "reverse_kl", "jsd"])
def test_an_engine_with_the_students_own_weights_changes_nothing(loss):
    own, _, after = run_step(**{"objective.loss": loss})
    engine = OtherEngine(tiny_model("qwen3", seed=3))
    other, _, twin = run_step(sampler=engine, **ENGINE, **{"objective.loss": loss, CAP: 2.0})
    assert other.trainer_logprobs.any() and other.loss == pytest.approx(own.loss, abs=1e-6)
    torch.testing.assert_close(gradients(twin), gradients(after), rtol=0, atol=1e-6)


def test_micro_batches_change_nothing(engine):
    one, _, student = run_step(sampler=engine, **ENGINE, **{CAP: 2.0})
    again, _, twin = run_step(sampler=engine, **ENGINE, **{CAP: 2.0, "training.micro_batch_tokens": 1})
    assert again.loss == pytest.approx(one.loss, rel=1e-5)
    torch.testing.assert_close(gradients(twin), gradients(student), rtol=1e-4, atol=1e-6)


def test_the_task_is_corrected_at_the_sampled_token(engine):
    """With the teacher's part at 0, the gradient is that of -A · min(cap, p/q) · log p(y)."""

    def rewards(numbers, rollouts):
        return (rollouts.response_ids % 2 == 0).sum(-1).double()

    settings = {"reward.function": "grade", "rollout.num_generations": 4, "reward.opd_kl_coef": 0.0, CAP: 1.2}
    result, before, after = run_step(sampler=engine, reward=rewards, **ENGINE, **settings)
    rollouts, student = result.rollouts, copy.deepcopy(before).double()
    advantage = reference.group_advantage(result.rewards.numpy(), 4)
    total = torch.zeros((), dtype=torch.float64)
    for b, n in enumerate(rollouts.lengths.tolist()):
        ids = torch.tensor([[*rollouts.prompts[b], *rollouts.response_ids[b, :n].tolist()]])
        logits = student(ids).logits[0, len(rollouts.prompts[b]) - 1 : -1]
        log_p = logits.log_softmax(-1).gather(-1, rollouts.response_ids[b, :n, None]).squeeze(-1)
        ratio = (log_p.detach() - rollouts.sampled_logprobs[b, :n].double()).exp().clamp(max=1.2)
        total = total - (advantage[b] * ratio * log_p).sum()
    (total / rollouts.response_mask.sum()).backward()
    assert gradients(student).abs().max() > 1e-3
    torch.testing.assert_close(gradients(after).double(), gradients(student), rtol=1e-3, atol=1e-5)


def test_the_gap_is_logged_with_the_correction_or_without(engine):
    result, before, _ = run_step(sampler=engine, **ENGINE)
    rollouts = result.rollouts
    gaps = torch.cat(
        [
            (at_sampled(before, rollouts, b) - rollouts.sampled_logprobs[b, :n]).detach()
            for b, n in enumerate(rollouts.lengths.tolist())
        ]
    )
    found = metrics_of(result, config_of())
    assert found["rollout/logprob_gap_mean"] == pytest.approx(gaps.abs().mean().item(), rel=1e-3)
    assert found["rollout/logprob_gap_max"] == pytest.approx(gaps.abs().max().item(), rel=1e-3)
    assert found["rollout/engine_kl"] == pytest.approx((gaps.exp() - 1 - gaps).mean().item(), rel=1e-2)
    assert found["rollout/engine_kl"] > 0.01


def test_nothing_of_it_where_the_student_sampled_itself():
    result, _, _ = run_step()
    assert result.trainer_logprobs is None
    assert not [name for name in metrics_of(result, config_of()) if "logprob_gap" in name or "engine" in name]

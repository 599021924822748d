"""The step with a reward of the task: the sum of two terms, each computed once more from each rollout alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from prune_opd.reporting.metrics import metrics_of
from tests.core import reference
from tests.families import tiny_model
from tests.test_step import by_hand, config_of, gradients, related, run_step

LOSSES = ["topk_reverse_kl", "sampled_token", "forward_kl", "reverse_kl", "jsd"]
GRADED = {"reward.function": "grade", "rollout.num_generations": 4}


def even_tokens(numbers, rollouts) -> torch.Tensor:
    """Share of even token ids, and nothing for the third rollout."""
    mask = rollouts.response_mask
    rewards = ((rollouts.response_ids % 2 == 0) & mask).sum(-1).double() / mask.sum(-1)
    rewards[2] = torch.nan
    return rewards


def task_gradient(student, rollouts, rewards, group_size):
    """Each rollout through a float64 model alone: -Σ_t A log p(y_t) over all valid tokens, over their number."""
    student = copy.deepcopy(student).double()
    advantage = reference.group_advantage(rewards.numpy(), group_size)
    loss = torch.zeros((), dtype=torch.float64)
    for prompt, row, n, a in zip(
        rollouts.prompts, rollouts.response_ids, rollouts.lengths.tolist(), advantage, strict=True
    ):
        logits = student(torch.tensor([[*prompt, *row[:n].tolist()]])).logits[0, len(prompt) - 1 : -1]
        loss = loss - a * logits.log_softmax(-1).gather(-1, row[:n, None]).sum()
    (loss / rollouts.response_mask.sum()).backward()
    return gradients(student)


@pytest.mark.parametrize("coefficient", [1.0, 0.25, 0.0])
def test_the_gradient_is_that_of_the_task_plus_the_coefficient_times_the_teachers(coefficient):
    settings = GRADED | {"reward.opd_kl_coef": coefficient}
    result, before, after = run_step(reward=even_tokens, **settings)
    *_, teacher = by_hand(before, related(before), result.rollouts, config_of())
    task = task_gradient(before, result.rollouts, result.rewards, 4)
    assert task.abs().max() > 1e-3 and teacher.abs().max() > 1e-3
    torch.testing.assert_close(gradients(after).double(), task + coefficient * teacher, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_the_task_term_beside_it(loss):
    """The two gradients apart and together; the shared pass over the vocabulary must change neither."""
    settings = {"objective.loss": loss}
    both, before, mixed = run_step(reward=even_tokens, **settings, **GRADED)
    _, _, alone = run_step(**settings)
    task = task_gradient(before, both.rollouts, both.rewards, 4)
    torch.testing.assert_close(gradients(mixed).double() - task, gradients(alone).double(), rtol=1e-4, atol=1e-5)


def test_the_union_of_candidates_keeps_its_place_beside_the_sampled_token():
    settings = {"objective.top_k_strategy": "union"}
    both, before, mixed = run_step(reward=even_tokens, **settings, **GRADED)
    _, _, alone = run_step(**settings)
    task = task_gradient(before, both.rollouts, both.rewards, 4)
    torch.testing.assert_close(gradients(mixed).double() - task, gradients(alone).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [1.0, 0.1, torch.nan])
def test_rewards_that_are_all_equal_or_missing_change_nothing(value):
    same, _, with_reward = run_step(
        reward=lambda numbers, rollouts: torch.full((len(rollouts.prompts),), value, dtype=torch.float64), **GRADED
    )
    plain, _, without = run_step()
    assert same.loss == pytest.approx(plain.loss, rel=1e-6)
    torch.testing.assert_close(gradients(with_reward), gradients(without), rtol=1e-5, atol=1e-7)


def test_where_reliability_is_gone_the_task_goes_on_alone():
    """w_drop 0.2: the fifth event and all that follows lose the teacher's term, w_base and all, and keep the task's."""
    settings = GRADED | {"reward.after_drift": "task_only"}
    result, before, after = run_step(reward=even_tokens, **settings)
    gone = (result.events.cumsum(-1) >= 5) & result.rollouts.response_mask
    kept = result.rollouts.response_mask & ~gone
    assert gone.any() and kept.any()
    assert (result.weight[gone] == 0).all() and (result.weight[kept] > 0.5).all()
    both, _, _ = run_step(reward=even_tokens, **GRADED)
    assert (both.weight[gone] == 0.5).all(), "by default the teacher keeps its base weight there"
    assert torch.equal(both.weight[kept], result.weight[kept])

    # The teacher's gradient with w = R + 0.5 where R > 0 and 0 elsewhere is that of w_base 0.5 less that of the rest.
    task = task_gradient(before, result.rollouts, result.rewards, 4)
    student = copy.deepcopy(before).double()
    teacher = related(before).double()
    loss = torch.zeros((), dtype=torch.float64)
    for b, (prompt, n) in enumerate(zip(result.rollouts.prompts, result.rollouts.lengths.tolist(), strict=True)):
        ids = torch.tensor([[*prompt, *result.rollouts.response_ids[b, :n].tolist()]])
        own, other = (m(ids).logits[0, len(prompt) - 1 : -1] for m in (student, teacher))
        top = own.topk(4).indices
        log_p, log_q = own.log_softmax(-1).gather(-1, top), other.log_softmax(-1).gather(-1, top).detach()
        count = result.events[b, :n].cumsum(-1)
        weight = torch.where(count < 5, 1.5 - 0.2 * count, torch.zeros(n)).double()
        share = log_p.detach().softmax(-1)
        loss = loss - (weight[:, None] * share * (log_q - log_p.detach()) * log_p).sum()
    (loss / result.rollouts.response_mask.sum()).backward()
    torch.testing.assert_close(gradients(after).double(), task + gradients(student), rtol=1e-4, atol=1e-6)


def test_task_only_with_no_reliable_token_at_all_is_the_task_alone():
    settings = GRADED | {"objective.weight_normalization": "weight_mean", "pruning.threshold": 1.0}
    settings |= {"pruning.w_drop": 1.0, "reward.after_drift": "task_only"}
    teacher = tiny_model("qwen3", seed=9)
    result, before, after = run_step(teacher=teacher, reward=even_tokens, **settings)
    assert not result.weight.any()
    task = task_gradient(before, result.rollouts, result.rewards, 4)
    torch.testing.assert_close(gradients(after).double(), task, rtol=1e-4, atol=1e-6)


def test_micro_batches_change_nothing():
    one, _, student = run_step(reward=even_tokens, **GRADED)
    again, _, twin = run_step(reward=even_tokens, **GRADED, **{"training.micro_batch_tokens": 1})
    assert again.loss == pytest.approx(one.loss, rel=1e-5)
    torch.testing.assert_close(gradients(twin), gradients(student), rtol=1e-4, atol=1e-6)


def test_the_reward_alone_is_learnt():
    """With no teacher in the loss, the same steps raise the share of even tokens, or lower it when it is a penalty."""
    settings = GRADED | {"reward.opd_kl_coef": 0.0, "training.learning_rate": 2e-2, "pruning.enable": False}

    def share_after_training(sign: float) -> float:
        student = tiny_model("qwen3", seed=3)
        for step in range(10):
            result, _, student = run_step(student, step=step, reward=lambda n, r: sign * even_tokens(n, r), **settings)
        return even_tokens(result.numbers, result.rollouts).nanmean().item()

    assert share_after_training(1.0) > share_after_training(-1.0) + 0.5


def test_metrics_of_the_reward():
    settings = GRADED | {"rollout.num_generations": 2}
    given = torch.tensor([1, 0, 1, 1, torch.nan, torch.nan, torch.nan, 0], dtype=torch.float64)
    result, _, _ = run_step(reward=lambda numbers, rollouts: given, **settings)
    found = metrics_of(result, config_of(**settings))
    assert found["reward/mean"] == pytest.approx(3 / 5)
    assert found["reward/std"] == pytest.approx(np.std([1, 0, 1, 1, 0]))
    assert found["reward/frac_zero_std"] == 3 / 4
    assert found["reward/missing"] == pytest.approx(3 / 8)
    assert found["time/reward"] >= 0
    plain, _, _ = run_step()
    assert not any("reward" in key for key in metrics_of(plain, config_of()))

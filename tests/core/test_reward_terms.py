"""The task's reward in the objective: advantages within a prompt's group, and the policy gradient that uses them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.core.objective import group_advantage, policy_gradient

from . import reference

seeds = st.integers(0, 2**32 - 1)


def rewards_of(seed: int, groups: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rewards = rng.choice([0.0, 1.0, 0.1, -2.5], size=groups * size)
    rewards[rng.random(groups * size) < 0.2] = np.nan
    return rewards


# ---- advantages ----


@given(seeds, st.integers(1, 4), st.integers(1, 6))
def test_advantages_agree_with_the_reference(seed, groups, size):
    rewards = rewards_of(seed, groups, size)
    got = group_advantage(torch.from_numpy(rewards), size)
    np.testing.assert_allclose(got.numpy(), reference.group_advantage(rewards, size), rtol=1e-9, atol=1e-9)


def test_advantages_by_hand():
    """[1, 0, 0, 0]: mean 1/4, unbiased standard deviation 1/2."""
    got = group_advantage(torch.tensor([1.0, 0, 0, 0, 3, 5, 3, 5], dtype=torch.float64), 4)
    want = [1.5, -0.5, -0.5, -0.5, *(3**0.5 / 2 * np.array([-1, 1, -1, 1]))]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -7.3, 1e30])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_equal_rewards_say_exactly_nothing(value, size):
    """Three times 0.1 has a mean that is not 0.1: a standard deviation compared with zero would let 1e-17 through."""
    rewards = torch.full((2 * size,), value, dtype=torch.float64)
    assert (group_advantage(rewards, size) == 0).all()
    rewards[0] = torch.nan
    assert (group_advantage(rewards, size) == 0).all()


def test_a_single_reward_or_none_says_nothing():
    nan = torch.nan
    assert (group_advantage(torch.tensor([nan, nan, 4.0, nan, nan, nan]), 3) == 0).all()


@given(seeds, st.floats(-5, 5), st.floats(0.5, 5))
def test_shift_scale_and_order_do_not_matter(seed, shift, scale):
    rewards = torch.from_numpy(rewards_of(seed, 3, 4))
    base = group_advantage(rewards, 4)
    torch.testing.assert_close(group_advantage(rewards + shift, 4), base, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(group_advantage(scale * rewards, 4), base, atol=1e-4, rtol=1e-4)  # 1e-6 beside the std
    turned = rewards.unflatten(0, (3, 4)).flip(0, 1)
    torch.testing.assert_close(group_advantage(turned.flatten(), 4).unflatten(0, (3, 4)).flip(0, 1).flatten(), base)


def test_groups_do_not_touch_each_other():
    rewards = torch.tensor([1.0, 0, 1, 1, 0, 0], dtype=torch.float64)
    other = rewards.clone()
    other[3:] = torch.tensor([9.0, -4, 2])
    assert torch.equal(group_advantage(rewards, 3)[:3], group_advantage(other, 3)[:3])


@pytest.mark.parametrize("size", [0, 4])
def test_rewards_that_do_not_split_are_an_error(size):
    with pytest.raises(ValueError, match=f"6 rewards do not split into groups of {size}"):
        group_advantage(torch.zeros(6), size)


# ---- the policy gradient ----


def sampled_case(seed: int):
    """Logits (B, T, V), sampled ids, advantages, a mask with holes, weights; float64."""
    rng = np.random.default_rng(seed)
    B, T, V = 3, 4, 6
    logits, tokens = rng.normal(size=(B, T, V)), rng.integers(0, V, (B, T))
    advantage, mask, weight = rng.normal(size=(B, T)), rng.random((B, T)) < 0.6, rng.random((B, T))
    mask[0, 0] = True
    return logits, tokens, advantage, mask, weight * mask


def on_tokens(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.take_along_axis(reference.log_softmax(logits), tokens[..., None], -1)[..., 0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalization", ["token_mean", "weight_mean"])
def test_the_gradient_is_that_of_the_surrogate_by_finite_differences(weighted, normalization):
    """-Σ w A p_θ(y) / p(y), p held fixed: in float64 numpy, moved one logit at a time."""
    logits, tokens, advantage, mask, weight = sampled_case(5)
    w = weight if weighted else mask.astype(float)
    here = on_tokens(logits, tokens)

    def surrogate(x):
        return -(w * mask * advantage * np.exp(on_tokens(x, tokens) - here)).sum()

    student = torch.from_numpy(logits).requires_grad_()
    at = student.log_softmax(-1).gather(-1, torch.from_numpy(tokens)[..., None]).squeeze(-1)
    loss, sums = policy_gradient(
        at,
        torch.from_numpy(advantage),
        torch.from_numpy(mask),
        torch.from_numpy(weight) if weighted else None,
        normalization=normalization,
    )
    denominator = mask.sum() if normalization == "token_mean" else w.sum()
    assert float(sums.loss.detach()) == pytest.approx(surrogate(logits), rel=1e-9)
    assert float(loss.detach()) == pytest.approx(surrogate(logits) / denominator, rel=1e-9)
    (grad,) = torch.autograd.grad(sums.loss, student)
    np.testing.assert_allclose(grad, reference.central_difference(surrogate, logits), atol=1e-8)


def test_in_expectation_it_climbs_the_expected_reward():
    """Every two-token answer of a three-token language, each by its probability, against d E[r] / d logits."""
    rng = np.random.default_rng(1)
    logits, V = rng.normal(size=(1, 2, 3)), 3
    reward = {answer: rng.normal() for answer in itertools.product(range(V), repeat=2)}

    def expected(x):
        log_p = reference.log_softmax(x)[0]
        return sum(r * np.exp(log_p[0, a] + log_p[1, b]) for (a, b), r in reward.items())

    climbed = np.zeros(logits.shape)
    for answer, r in reward.items():
        student = torch.from_numpy(logits).requires_grad_()
        at = student.log_softmax(-1).gather(-1, torch.tensor(answer)[None, :, None]).squeeze(-1)
        sums = policy_gradient(at, torch.full((1, 2), r - 0.4, dtype=torch.float64), torch.ones(1, 2).bool())[1]
        (grad,) = torch.autograd.grad(sums.loss, student)
        climbed -= np.exp(on_tokens(logits, np.array([answer])).sum()) * grad.numpy()
    want = reference.central_difference(expected, logits)
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(climbed, want, atol=1e-8)  # the baseline of 0.4 cancels


def test_padding_may_hold_anything():
    logits, tokens, advantage, mask, _ = sampled_case(2)
    clean = on_tokens(logits, tokens)
    dirty, other = clean.copy(), advantage.copy()
    dirty[~mask], other[~mask] = np.nan, np.inf
    found = []
    for at, a in ((clean, advantage), (dirty, other)):
        student = torch.from_numpy(at).requires_grad_()
        loss = policy_gradient(student, torch.from_numpy(a), torch.from_numpy(mask))[0]
        (grad,) = torch.autograd.grad(loss, student)
        found.append((loss.detach(), grad))
    assert not mask.all()
    torch.testing.assert_close(found[0], found[1])


def test_no_gradient_reaches_the_advantage():
    advantage = torch.ones(1, 2, requires_grad=True)
    loss = policy_gradient(torch.zeros(1, 2, requires_grad=True), advantage, torch.ones(1, 2).bool())[0]
    loss.backward()
    assert advantage.grad is None

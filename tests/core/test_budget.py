"""The number of prompts that a budget of tokens pays for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.core.budget import MOST_TIMES, TokenBudget


def test_a_step_gets_what_the_mean_length_of_the_one_before_pays_for():
    budget = TokenBudget(1000, prompts=4, num_generations=2)
    assert (budget.prompts, budget.first) == (4, 0)
    budget.update(torch.tensor([100, 100, 60, 60, 20, 20, 140, 140]))  # 80 on average: 12.5 rollouts
    assert (budget.prompts, budget.first) == (6, 4)
    budget.update(torch.full((12,), 40))
    assert (budget.prompts, budget.first) == (12, 10)
    budget.update(torch.full((24,), 1))
    assert (budget.prompts, budget.first) == (4 * MOST_TIMES, 22)
    budget.update(torch.full((64,), 5000))
    assert (budget.prompts, budget.first) == (1, 54)
    budget.skip()
    assert (budget.prompts, budget.first) == (1, 55)


@given(
    st.integers(1, 10**6),
    st.integers(1, 64),
    st.integers(1, 8),
    st.lists(st.lists(st.integers(0, 5000), min_size=1, max_size=9), max_size=6),
)
def test_no_prompt_is_left_out_or_asked_twice_and_a_state_goes_on(tokens, prompts, generations, steps):
    budget = TokenBudget(tokens, prompts=prompts, num_generations=generations)
    seen = 0
    for lengths in steps:
        assert budget.first == seen and 1 <= budget.prompts <= MOST_TIMES * prompts
        seen += budget.prompts
        twin = TokenBudget(tokens, prompts=prompts, num_generations=generations)
        twin.load_state_dict(budget.state_dict())
        for either in (budget, twin):
            either.update(torch.tensor(lengths))
        assert budget.state_dict() == twin.state_dict()
        per_prompt = max(generations * sum(lengths) / len(lengths), 1.0)
        if 1 < budget.prompts < MOST_TIMES * prompts:  # rounded to whole prompts
            assert abs(budget.prompts * per_prompt - tokens) <= per_prompt / 2 + 1e-6


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        TokenBudget(0, prompts=1, num_generations=1)
    budget = TokenBudget(10, prompts=2, num_generations=1)
    with pytest.raises(ValueError, match=r"17 prompts lie outside \[1, 16\]"):
        budget.load_state_dict({"prompts": 17, "first": 0})

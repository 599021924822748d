"""Truncated importance of the trained policy over the engine that sampled."""

from __future__ import annotations

import math

import pytest
import torch

from prune_opd.core.importance import truncated_importance


def test_values_by_hand():
    trainer = torch.tensor([[-1.0, -2.0, -0.5, 7.0], [-3.0, -1.0, math.nan, math.nan]])
    engine = torch.tensor([[-1.5, -1.0, -2.5, -math.inf], [-3.0, -3.0, 0.0, math.nan]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    want = [[min(2, math.exp(0.5)), math.exp(-1), 2.0, 1.0], [1.0, 2.0, 1.0, 1.0]]
    of_token = truncated_importance(trainer, engine, mask, cap=2, at_sampled_token=True)
    torch.testing.assert_close(of_token, torch.tensor(want))
    of_prefix = truncated_importance(trainer, engine, mask, cap=2, at_sampled_token=False)
    torch.testing.assert_close(of_prefix, torch.tensor([[1.0, *row[:-1]] for row in want]))


def test_it_makes_expectations_under_the_engine_those_under_the_trainer():
    """Over all tokens of a small vocabulary, exactly; and the cap lowers it, never raises it."""
    torch.manual_seed(0)
    trainer, engine = (torch.randn(1, 50, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    values, mask = torch.rand(1, 50, dtype=torch.float64), torch.ones(1, 50, dtype=torch.bool)
    of_token = truncated_importance(trainer, engine, mask, cap=1e9, at_sampled_token=True)
    under_trainer, under_engine = (trainer.exp() * values).sum(), (engine.exp() * values).sum()
    assert (engine.exp() * of_token * values).sum().item() == pytest.approx(under_trainer.item())
    assert abs(under_trainer - under_engine) > 0.01
    capped = truncated_importance(trainer, engine, mask, cap=1.5, at_sampled_token=True)
    assert (capped <= of_token).all() and capped.max() == 1.5


def test_no_gradient_goes_through_it():
    trainer = torch.randn(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert not truncated_importance(trainer, torch.zeros(2, 3), mask, cap=2, at_sampled_token=True).requires_grad

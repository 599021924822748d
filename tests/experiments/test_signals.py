"""Each signal of drift against what it is said to be, worked out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from prune_opd.experiments.signals import drift_signals
from prune_opd.types import Rollouts, TeacherScores, TopK


def test_signals_of_three_tokens():
    """K = 2 of a vocabulary of 6: agreement, agreement in part, none. The fourth position is padding."""
    student = TopK(
        torch.tensor([[[0, 1], [0, 1], [0, 1], [0, 1]]]),
        torch.tensor([[[0.5, 0.3]] * 4]).log(),
        torch.tensor([[1.0, 1.0, 2.0, 0.0]]),
    )
    teacher = TopK(
        torch.tensor([[[1, 0], [2, 0], [3, 4], [0, 1]]]),
        torch.tensor([[[0.6, 0.2], [0.7, 0.1], [0.4, 0.3], [0.5, 0.5]]]).log(),
        torch.tensor([[0.5, 1.0, 1.5, 0.0]]),
    )
    sampled = torch.tensor([[0.5, 0.3, 0.5, 1.0]]).log()
    rollouts = Rollouts(
        prompts=[[5]],
        response_ids=torch.tensor([[0, 1, 0, 0]]),
        response_mask=torch.tensor([[True, True, True, False]]),
        finished=torch.tensor([False]),
        stopped=torch.tensor([False]),
        student=student,
        sampled_logprobs=sampled,
    )
    theirs = torch.tensor([[0.2, 0.05, 0.01, 0.1]]).log()
    found = drift_signals(rollouts, TeacherScores(teacher, torch.zeros(1, 4, 2), theirs))
    apart = [math.log(0.5 / 0.2), math.log(0.3 / 0.05), math.log(0.5 / 0.01)]
    expected = {
        "1 - overlap, K = 2": [0, 0.5, 1],
        "1 - overlap mass": [1 - 0.8, 1 - 0.5, 1],
        "teacher nucleus": [0.6, 1, 1],
        "teacher's surprise": [-math.log(0.2), -math.log(0.05), -math.log(0.01)],
        "sum of |log q - log p|": [apart[0], sum(apart[:2]), sum(apart)],
        "entropy gap": [0.5, 0, 0.5],
        "top-1 outside": [0, 1, 2],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name][0, :3].tolist() == pytest.approx(values, abs=1e-6), name


def test_smaller_k_looks_at_the_likeliest_alone():
    ids = torch.arange(10).expand(1, 1, 10)
    other = torch.cat([torch.arange(4), torch.arange(20, 26)]).expand(1, 1, 10)
    topk = [TopK(i, torch.full((1, 1, 10), 0.1).log(), torch.zeros(1, 1)) for i in (ids, other)]
    mask, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1)
    rollouts = Rollouts([[0]], torch.zeros(1, 1).long(), mask, mask[0], mask[0], topk[0], sampled_logprobs=zero)
    found = drift_signals(rollouts, TeacherScores(topk[1], torch.zeros(1, 1, 10), zero))
    overlaps = {name: 1 - values.item() for name, values in found.items() if "K = " in name}
    assert overlaps == pytest.approx({"1 - overlap, K = 4": 1, "1 - overlap, K = 8": 0.5, "1 - overlap, K = 10": 0.4})

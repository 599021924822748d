"""Controls against what they promise: exact lengths, an exact number of tokens, every token as likely as any other."""

from __future__ import annotations

import torch

from prune_opd.core.window import LengthSchedule
from prune_opd.experiments.arms import linear_ramp
from prune_opd.update.weights import random_tokens
from tests.test_step import gradients, run_step

ROWS = range(4)
RAGGED = torch.arange(9) < torch.tensor([9, 0, 3, 6])[:, None]


def test_a_ramp_is_a_straight_line_with_both_ends():
    assert linear_ramp(48, 68, 6) == [48, 52, 56, 60, 64, 68]
    assert linear_ramp(10, 5, 3) == [10, 8, 5]  # 7.5 rounds to the even 8
    assert linear_ramp(10, 50, 1) == [10]


def test_a_schedule_goes_through_its_lengths_whatever_drift_says():
    schedule = LengthSchedule([4, 8, 6])
    effective = torch.tensor([4, 0, 7, 9])
    changes = [schedule.update(effective) for _ in range(4)]
    assert [(c.previous_length, c.length) for c in changes] == [(4, 8), (8, 6), (6, 6), (6, 6)]
    assert [c.hit_ratio for c in changes[:2]] == [0.75, 0.25]
    again = LengthSchedule([4, 8, 6])
    again.load_state_dict({"steps_done": 1})
    assert again.length == 8


def test_random_tokens_are_so_many_and_valid_and_repeatable():
    weight = random_tokens(RAGGED, 7, seed=3, step=5, numbers=ROWS)
    assert weight.sum() == 7 and not weight[~RAGGED].any() and set(weight.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(weight, random_tokens(RAGGED, 7, seed=3, step=5, numbers=ROWS))
    for other in ({"seed": 4, "step": 5}, {"seed": 3, "step": 6}):
        assert not torch.equal(weight, random_tokens(RAGGED, 7, **other, numbers=ROWS))
    assert torch.equal(random_tokens(RAGGED, 99, seed=0, step=0, numbers=ROWS), RAGGED.float())


def test_every_token_is_as_likely_to_stay():
    """400 draws of 6 of 18 tokens: each stays in a third of them, within 5 standard deviations."""
    share = torch.stack([random_tokens(RAGGED, 6, seed=0, step=step, numbers=ROWS) for step in range(400)]).mean(0)[
        RAGGED
    ]
    assert (share - 1 / 3).abs().max() < 5 * (1 / 3 * 2 / 3 / 400) ** 0.5


def test_a_step_trains_on_the_drawn_tokens_alone(monkeypatch):
    """Two disjoint halves of the tokens have gradients that add up to that of all tokens."""
    off = {"pruning.enable": False, "objective.weight_normalization": "weight_mean"}
    whole, _, all_tokens = run_step(**off)
    half, _, some = run_step(**off, **{"control.kept_tokens": [40] * 203})
    mask = whole.rollouts.response_mask
    drawn = random_tokens(mask, 40, seed=0, step=0, numbers=range(len(mask)))
    assert torch.equal(half.weight, drawn) and half.weight.sum() == 40 < mask.sum()
    assert half.rollouts.lengths.tolist() == whole.rollouts.lengths.tolist(), "responses are not cut"
    count = int(mask.sum())
    rest = (gradients(all_tokens) * count - gradients(some) * 40) / (count - 40)
    monkeypatch.setattr("prune_opd.update.weights.random_tokens", lambda *args, **kwargs: mask.float() - drawn)
    _, _, others = run_step(**off, **{"control.kept_tokens": [40] * 203})
    torch.testing.assert_close(gradients(others), rest, rtol=1e-3, atol=1e-5)


def test_a_window_without_weights_steers_as_the_window_with_them():
    weighed, _, _ = run_step()
    flat, _, student = run_step(**{"pruning.reweight": False})
    assert torch.equal(flat.weight, flat.rollouts.response_mask.float())
    assert not torch.equal(weighed.weight, flat.weight)
    assert flat.window == weighed.window and flat.events.any()
    _, _, plain = run_step(**{"pruning.enable": False, "rollout.max_completion_length": 12})
    torch.testing.assert_close(gradients(student), gradients(plain))


def test_a_schedule_sets_the_length_of_the_step():
    result, _, _ = run_step(**{"pruning.enable": False, "control.lengths": [7, *[16] * 202]})
    assert result.rollouts.lengths.max() == 7
    assert (result.window.previous_length, result.window.length) == (7, 16)

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.core.window import TrainingWindow

from . import reference

PUBLISHED = {
    "init_len": 1024,
    "min_len": 1024,
    "max_len": 12288,
    "step": 100,
    "hit_ratio": 0.1,
    "margin": 100,
    "shrink_patience": 3,
}
SMALL = {
    "init_len": 20,
    "min_len": 8,
    "max_len": 40,
    "step": 5,
    "hit_ratio": 0.3,
    "margin": 4,
    "shrink_patience": 2,
}


def step(window: TrainingWindow, lengths: list[int]):
    change = window.update(torch.tensor(lengths))
    assert change.length == window.length
    return change.previous_length, change.length, change.hit_ratio, change.misses


def test_published_settings_by_hand():
    window = TrainingWindow(**PUBLISHED)
    assert window.length == 1024
    one_of_ten = lambda long: [long] + [500] * 9  # noqa: E731
    # At 1024 the bar is max(1024, 924) = 1024; one rollout of ten is exactly the hit ratio.
    assert step(window, one_of_ten(1024)) == (1024, 1124, 0.1, 0)
    # At 1124 the bar is still 1024.
    assert step(window, one_of_ten(1023)) == (1124, 1124, 0.0, 1)
    assert step(window, one_of_ten(1023)) == (1124, 1124, 0.0, 2)
    assert step(window, one_of_ten(1024)) == (1124, 1224, 0.1, 0)  # a hit forgives the misses
    # At 1224 the bar is 1124; the third miss in a row shrinks, and the count starts again.
    assert step(window, one_of_ten(1123)) == (1224, 1224, 0.0, 1)
    assert step(window, one_of_ten(1123)) == (1224, 1224, 0.0, 2)
    assert step(window, one_of_ten(1123)) == (1224, 1124, 0.0, 0)
    # Nine misses more: 1124 -> 1024, and there it stays.
    lengths = [step(window, [500] * 10)[1] for _ in range(9)]
    assert lengths == [1124, 1124, 1024, 1024, 1024, 1024, 1024, 1024, 1024]


def test_growth_stops_at_the_maximum():
    window = TrainingWindow(**{**PUBLISHED, "init_len": 12200})
    assert [step(window, [12288])[1] for _ in range(3)] == [12288, 12288, 12288]


settings = st.fixed_dictionaries(
    {
        "min_len": st.integers(1, 30),
        "step": st.integers(1, 20),
        "hit_ratio": st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1.0]),
        "margin": st.integers(0, 20),
        "shrink_patience": st.integers(1, 4),
    }
).flatmap(
    lambda s: st.tuples(st.integers(0, 40), st.integers(0, 40)).map(
        lambda extra: {**s, "init_len": s["min_len"] + min(extra), "max_len": s["min_len"] + max(extra)}
    )
)
histories = st.lists(st.lists(st.integers(0, 80), min_size=1, max_size=10), max_size=30)


@given(settings, histories)
def test_trace_agrees_with_the_reference(chosen, history):
    window = TrainingWindow(**chosen)
    trace = [step(window, batch) for batch in history]
    expected = reference.window_trace(history, **chosen)
    for got, want in zip(trace, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-6)
        assert (got[0], got[1], got[3]) == (want[0], want[1], want[3])


@pytest.mark.parametrize("n", range(1, 11))
def test_a_hit_ratio_met_exactly_is_a_hit(n):
    """7 hits of 10 meet a ratio of 0.7, whatever float32 makes of either."""
    window = TrainingWindow(**{**SMALL, "hit_ratio": n / 10})
    assert step(window, [20] * n + [0] * (10 - n))[:2] == (20, 25)


@given(settings, histories, st.data())
def test_state_round_trip_in_mid_sequence(chosen, history, data):
    cut = data.draw(st.integers(0, len(history)), label="cut")
    window = TrainingWindow(**chosen)
    for batch in history[:cut]:
        step(window, batch)
    state = copy.deepcopy(window.state_dict())
    rest = [step(window, batch) for batch in history[cut:]]
    resumed = TrainingWindow(**chosen)
    resumed.load_state_dict(state)
    assert [step(resumed, batch) for batch in history[cut:]] == rest
    assert resumed.state_dict() == window.state_dict()


def test_a_saved_state_does_not_follow_the_window():
    window = TrainingWindow(**SMALL)
    state = window.state_dict()
    before = copy.deepcopy(state)
    step(window, [0])
    assert state == before != window.state_dict()


def test_pending_misses_are_part_of_the_state():
    window = TrainingWindow(**SMALL)
    step(window, [0])
    resumed = TrainingWindow(**SMALL)
    resumed.load_state_dict(window.state_dict())
    assert step(resumed, [0])[1] == 15


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_len": 0},
        {"min_len": 50, "max_len": 40, "init_len": 45},
        {"init_len": 7},
        {"init_len": 41},
        {"step": -1},
        {"hit_ratio": 1.5},
        {"hit_ratio": -0.1},
        {"margin": -1},
        {"shrink_patience": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        TrainingWindow(**{**SMALL, **wrong})

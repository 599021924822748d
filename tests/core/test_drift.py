from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prune_opd.core.drift import DriftMonitor, drift_report

from . import reference

FIELDS = ("reliability", "weight", "effective_length", "onset")
EXACT_DROPS = [0.5, 0.2, 0.1, 0.05, 0.04, 0.02, 0.01, 0.005, 0.001]

shapes = st.tuples(st.integers(1, 4), st.integers(1, 40))
rollouts = shapes.flatmap(lambda s: st.tuples(hnp.arrays(bool, s), hnp.arrays(bool, s)))
drops = st.sampled_from([1.0, 0.3, 0.07, *EXACT_DROPS])


def assert_identical(a, b):
    for field in FIELDS:
        assert torch.equal(getattr(a, field), getattr(b, field)), field


@given(rollouts, drops, st.sampled_from([0.0, 0.5, 1.0]))
def test_agrees_with_the_reference(rollout, w_drop, w_base):
    events, mask = rollout
    report = drift_report(torch.from_numpy(events), torch.from_numpy(mask), w_drop=w_drop, w_base=w_base)
    reliability, weight, effective_length, onset = reference.drift(events, mask, w_drop, w_base)
    assert report.reliability.dtype == torch.float32
    assert report.effective_length.dtype == report.onset.dtype == torch.int64
    np.testing.assert_allclose(report.reliability, reliability, atol=1e-6)
    np.testing.assert_allclose(report.weight, weight, atol=1e-6)
    np.testing.assert_array_equal(report.effective_length, effective_length)
    np.testing.assert_array_equal(report.onset, onset)


def test_by_hand():
    events = torch.tensor([[0, 1, 0, 1, 1, 1]]).bool()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    report = drift_report(events, mask, w_drop=0.5, w_base=0.25)
    assert report.reliability.tolist() == [[1, 0.5, 0.5, 0, 0, 0]]  # an event decays its own position
    assert report.weight.tolist() == [[1.25, 0.75, 0.75, 0.25, 0.25, 0]]
    assert report.effective_length.tolist() == [3]  # reliability counts, the base weight does not
    assert report.onset.tolist() == [1]


def test_published_defaults():
    events = torch.ones(1, 120, dtype=torch.bool)
    report = drift_report(events, torch.ones_like(events))
    assert report.effective_length.tolist() == [99]
    assert report.weight[0, [0, 98, 99, 119]].tolist() == pytest.approx([1.49, 0.51, 0.5, 0.5])


@given(rollouts, drops)
def test_reliability_never_recovers(rollout, w_drop):
    events, mask = map(torch.from_numpy, rollout)
    report = drift_report(events, mask, w_drop=w_drop)
    for row, valid in zip(report.reliability, mask, strict=True):
        assert (row[valid].diff() <= 0).all()
        assert ((row >= 0) & (row <= 1)).all()


@given(rollouts, drops)
def test_one_event_more_never_raises_reliability(rollout, w_drop):
    events, mask = map(torch.from_numpy, rollout)
    more = events.clone()
    more[:, 0] = True
    before, after = (drift_report(e, mask, w_drop=w_drop) for e in (events, more))
    assert (after.reliability <= before.reliability).all()
    assert (after.effective_length <= before.effective_length).all()


@given(rollouts)
def test_events_on_padding_are_ignored(rollout):
    events, mask = map(torch.from_numpy, rollout)
    reports = [drift_report(e, mask, w_drop=0.1) for e in (events & mask, events | ~mask)]
    assert_identical(*reports)
    assert (reports[0].reliability[~mask] == 0).all() and (reports[0].weight[~mask] == 0).all()


@given(rollouts, drops, st.data())
def test_streaming_equals_the_whole_for_every_chunking(rollout, w_drop, data):
    events, mask = map(torch.from_numpy, rollout)
    (B, T), settings = events.shape, {"w_drop": w_drop, "w_base": 0.25}
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=6), label="cuts"))
    monitor = DriftMonitor(B, **settings)
    for start, stop in zip([0, *cuts], [*cuts, T], strict=True):
        spent = monitor.update(events[:, start:stop], mask[:, start:stop])
        seen = (events & mask)[:, :stop].sum(-1)
        expected = [1 - w_drop * int(count) <= 1e-8 for count in seen]
        assert spent.dtype == torch.bool and spent.tolist() == expected
        if stop:
            assert_identical(monitor.report(), drift_report(events[:, :stop], mask[:, :stop], **settings))
    assert_identical(monitor.report(), drift_report(events, mask, **settings))


@pytest.mark.parametrize("w_drop", EXACT_DROPS)
def test_reliability_reaches_exactly_zero(w_drop):
    """1/w_drop events spend all of it: no float32 residue may keep a rollout alive."""
    n = round(1 / w_drop)
    events = torch.ones(1, n + 3, dtype=torch.bool)
    report = drift_report(events, events, w_drop=w_drop)
    assert (report.reliability[0, n - 1 :] == 0).all()
    assert report.reliability[0, n - 2] > 1e-8
    assert report.effective_length.tolist() == [n - 1]

    monitor = DriftMonitor(1, w_drop=w_drop)
    one = torch.ones(1, 1, dtype=torch.bool)
    assert [bool(monitor.update(one, one)) for _ in range(n)] == [False] * (n - 1) + [True]


@pytest.mark.parametrize("n", range(1, 201))
def test_n_events_of_one_nth_spend_it(n):
    """Also where 1/n is no short decimal; for 1/41 a product in float32 leaves 6e-8, six times eps."""
    events = torch.ones(1, n, dtype=torch.bool)
    report = drift_report(events, events, w_drop=1 / n)
    assert report.effective_length.tolist() == [n - 1]
    assert report.reliability[0, -1] <= 1e-8


def test_the_float32_residue_is_real():
    """Written in float32 the rule does leave a residue above eps, so the test above can fail."""
    assert 1 - torch.tensor(1 / 41) * 41 > 1e-8


def test_rollouts_are_independent():
    events, mask = torch.rand(6, 20) < 0.4, torch.rand(6, 20) < 0.8
    whole = drift_report(events, mask, w_drop=0.2)
    for b in range(6):
        alone = drift_report(events[b : b + 1], mask[b : b + 1], w_drop=0.2)
        for field in FIELDS:
            assert torch.equal(getattr(whole, field)[b : b + 1], getattr(alone, field))

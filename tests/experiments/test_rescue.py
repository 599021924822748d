"""The statistics of `probe`, on cuts made so that drift matters or does not: it must say both."""

from __future__ import annotations

import numpy as np
import pytest

from prune_opd.experiments.rescue import BUCKETS, analyse, auc, bucket_of, estimate, ratio, resampled, share, verdict

N = 4  # continuations of a cut


def made(what_matters, *, prompts=50, seed=0):
    """Cuts at eight lengths, whose reliability falls with length in every rollout, sooner in some than in others.

    what_matters(length, reliability) -> chance that a continuation gets there, of the length as a share of the longest.
    """
    rng = np.random.default_rng(seed)
    prompt, length = np.repeat(np.arange(prompts), 8), np.tile(np.arange(20, 180, 20), prompts)
    onset = np.repeat(rng.integers(10, 200, prompts), 8)
    reliability = np.clip(1 - (length - onset).clip(0) / 40, 0, 1)
    chance = np.array([what_matters(t / 160, r) for t, r in zip(length, reliability, strict=True)])
    teacher, student = rng.binomial(N, chance), rng.binomial(N, 0.2, len(chance))
    return analyse(prompt, length, reliability, {"length itself": length.astype(float)}, teacher, student, N)


def test_drift_that_matters_is_called_real():
    found = made(lambda t, r: 0.05 + 0.85 * r)
    assert found["verdict"].startswith("drift is real here: behind R = 0 the teacher rescues ")
    assert 0.02 < found["rescued_behind"]["value"] < 0.12, "0.05 of 0.90"
    at_equal = found["signals"][0]["auc_at_equal_length"]
    assert at_equal["low"] > 0.8 and found["signals"][0]["auc"]["value"] > found["length_alone"]["value"]


def test_a_small_effect_is_called_small():
    found = made(lambda t, r: 0.6 - 0.4 * t + 0.15 * r, prompts=300)
    assert found["verdict"].startswith("drift says a little more here than length does")


def test_drift_that_only_goes_with_length_is_not():
    """Over all lengths R predicts well, since it falls as length grows; at equal lengths it says nothing."""
    found = made(lambda t, r: 0.95 - 0.9 * t)
    assert "here, drift means nothing that length does not" in found["verdict"]
    assert found["signals"][0]["auc"]["low"] > 0.55
    assert abs(found["signals"][0]["auc_at_equal_length"]["value"] - 0.5) < 0.05
    assert found["length_alone"]["value"] > 0.7
    assert abs(found["rescued_behind"]["value"] - 1) < 0.25


def test_a_reliability_that_lies_is_the_wrong_way_round():
    assert made(lambda t, r: 0.9 - 0.8 * r)["verdict"].startswith("R is the wrong way round here")


def test_too_few_prompts_are_undecided_and_no_difference_is_none():
    unclear = {"auc_at_equal_length": {"value": 0.56, "low": 0.43, "high": 0.68}}
    assert verdict({"rescue": {"value": 0.5}, "compared": ["R = 0", "R = 1"], "signals": [unclear]}).startswith(
        "undecided"
    )
    assert "from all of the prefixes" in made(lambda t, r: 1.0)["verdict"]
    assert "from none of the prefixes" in made(lambda t, r: 0.0)["verdict"]
    n = 40
    found = analyse(np.arange(n), np.full(n, 9), np.ones(n), {}, np.arange(n) % 5, np.zeros(n, dtype=int), N)
    assert found["verdict"] == "nothing to tell apart: nearly all prefixes have R = 1"


def test_buckets_add_up_and_rates_are_those_of_their_cuts():
    found = made(lambda t, r: 0.05 + 0.85 * r)
    assert sum(row["cuts"] for row in found["by_reliability"]) == 50 * 8
    for first in ("reliability", "from"):
        of_both = {}
        for row in found["by_both"]:
            of_both[row[first]] = of_both.get(row[first], 0) + row["cuts"]
        alone = found["by_reliability"] if first == "reliability" else found["by_length"]
        assert of_both == {row[first]: row["cuts"] for row in alone}
    top, *_, bottom = found["by_reliability"]
    assert top["teacher"]["low"] < 0.9 < top["teacher"]["high"]
    assert bottom["teacher"]["low"] < 0.05 < bottom["teacher"]["high"]
    assert [BUCKETS[i][0] for i in bucket_of(np.array([1, 0.99, 0.5, 0.49, 0.01, 0]))] == [
        "R = 1",
        *["1 > R ≥ 1/2"] * 2,
        *["1/2 > R > 0"] * 2,
        "R = 0",
    ]


def by_hand(score, right, wrong, stratum):
    above = pairs = 0.0
    for i in range(len(score)):
        for j in range(len(score)):
            if stratum[i] == stratum[j]:
                pairs += wrong[i] * right[j]
                above += wrong[i] * right[j] * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
    return above / pairs


def test_auc_is_the_share_of_pairs():
    rng = np.random.default_rng(1)
    score, stratum = rng.integers(0, 5, 30).astype(float), rng.integers(0, 3, 30)
    right = rng.integers(0, N + 1, 30)
    times = np.stack([np.ones(30, dtype=int), rng.integers(0, 3, 30)])
    found = auc(score, right, N - right, times, stratum)
    drawn = times[1]
    assert found[0] == pytest.approx(by_hand(score, right, N - right, stratum))
    assert found[1] == pytest.approx(by_hand(score, drawn * right, drawn * (N - right), stratum))
    assert np.isnan(auc(score, 0 * right, right, times)).all()


def test_the_ratio_is_that_of_each_stratum_where_it_is_the_same_in_all():
    """One bucket lies mostly in the stratum where little is rescued; a plain ratio would be off by far."""
    stratum = np.array([0] * 10 + [1] * 10)
    low = np.array([True] * 2 + [False] * 8 + [True] * 8 + [False] * 2)
    right = np.where(stratum == 0, np.where(low, 2, 4), np.where(low, 1, 2))
    ones = np.ones((1, 20), dtype=int)
    assert ratio(right, N, ones, low, ~low, stratum)[0] == pytest.approx(0.5)
    assert share(right, N, ones, low)[0] / share(right, N, ones, ~low)[0] < 0.35


def test_intervals_resample_prompts_not_cuts():
    """Cuts of one prompt that are all alike tell no more than one of them."""
    rng = np.random.default_rng(2)
    right = rng.integers(0, N + 1, 50)
    everywhere = np.ones(50, dtype=bool)
    once = estimate(share(right, N, resampled(np.arange(50)), everywhere))
    tenfold = estimate(share(right.repeat(10), N, resampled(np.arange(50).repeat(10)), everywhere.repeat(10)))
    assert tenfold == pytest.approx(once)
    assert once["low"] < once["value"] < once["high"]
    assert (resampled(np.arange(50)).sum(-1) == 50).all()

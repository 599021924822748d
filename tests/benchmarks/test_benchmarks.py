"""What the benchmarks make of their samples. No times are taken here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_time.py"


@pytest.fixture(scope="module")
def step_time():
    spec = importlib.util.spec_from_file_location("step_time", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OURS = [{"seconds": s, "tokens": t} for s, t in [(2.0, 10), (1.0, 30), (9.0, 20)]]
PEERS = [{"seconds": s, "tokens": t} for s, t in [(4.0, 10), (4.0, 50), (3.0, 90)]]


def test_medians_spread_and_ratio_of_given_samples(step_time):
    """One slow repeat of ours (9 s) and unsorted values: a mean, a minimum or the last value would all be seen."""
    summary = step_time.summarise({"ours": OURS, "peer": PEERS}, "peer")
    assert summary["ours"]["seconds"] == {"median": 2.0, "min": 1.0, "max": 9.0}
    assert summary["ours"]["tokens"] == {"median": 20, "min": 10, "max": 30}
    assert summary["peer"]["seconds"] == {"median": 4.0, "min": 3.0, "max": 4.0}
    assert summary["ours"]["ratio"] == 0.5
    assert (summary["ours"]["ratio_min"], summary["ours"]["ratio_max"]) == (0.25, 3.0)  # 1/4 and 9/3, side by side
    assert [summary["peer"][name] for name in ("ratio", "ratio_min", "ratio_max")] == [1.0, 1.0, 1.0]
    assert json.loads(json.dumps(summary)) == summary


def test_median_of_an_even_number_of_repeats(step_time):
    """It lies between the middle two; and the ratio does not depend on the order of the arms."""
    samples = {"peer": PEERS[:2], "ours": OURS[:2]}
    summary = step_time.summarise(samples, "peer")
    assert summary["ours"]["seconds"]["median"] == 1.5
    assert summary["ours"]["ratio"] == 0.375


def test_arms_with_different_numbers_of_repeats_are_refused(step_time):
    """Side-by-side ratios need a partner for every repeat."""
    with pytest.raises(ValueError):
        step_time.summarise({"ours": OURS, "peer": PEERS[:2]}, "peer")

"""What benchmarks/drift_signals.py makes of signals whose worth is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "drift_signals.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("drift_signals", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LENGTHS, SOUND = [100] * 40, [*range(30, 70, 2), *[100] * 20]  # the first half derails, at one place each


def signal(inside, outside):
    return np.array([[inside if t >= s else outside for t in range(n)] for n, s in zip(LENGTHS, SOUND, strict=True)])


def test_stretches_lie_on_either_side_of_the_derailment_and_never_overlap(benchmark):
    derailed, fine = benchmark.stretches([50, 20, 40], [35, 20, 39])
    assert derailed == [(0, 35, 50), (2, 39, 40)]
    assert fine == [(0, 19, 35), (0, 3, 19), (1, 4, 20), (2, 23, 39), (2, 7, 23)]


def test_a_signal_that_knows_and_one_that_does_not(benchmark):
    knows = benchmark.detection(signal(1.0, 0.0), LENGTHS, SOUND)
    assert knows == {"auc": 1.0, "threshold": 1.0, "seen": 1.0, "false_alarms": 0.0}
    constant = benchmark.detection(signal(1.0, 1.0), LENGTHS, SOUND)
    assert (constant["auc"], constant["false_alarms"]) == (0.5, 100.0)
    assert benchmark.detection(signal(0.0, 1.0), LENGTHS, SOUND)["auc"] == 0.0
    noise = benchmark.detection(np.random.default_rng(0).random((40, 100)), LENGTHS, SOUND)
    assert 0.35 < noise["auc"] < 0.65 and noise["false_alarms"] > 5


def test_false_alarms_are_counted_where_the_threshold_was_not_chosen(benchmark):
    """Only rollouts of odd number have loud sound tokens: one in ten of theirs."""
    values = signal(1.0, 0.0)
    values[1::2, ::10] = 1.0
    assert benchmark.detection(values, LENGTHS, SOUND)["false_alarms"] == pytest.approx(10, abs=0.5)
    values = signal(1.0, 0.0)
    values[0::2, ::10] = 1.0
    assert benchmark.detection(values, LENGTHS, SOUND)["false_alarms"] == 0.0


def test_a_pair_that_never_derails_has_no_figures(benchmark):
    assert set(benchmark.detection(signal(0.0, 0.0), LENGTHS, LENGTHS).values()) == {None}


@pytest.mark.parametrize(
    ("name", "problems", "behind", "lost"), [("derail", 16, (0.0, 0.1), 0.6), ("derail-2", 32, (0.2, 0.7), 0.2)]
)
def test_the_derail_pairs_are_what_they_are_said_to_be(benchmark, name, problems, behind, lost):
    """Student and teacher agree on sound text and not behind a derailment, from where the teacher seldom comes back."""
    found = benchmark.measure(benchmark.RECIPES / f"{name}.toml", problems, 1, Console(quiet=True))
    facts, rescues = found["facts"], found["rescued"]
    assert facts["overlap_sound"] > 0.85 and facts["overlap_teachers_text"] > 0.9
    assert behind[0] <= facts["overlap_behind"] <= behind[1]
    assert 0.3 < facts["derailed"] < 1, "some are sound to the end"
    early, _, late = facts["place_quartiles"]
    assert late > 1.5 * early, "derailments are spread"
    assert rescues["sound"]["rescued"] - rescues["16 behind"]["rescued"] >= lost
    assert found["signals"]["1 - overlap, K = 8"]["auc"] > 0.6

"""Units and limits of benchmarks/cost_model.py, and that docs/scaling.md shows what it prints."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def m():
    spec = importlib.util.spec_from_file_location("cost_model", ROOT / "benchmarks" / "cost_model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost_model"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fitted(m):
    return m.fit(m.PAIRS)


CAPS = [10.0, 700.0, 4096.0, 12288.0]


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("mean", [50.0, 1500.0, 1e5, 1e8, math.inf])
def test_moments_of_lengths_are_those_of_a_numeric_integral(m, mean, cap):
    t = np.linspace(0, cap, 200_001)
    alive = np.ones_like(t) if math.isinf(mean) else np.exp(-t / mean)
    lengths = m.Lengths(mean, cap)
    assert lengths.expected == pytest.approx(np.trapezoid(alive, t), rel=1e-4)
    assert lengths.expected_square == pytest.approx(np.trapezoid(2 * t * alive, t), rel=1e-3)
    assert lengths.expected**2 <= lengths.expected_square * (1 + 1e-9) <= (cap * lengths.expected) * (1 + 1e-6)


def test_the_longest_of_many_is_near_the_mean_of_drawn_maxima(m):
    drawn = np.random.default_rng(0).exponential(1000, (4000, 256)).max(1).mean()
    assert m.Lengths(1000.0, 1e9).longest(256) == pytest.approx(drawn, rel=0.02)
    assert m.Lengths(1000.0, 3000.0).longest(256) == 3000


def test_flops_and_bytes_of_a_known_model(m):
    """Qwen2.5-7B by hand: 2 a parameter, 4 · layers · width · context for attention, 56 KiB of cache a token."""
    assert m.R1_7B.forward_flops(3, 1000) == pytest.approx(3 * (2 * 7.07e9 + 4 * 28 * 3584 * 1000))
    assert m.R1_7B.kv_bytes == 2 * 28 * 4 * 128 * 2 == 57344
    assert m.R1_7B.weight_bytes == pytest.approx(14.14e9)


def test_seconds_of_a_step_by_hand(m):
    """One GPU, one model, rollouts that all run to the cap, so that every part is a product."""
    gpu = m.Gpu(flops=1e12, memory_bytes=1e12, memory_rate=1e11, link_rate=1e9, network_rate=1e9)
    model = m.Model("x", 1e9, layers=2, attention_width=64, kv_heads=1)
    constants = m.Constants(decode_step=0.01, train_share=0.5, score_share=0.25, memory_share=0.5)
    cost = m.step_cost(m.Run(model, model, rollouts=4), m.Lengths(math.inf, 1000.0), m.Cluster(gpu, 1), constants)
    sequence = 1000 + m.PROMPT
    forward = 4 * sequence * (2e9 + 4 * 2 * 64 * sequence / 2)
    assert cost.tokens == 4000 and cost.concurrent == 4 and cost.replicas == 1
    assert cost.decode_steps == pytest.approx(1000 * 0.01)
    assert cost.decode_weights == pytest.approx(1000 * 2e9 / 0.5e11)
    assert cost.decode_cache == pytest.approx(4 * (m.PROMPT * 1000 + 1000**2 / 2) * model.kv_bytes / 0.5e11)
    assert cost.teacher == pytest.approx(forward / 0.25e12)
    assert cost.update == pytest.approx(4 * forward / 0.5e12)
    assert cost.log_prob_bytes == 2 * 16 * 8 * 4000
    assert cost.network == pytest.approx(2e9 / 1e9 + cost.log_prob_bytes / 1e9)  # alone, nothing else is exchanged
    assert cost.seconds == pytest.approx(sum(getattr(cost, name) for name in cost.SECONDS))


def test_what_must_be_linear_is(m, fitted):
    constants, lengths = fitted[0], m.Lengths(1500.0, 12288.0)
    run = m.Run(m.R1_1B, m.R1_7B)
    one = m.step_cost(run, lengths, m.PAPER, constants)
    taken = m.hours(run, [lengths], m.PAPER, constants)
    assert m.hours(replace(run, steps=406), [lengths], m.PAPER, constants) == pytest.approx(2 * taken)
    double = m.step_cost(replace(run, rollouts=512), lengths, m.PAPER, constants)
    for name in ("teacher", "update", "tokens", "decode_cache", "log_prob_bytes"):
        assert getattr(double, name) == pytest.approx(2 * getattr(one, name))
    again = m.step_cost(replace(run, rescoring=3.5), lengths, m.PAPER, constants)
    assert again.teacher == pytest.approx(3.5 * one.teacher) and again.update == one.update
    both = m.step_cost(run, lengths, replace(m.PAPER, gpus=16, per_node=16), constants)
    assert both.teacher == pytest.approx(one.teacher / 2) and both.update == pytest.approx(one.update / 2)


@pytest.mark.parametrize("cap", [4096.0, 16384.0, 65536.0])
def test_what_must_grow_or_fall_does(m, fitted, cap):
    constants = fitted[0]

    def opd(model, gpus, cap=cap, mean=None):
        return m.hours(m.Run(model, model), [m.Lengths(mean or cap / 2, cap)], m.Cluster(m.H100, gpus), constants)

    sizes = [opd(model, 8) for model in m.SIZES]
    assert sizes == sorted(sizes)
    gpus = [opd(m.SIZES[2], n) for n in (8, 16, 32, 64, 128, 256, 512)]
    assert gpus == sorted(gpus, reverse=True)
    assert opd(m.SIZES[0], 8) < opd(m.SIZES[0], 8, cap=2 * cap, mean=cap / 2)
    assert opd(m.SIZES[0], 8) < opd(m.SIZES[0], 8, mean=cap)


def test_more_gpus_than_rollouts_leave_the_decode_steps(m, fitted):
    """The limit: no number of GPUs makes the longest rollout shorter."""
    lengths, run = m.Lengths(2000.0, 16384.0), m.Run(m.R1_1B, m.R1_1B)
    at = {n: m.step_cost(run, lengths, m.Cluster(m.H100, n), fitted[0]) for n in (64, 512, 4096)}
    assert at[512].decode_steps == at[4096].decode_steps == at[64].decode_steps
    assert at[4096].replicas == 256
    assert at[4096].bottleneck == "decode_steps"


def test_a_full_cache_makes_rollouts_wait(m, fitted):
    """Halving the memory that is left for keys and values does not shorten decoding; plenty changes nothing."""
    lengths, run = m.Lengths(32768.0, 65536.0), m.Run(m.R1_7B, m.R1_7B)
    gpu = replace(m.H100, memory_bytes=40e9)
    small = m.step_cost(run, lengths, m.Cluster(gpu, 8), fitted[0])
    large = m.step_cost(run, lengths, m.Cluster(replace(gpu, memory_bytes=4e12), 8), fitted[0])
    assert small.concurrent < 32 == large.concurrent
    assert small.decode_steps > large.decode_steps


def test_without_drift_nothing_is_saved_and_with_more_drift_more(m, fitted):
    at = {drift: m.predict(m.SIZES[1], 16384, 64, fitted[0], drift=drift) for drift in (1e12, 4096.0, 512.0)}
    none = at[1e12]
    assert none.window == pytest.approx(none.opd) and none.in_flight == pytest.approx(none.opd)
    for arm in ("window", "in_flight"):
        assert getattr(at[512.0], arm) < getattr(at[4096.0], arm) < getattr(none, arm)
    for one in at.values():
        assert one.in_flight <= one.window <= one.opd + 1e-9
        assert one.in_flight_verl >= one.in_flight


def test_what_does_not_fit_is_said(m, fitted):
    with pytest.raises(ValueError, match="does not fit"):
        m.step_cost(m.Run(m.SIZES[-1], m.SIZES[-1]), m.Lengths(100.0, 4096.0), m.Cluster(m.H100, 2), fitted[0])
    assert m.predict(m.SIZES[-1], 4096, 2, fitted[0]) is None


def test_the_fit_finds_constants_that_made_the_hours(m):
    """Hours computed from known constants and lengths give both back: the procedure is sound where the model is."""
    known = m.Constants(decode_step=0.006, train_share=0.2, score_share=0.35)
    means = {"JustRL": 2500.0, "R1-7B": 5000.0, "Skywork": 3500.0}
    made = []
    for pair in m.PAIRS[:3]:
        taken = [m.hours(pair.run, [m.Lengths(means[pair.name], cap)], m.PAPER, known) for cap in (m.BUDGET, m.SHORT)]
        made.append(replace(pair, opd=taken[0], cut=taken[1]))
    constants, found = m.fit(made)
    for pair in made:
        lengths = [m.Lengths(found[pair.name], m.SHORT)]
        assert m.hours(pair.run, lengths, m.PAPER, constants) == pytest.approx(pair.cut, rel=0.02)
    assert constants.decode_step == pytest.approx(known.decode_step, rel=0.2)


def test_the_fit_does_not_see_the_held_out_runs(m, fitted):
    changed = [replace(pair, prune=99.0) if pair.cut else replace(pair, opd=99.0, prune=99.0) for pair in m.PAIRS]
    assert m.fit(changed) == fitted
    with pytest.raises(ValueError, match="three pairs"):
        m.fit(m.PAIRS[:2])


def test_the_page_shows_what_the_model_prints(m, fitted):
    printed = m.tables(*fitted, m.check(*fitted), m.predictions(fitted[0]))
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    blocks = printed.split("\n\n")
    assert len(blocks) == 3
    for block in blocks:
        assert block in page, "put in what benchmarks/cost_model.py prints"

"""What-ifs against the runs that they are about: the run's own settings must give the run's own numbers back."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO

import pytest
import torch
from rich.console import Console

from prune_opd.config import PruningSection, load_config
from prune_opd.core.overlap import nucleus_accept, overlap_mass
from prune_opd.errors import ConfigError, RunLogError
from prune_opd.experiments.replay import events_of, replay, suggested_threshold, variants, what_if
from prune_opd.reporting.drift_log import LoggedStep, drift_record, drift_share, read_drift
from prune_opd.reporting.run_logs import read_config
from tests.test_step import config_of, run_step
from tests.training.test_trainer import IN_FLIGHT, RECIPE, records, run


def written(result, folder):
    """The log of one step, read back."""
    record = drift_record(1, drift_share(result))
    (folder / "drift.jsonl").write_text(json.dumps(record) + "\n")
    (log,) = read_drift(folder)
    return log


def test_the_log_gives_every_metric_back(tmp_path):
    result, _, _ = run_step()
    log, rollouts, teacher = written(result, tmp_path), result.rollouts, result.scores.topk
    mask, student = rollouts.response_mask, rollouts.student
    assert torch.equal(log.mask, mask) and torch.equal(log.finished, rollouts.finished)
    assert torch.equal(events_of(log, config_of().pruning, 4), result.events)
    mass = overlap_mass(student.ids, student.logprobs, teacher.ids)
    assert (log.mass - mass)[mask].abs().max() <= 1 / 508 + 1e-6
    tried = 0
    for top_p in (0.2, 0.5, 0.8, 0.95, 1.0):
        pruning = PruningSection(metric="teacher_top_p_accept", teacher_top_p=top_p)
        accepted = nucleus_accept(rollouts.response_ids, teacher.ids, teacher.logprobs, top_p)
        close = (log.above - top_p).abs() <= 1 / 508 + 1e-6
        assert torch.equal((events_of(log, pruning, 4) | close) & mask, (~accepted | close) & mask)
        tried += int((accepted & mask).sum() != mask.sum())
    assert tried >= 3, "some tokens must be outside"
    for threshold in (0.1, 0.5, 0.9):
        pruning = PruningSection(metric="overlap_mass", threshold=threshold)
        close = (log.mass - threshold).abs() <= 1 / 508 + 1e-6
        assert torch.equal((events_of(log, pruning, 4) | close) & mask, ((mass < threshold) | close) & mask)


@pytest.fixture(scope="module", params=["window", "in-flight"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / request.param
    run(folder, "training.steps=4", "pruning.w_drop=0.2", *(IN_FLIGHT if request.param == "in-flight" else []))
    return folder


def test_a_runs_own_settings_give_its_own_trace(finished):
    config = read_config(finished)
    logged, (found,) = what_if(config, read_drift(finished), [config.pruning])
    rows = [row for row in records(finished) if row["step"] > 0]
    drift = records(finished, "drift.jsonl")
    assert found.window_low == [row["prune_opd/current_max_response_length"] for row in rows]
    assert len(set(found.window_low)) > 1
    assert found.kept == sum(sum(row["effective_length"]) for row in drift) < logged.tokens
    assert logged.tokens == sum(row["tokens/trained"] for row in rows) == found.sampled_low
    weights = sum(row["prune_opd/loss_weight_mean"] * row["tokens/trained"] for row in rows)
    assert found.weight == pytest.approx(weights, rel=1e-6)
    assert logged.rollouts == 16 and logged.ended == sum(sum(row["finished"]) for row in drift)
    if config.stops_in_flight:
        stopped = sum(n for row in drift for n, s in zip(row["length"], row["stopped"], strict=True) if s)
        assert stopped > 0 and found.open > 0, "a stopped rollout is one whose rest nobody knows"
    uncut = [f for f in what_if(config, read_drift(finished), variants(config.pruning, [0.0], [], [], []))[1]]
    assert uncut[0].events == 0 and uncut[0].kept == logged.tokens


def by_hand(lengths, finished, events):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    shared = torch.where(torch.tensor(events).bool(), 0, 8)
    return LoggedStep(1, torch.tensor(lengths), torch.tensor(finished), mask, shared, shared / 8, shared / 8)


def test_where_the_log_was_cut_there_are_two_bounds():
    """Three rollouts, cut at 6 where this window starts at 8 and moves by 2; hits from 0.5, within 0 of the end."""
    window = {
        "init_len": 8,
        "min_len": 4,
        "max_len": 12,
        "step": 2,
        "hit_ratio": 0.5,
        "margin": 0,
        "shrink_patience": 1,
    }
    pruning = PruningSection(threshold=0.5, w_drop=0.5, dynamic_response_length=window)
    config = load_config(RECIPE)
    events = [[0] * 6, [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    log = by_hand([6, 6, 3], [False, False, True], events)
    logged, (found,) = what_if(config, [log, log], [pruning])
    assert (logged.tokens, logged.ended, found.events) == (30, 2, 4)
    assert found.kept == 2 * (6 + 2 + 3) and found.ended_whole == 2
    # Low: nobody reaches 8, so it shrinks to 6. High: the first would have, but one of three is less than half.
    assert found.window_low == found.window_high == [8, 6]
    assert (found.sampled_low, found.sampled_high) == (15 + 15, (8 + 8 + 3) + 15)
    assert found.open == 2  # two in the first step; in the second the window is what the log had
    assert found.in_flight == 2 * (6 + 3 + 3)
    half = pruning.model_copy(
        update={"dynamic_response_length": pruning.dynamic_response_length.model_copy(update={"hit_ratio": 0.3})}
    )
    _, (found,) = what_if(config, [log, log], [half])
    assert (found.window_low, found.window_high) == ([8, 6], [8, 10])


def test_the_suggestion_follows_its_rule(finished):
    config = read_config(finished)
    settings = variants(config.pruning, [0.1, 0.3, 0.5, 0.7, 0.9], [0.5], [], [])
    logged, found = what_if(config, read_drift(finished), settings)
    for ended in (0, 10):
        for result, whole in zip(found, (10, 10, 9, 8, 3), strict=True):
            result.ended_whole = whole
        assert suggested_threshold(found, ended) == (0.5 if ended else None)
    for result in found:
        result.ended_whole = 0
    assert suggested_threshold(found, 10) is None


def test_what_people_see_and_the_json(finished, tmp_path):
    text = StringIO()
    found = replay(
        finished,
        thresholds=[0.4, 0.6],
        w_drops=[0.1, 0.2],
        metrics=["overlap_ratio", "teacher_top_p_accept"],
        top_ps=[0.9],
        console=Console(width=80, file=text),
        json_path=tmp_path / "out.json",
    )
    assert [(f.metric, f.limit, f.w_drop) for f in found] == [
        *(("overlap_ratio", t, w) for t in (0.4, 0.6) for w in (0.1, 0.2)),
        *(("teacher_top_p_accept", 0.9, w) for w in (0.1, 0.2)),
    ]
    assert "overlap 0.4" in text.getvalue() and "nucleus 0.9" in text.getvalue() and "…" not in text.getvalue()
    written = json.loads((tmp_path / "out.json").read_text())
    assert [s["kept"] for s in written["settings"]] == [f.kept for f in found]
    by_w_drop = {f.w_drop: f.kept for f in found if f.metric == "overlap_ratio" and f.limit == 0.6}
    assert by_w_drop[0.1] > by_w_drop[0.2]


def test_a_what_if_loads_no_model_library():
    code = "import sys, prune_opd.experiments.replay; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_cannot_be_tried(finished, tmp_path):
    pruning = PruningSection()
    with pytest.raises(ConfigError, match="cannot be tried"):
        variants(pruning, [], [], ["overlap"], [])
    with pytest.raises(ConfigError, match="cannot be tried"):
        variants(pruning, [1.5], [], [], [])
    with pytest.raises(RunLogError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    with pytest.raises(RunLogError, match="holds no drift.jsonl; give the directory of a run"):
        list(read_drift(tmp_path))
    whole = (finished / "drift.jsonl").read_text()
    (tmp_path / "drift.jsonl").write_text(whole[:-9])
    assert len(list(read_drift(tmp_path))) == 3, "the run is at its fourth step"
    for damage in (('"mass"', '"mess"'), ('"shared": ["', '"shared": ["0')):
        (tmp_path / "drift.jsonl").write_text(whole.replace(*damage))
        with pytest.raises(RunLogError, match=r"drift\.jsonl:\d+: "):
            list(read_drift(tmp_path))

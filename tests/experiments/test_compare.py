"""Arms: what each changes, what controls take from the run that they follow, and what a comparison writes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import warnings
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from prune_opd.config import load_config, with_settings
from prune_opd.errors import ConfigError, RunDirectoryError, RunInterrupted
from prune_opd.evaluation.evaluate import ci95
from prune_opd.experiments.arms import SETTINGS, Reference, arm_config
from prune_opd.experiments.compare import compare
from prune_opd.experiments.results import results_table
from prune_opd.reporting.statistics import difference, seconds_to, spread
from prune_opd.step import prune_opd_step
from tests.training.test_trainer import RECIPE, SMALL, quiet

FOLLOWED = Reference(RECIPE, lengths=[48, 52, 60, 56], kept_tokens=[700, 650, 800, 900])


def test_arms_differ_by_what_they_say_and_share_the_rest():
    config = load_config(RECIPE, ["training.steps=4", "rollout.token_budget=3000"])
    found = {arm: arm_config(config, arm, 3, FOLLOWED) for arm in (*SETTINGS, "fixed:64")}
    for arm in found.values():
        assert arm.training.seed == 3
        for section in ("model", "evaluation", "tracking"):
            assert getattr(arm, section) == getattr(config, section)
        assert arm.data.model_copy(update={"end_tokens": "auto"}) == config.data
    pruned = {name for name, arm in found.items() if arm.pruning.enable}
    assert pruned == {
        *("prune", "prune-inflight", "inflight-only", "prune-budget", "inflight-budget"),
        *("prune-topp", "prune-distinct", "weights-only", "window-only"),
    }
    assert {name for name, arm in found.items() if arm.rollout.token_budget} == {"prune-budget", "inflight-budget"}
    assert {n for n, arm in found.items() if arm.data.end_tokens == "distinct"} == {"opd-distinct", "prune-distinct"}
    assert {name for name, arm in found.items() if arm.window_is_dynamic} == pruned - {
        *("weights-only", "inflight-only", "inflight-budget")
    }
    assert {name for name, arm in found.items() if arm.weighs_tokens} == pruned - {"window-only"}
    assert {name for name, arm in found.items() if arm.stops_in_flight} == {
        *("prune-inflight", "inflight-only", "inflight-budget")
    }
    assert {n for n, arm in found.items() if arm.pruning.metric == "teacher_top_p_accept"} == {"prune-topp"}
    assert {name for name, arm in found.items() if arm.control.lengths} == {"ramp", "replay"}
    assert found["ramp"].control.lengths == [48, 51, 53, 56], "a straight line between the ends of the trace"
    assert found["replay"].control.lengths == [48, 52, 60, 56]
    assert found["random"].control.kept_tokens == [700, 650, 800, 900]
    assert {name for name, arm in found.items() if arm.rollout.max_completion_length != 322} == {"fixed:64"}


def test_a_ramp_without_a_run_to_follow_takes_the_recipes_own_ends():
    assert arm_config(load_config(RECIPE, ["training.steps=3"]), "ramp", 0).control.lengths == [48, 185, 322]


@pytest.mark.parametrize("arm", ["prun", "fixed:", "fixed:0", "fixed:99999", "opd:4", "replay", "random"])
def test_an_arm_that_cannot_run_is_refused(arm):
    with pytest.raises(ConfigError, match="arm"):
        arm_config(load_config(RECIPE), arm, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(output directory, results) of a comparison with controls, two seeds of two steps."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    config = load_config(RECIPE, [*SMALL, "training.steps=2", "pruning.w_drop=0.5"])
    arms = ["ramp", "opd", "replay", "random", "prune"]  # the first two follow prune, wherever it is named
    return folder, compare(config, arms=arms, seeds=range(1, 3), output_dir=folder, console=quiet())


def rows(folder, run, name="metrics.jsonl"):
    found = [json.loads(line) for line in (folder / run / name).read_text().splitlines()]
    return [row for row in found if row["step"] > 0]


def test_controls_follow_the_prune_run_of_their_own_seed(finished):
    folder, results = finished
    by_arm = {arm["arm"]: arm for arm in results["arms"]}
    kept = {}
    for i, seed in enumerate((1, 2)):
        windows = {name: arm["runs"][i]["window"] for name, arm in by_arm.items()}
        assert windows["replay"] == windows["ramp"] == windows["prune"] and windows["opd"] == [40, 40]
        kept[seed] = [sum(row["effective_length"]) for row in rows(folder, f"prune-seed{seed}", "drift.jsonl")]
        trained = [
            row["prune_opd/loss_weight_mean"] * row["tokens/trained"] for row in rows(folder, f"random-seed{seed}")
        ]
        assert trained == pytest.approx(kept[seed])
        assert 0 < kept[seed][0] < rows(folder, f"prune-seed{seed}")[0]["tokens/trained"]
    assert kept[1] != kept[2]
    prompts = {arm: [r["prompt"] for r in rows(folder, f"{arm}-seed1", "rollouts.jsonl")] for arm in ("opd", "random")}
    assert prompts["opd"] == prompts["random"]


def test_a_comparison_writes_what_it_promises(finished):
    folder, results = finished
    written = json.loads((folder / "compare.json").read_text())
    assert written["baseline"] == "opd" and written["recipe"]["training"]["steps"] == 2
    assert all(arm["seeds"] == [1, 2] for arm in written["arms"])
    by_arm = {arm["arm"]: arm for arm in written["arms"]}
    assert len({arm["runs"][0]["evaluations"][0]["accuracy"] for arm in written["arms"]}) == 1, "the same start"
    starts = [json.loads(path.read_text().splitlines()[0]) for path in folder.glob("*/metrics.jsonl")]
    assert len({json.dumps(start["eval/per_problem"]) for start in starts}) == 1 and len(starts) == 10
    assert sum(start["time/eval"] > 0 for start in starts) == 1, "evaluated more than once"
    assert by_arm["prune"]["student_tokens"]["mean"] < by_arm["opd"]["student_tokens"]["mean"]
    assert by_arm["opd"]["train_seconds"]["mean"] > 0 and by_arm["opd"]["eval_seconds"]["mean"] > 0
    tokens = by_arm["prune"]["difference"]["student_tokens"]["mean"]
    assert by_arm["opd"]["seconds_to_baseline"] <= by_arm["opd"]["train_seconds"]["mean"]
    assert tokens == by_arm["prune"]["student_tokens"]["mean"] - by_arm["opd"]["student_tokens"]["mean"]
    with (folder / "compare.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(r["arm"], r["seed"]) for r in table] == [(a, s) for a in by_arm for s in ("1", "2")]
    assert float(table[0]["train_seconds"]) == written["arms"][0]["runs"][0]["train_seconds"]
    assert (folder / "accuracy_over_time.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "accuracy_over_time.svg").read_text()


def test_the_table_fits_80_columns(finished):
    """As a long comparison fills it: three digits of seconds, two of points, millions of tokens."""
    wide = json.loads(json.dumps(finished[1]))
    for arm in wide["arms"]:
        arm["arm"] = "prune-inflight" if arm["arm"] == "prune" else arm["arm"]
        arm["accuracy"] |= {"mean": 0.654, "std": 0.123}
        arm["train_seconds"] |= {"mean": 1234.5, "std": 56.7}
        arm["student_tokens"]["mean"], arm["seconds_to_baseline"] = 5e6, 999.9
        if "difference" in arm:
            arm["difference"]["accuracy"] |= {"mean": -0.123, "ci95": (-0.345, 0.112)}
            arm["train_seconds_saving"] = -0.54
    text = StringIO()
    Console(width=80, file=text).print(results_table(wide))
    text = text.getvalue()
    assert "…" not in text and all(arm["arm"] in text for arm in wide["arms"])
    for number in ("65.4 ± 12.3", "-12.3 [-34.5, 11.2]", "1234 ± 57", "-54%", "1000", "5,000k"):
        assert number in text


def test_a_comparison_that_was_interrupted_goes_on(finished, tmp_path):
    """One run has not begun and one is half done: they are made up for, and nothing else is trained again."""
    whole, results = finished
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "random-seed2")
    config = load_config(RECIPE, [*SMALL, "training.steps=2", "pruning.w_drop=0.5"])
    arms = [arm["arm"] for arm in results["arms"]]
    with pytest.raises(RunDirectoryError, match="--resume"):
        compare(config, arms=arms, seeds=range(1, 3), output_dir=folder, console=quiet())
    before = (folder / "opd-seed1/metrics.jsonl").read_text()
    again = compare(config, arms=arms, seeds=range(1, 3), output_dir=folder, console=quiet(), resume=True)
    assert (folder / "opd-seed1/metrics.jsonl").read_text() == before
    for old, new in zip(results["arms"], again["arms"], strict=True):
        assert new["accuracy"] == old["accuracy"] and new["student_tokens"] == old["student_tokens"]


def test_a_signal_stops_a_comparison_and_says_how_to_go_on(finished, tmp_path, monkeypatch):
    def killed(run, *arguments):
        if run.config.pruning.enable:
            os.kill(os.getpid(), signal.SIGTERM)
        return prune_opd_step(run, *arguments)

    config = load_config(RECIPE, [*SMALL, "training.steps=2", "pruning.w_drop=0.5"])
    again = {"arms": ["opd", "prune"], "seeds": (1,), "output_dir": tmp_path / "out", "console": quiet()}
    with monkeypatch.context() as patch:
        patch.setattr("prune_opd.training.trainer.prune_opd_step", killed)
        with pytest.raises(RunInterrupted, match=f"after step 1 of 2.*--resume and --output-dir {tmp_path / 'out'}$"):
            compare(config, **again)
    (only,) = json.loads((tmp_path / "out/compare.json").read_text())["arms"]
    assert only["arm"] == "opd", "what had ended is written"
    found = compare(config, **again, resume=True)
    first = {arm["arm"]: arm["runs"][0]["accuracy"] for arm in finished[1]["arms"]}
    assert {arm["arm"]: arm["accuracy"]["mean"] for arm in found["arms"]} == {a: first[a] for a in ("opd", "prune")}


def test_runs_of_another_comparison_can_be_followed_but_no_others(finished, tmp_path):
    folder, _ = finished
    config = load_config(RECIPE, [*SMALL, "training.steps=2"])

    def follow(reference, seeds=(1,), settings=()):
        changed = load_config(RECIPE, [*SMALL, "training.steps=2", *settings])
        return compare(
            changed, arms=["replay"], seeds=seeds, output_dir=tmp_path / "out", console=quiet(), reference=reference
        )

    for reference, message, kwargs in (
        (folder / "opd-seed1", "no training window", {}),
        (folder / "prune-seed1", "training.seed is 1, here it is 2", {"seeds": (2,)}),
        (folder, "has 2 of the 3 steps", {"settings": ["training.steps=3"]}),
        (folder, "num_generations is 2, here it is 3", {"settings": ["rollout.num_generations=3"]}),
        (tmp_path / "nowhere", "is no run to follow", {}),
    ):
        with pytest.raises(ConfigError, match=message):
            follow(reference, **kwargs)
    assert not (tmp_path / "out").exists(), "nothing was begun"
    with pytest.raises(ConfigError, match="name prune among the arms"):
        compare(config, arms=["replay", "opd"], seeds=(1,), output_dir=tmp_path / "out", console=quiet())
    with pytest.raises(ConfigError, match="twice"):
        compare(config, arms=["opd", "opd"], seeds=(1,), output_dir=tmp_path / "out", console=quiet())
    found = follow(folder)
    assert found["arms"][0]["runs"][0]["window"] == [
        row["prune_opd/current_max_response_length"] for row in rows(folder, "prune-seed1")
    ]


@pytest.mark.slow
def test_runs_side_by_side_are_the_runs_one_by_one(finished, tmp_path):
    _, results = finished
    config = load_config(RECIPE, [*SMALL, "training.steps=2", "pruning.w_drop=0.5"])
    with pytest.warns(UserWarning, match="not times"):
        again = compare(
            config, arms=["opd", "prune", "random"], seeds=(1,), output_dir=tmp_path / "o", console=quiet(), parallel=2
        )
    first = {arm["arm"]: arm["runs"][0] for arm in results["arms"]}
    for arm in again["arms"]:
        run = arm["runs"][0]
        assert (run["accuracy"], run["window"]) == (first[arm["arm"]]["accuracy"], first[arm["arm"]]["window"])


def test_a_prune_arm_without_a_window_warns():
    config = load_config(RECIPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = with_settings(config, **{"pruning.dynamic_response_length.enable": False})
    with pytest.warns(UserWarning, match="never cut"):
        arm_config(config, "prune", 0)


# ---- statistics ----


def test_spread_is_students_t():
    """Hand values: mean 2, sd 1, t(2 df) 4.303."""
    found = spread([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["std"] == 1
    assert found["ci95"][1] == pytest.approx(2 + 4.303 / 3**0.5, abs=1e-3)
    assert spread([5.0]) == {"mean": 5.0, "std": None, "ci95": None}


def test_the_time_to_an_accuracy_is_read_off_the_mean_curve():
    """Two seeds, by hand: means over seeds are 0.1, 0.4, 0.3, 0.6 at 0, 10, 20, 30 seconds."""

    def run(accuracies, times):
        pairs = zip(accuracies, times, strict=True)
        return {"evaluations": [{"accuracy": a, "train_seconds": t} for a, t in pairs]}

    runs = [run([0.0, 0.3, 0.3, 0.7], [0, 8, 18, 28]), run([0.2, 0.5, 0.3, 0.5], [0, 12, 22, 32])]
    assert seconds_to(0.25, runs) == pytest.approx(5)
    assert seconds_to(0.5, runs) == pytest.approx(20 + 20 / 3), "the dip comes after 0.4 was reached, not 0.5"
    assert seconds_to(0.1, runs) == 0 and seconds_to(0.6, runs) == pytest.approx(30)
    assert seconds_to(0.61, runs) is None


def test_differences_are_paired_by_seed_and_by_problem():
    """Seeds differ by ten points, arms by one everywhere: unpaired, the difference would drown."""

    def runs(shift, order):
        made = []
        for seed in order:
            problems = np.array([0.1, 0.5, 0.9]) + seed / 10 + shift
            record = {"seed": seed, "accuracy": problems.mean(), "per_problem": problems.tolist()}
            made.append(record | dict.fromkeys(("train_seconds", "eval_seconds"), 10 * seed + shift))
            made[-1] |= dict.fromkeys(("student_tokens", "teacher_tokens"), seed)
        return made

    found = difference(runs(0.01, (2, 0, 1)), runs(0.0, (0, 1, 2, 3)))
    assert found["accuracy"]["mean"] == pytest.approx(0.01) and found["accuracy"]["std"] < 1e-9
    assert found["train_seconds"]["ci95"] == pytest.approx((0.01, 0.01))
    low, high = found["accuracy"]["ci95_problems"]
    assert low < -0.7 < 0.01 < 0.7 < high, "3 equal differences prove little"
    one = difference(
        [{**runs(0, (0,))[0], "per_problem": [1.0, 0.0, 1.0, 0.5]}],
        [{**runs(0, (0,))[0], "per_problem": [0.0, 0.0, 1.0, 1.0]}],
    )
    assert one["accuracy"]["ci95"] is None
    assert one["accuracy"]["ci95_problems"] == ci95([1.0, 0.0, 0.0, -0.5])
    assert difference(runs(0, (0,)), runs(0, (1,))) == {}

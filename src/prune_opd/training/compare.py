"""Arms against each other: the same seeds, data order, sampling numbers and validation steps; one setting differs."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prune_opd.config import Config
from prune_opd.errors import ConfigError, RunDirectoryError
from prune_opd.evaluation.evaluate import bootstrap_ci95
from prune_opd.training.trainer import Trainer

BASELINE = "opd"
QUANTITIES = ("train_seconds", "eval_seconds", "student_tokens", "teacher_tokens")


def arm_config(config: Config, arm: str, seed: int) -> Config:
    """The recipe as one arm runs it.

    opd: no pruning, whole budget · prune: weights and window, nothing stopped in flight (the paper) · prune-inflight:
    the same, and drifted rollouts stop while they are generated · fixed:N: no pruning, responses cut at N tokens.
    """
    settings: dict[str, Any] = {"training.seed": seed, "pruning.enable": arm.startswith("prune")}
    match re.fullmatch(r"(opd|prune|prune-inflight)|fixed:(\d+)", arm):
        case re.Match() as found:
            if settings["pruning.enable"]:
                settings["pruning.in_flight.enable"] = arm == "prune-inflight"
            if found[2]:
                length, budget = int(found[2]), config.rollout.max_completion_length
                if not 1 <= length <= budget:
                    raise ConfigError(f"arm {arm!r}: the cut must lie in 1..{budget} (rollout.max_completion_length)")
                settings["rollout.max_completion_length"] = length
        case None:
            raise ConfigError(
                f"unknown arm {arm!r}; there are opd, prune, prune-inflight and fixed:N (N tokens, as in fixed:256)"
            )
    if arm == "prune" and not config.window_is_dynamic:
        warnings.warn("arm prune: pruning.dynamic_response_length.enable is false; nothing is cut", stacklevel=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that pruning settings have no effect in other arms is the point of them
        return config.with_settings(**settings)


def compare(
    config: Config,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    output_dir: Path,
    console: Console,
) -> dict[str, Any]:
    """Train every arm with every seed, one after the other; returns and writes what `compare.json` holds.

    Arms alternate within a seed, so that a machine that slows down slows all of them. `output_dir` must be new.
    """
    if len(set(arms)) < len(arms):
        raise ConfigError(f"an arm is named twice in {','.join(arms)}; name each once")
    configs = {(arm, seed): arm_config(config, arm, seed) for seed in seeds for arm in arms}
    if config.evaluation.data is None:
        raise ConfigError("compare needs held-out problems to compare on; set evaluation.data in the recipe")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise RunDirectoryError(f"{output_dir} exists and is not empty; choose another --output-dir")
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for i, ((arm, seed), its_config) in enumerate(configs.items(), start=1):
        console.rule(f"arm {arm}, seed {seed} ({i} of {len(configs)})")
        run_dir = output_dir / f"{arm.replace(':', '-')}-seed{seed}"
        totals = Trainer(its_config, run_dir, console=console).train()
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        evaluations = [r for r in records if "eval/accuracy" in r]
        runs[arm].append(
            {
                "seed": seed,
                "accuracy": evaluations[-1]["eval/accuracy"],
                "per_problem": evaluations[-1]["eval/per_problem"],
                "evaluations": [
                    {
                        "step": r["step"],
                        "accuracy": r["eval/accuracy"],
                        "train_seconds": r.get("time/train_so_far", 0.0),
                        "mean_length": r["eval/mean_length"],
                        "eos_rate": r["eval/eos_rate"],
                    }
                    for r in evaluations
                ],
                "window": [
                    r["prune_opd/current_max_response_length"]
                    for r in records
                    if "prune_opd/current_max_response_length" in r  # not at step 0, nor at a skipped step
                ],
                **{name: getattr(totals, name) for name in QUANTITIES},
            }
        )
        write_results(output_dir, config, runs)
    results = write_results(output_dir, config, runs)
    console.print(results_table(results))
    console.print(f"written to {output_dir / 'compare.json'}")
    return results


def write_results(output_dir: Path, config: Config, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Write `compare.json` of the runs so far, so that a comparison that is interrupted keeps what it has."""
    arms = [summarise(arm, of_arm) for arm, of_arm in runs.items() if of_arm]
    baseline = next((arm for arm in arms if arm["arm"] == BASELINE), None)
    if baseline is not None:
        for arm in arms:
            for name in ("train_seconds", "student_tokens"):
                arm[f"{name}_saving"] = 1 - arm[name]["mean"] / baseline[name]["mean"]
    results = {"arms": arms, "recipe": config.model_dump()}
    (output_dir / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def summarise(arm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm over its seeds. The accuracy's interval resamples problems (each averaged over seeds)."""
    per_problem = np.mean([run["per_problem"] for run in runs], axis=0)
    accuracy = spread([run["accuracy"] for run in runs]) | {"ci95": bootstrap_ci95(per_problem)}
    kept = [{name: value for name, value in run.items() if name != "per_problem"} for run in runs]
    return {
        "arm": arm,
        "seeds": [run["seed"] for run in runs],
        "accuracy": accuracy,
        **{name: spread([run[name] for run in runs]) for name in QUANTITIES},
        "runs": kept,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds, and the 95% t-interval of the mean (null with one seed)."""
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return {"mean": mean, "std": None, "ci95": None}
    std = float(np.std(values, ddof=1))
    # 97.5% quantiles of Student's t for 1, 2, 3, ... degrees of freedom; 1.96 beyond.
    quantiles = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    half = (quantiles[count - 2] if count - 2 < len(quantiles) else 1.96) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "ci95": (mean - half, mean + half)}


def results_table(results: dict[str, Any]) -> Table:
    """The comparison as people read it."""
    seeds = results["arms"][0]["seeds"]
    table = Table(title=f"held-out accuracy and cost, {len(seeds)} seed{'s' * (len(seeds) > 1)}, equal steps")
    headings = (
        "arm",
        "accuracy",
        "95%",
        "training s",
        "validation s",
        "student tokens",
        "teacher tokens",
        "time saved",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in results["arms"]:
        low, high = arm["accuracy"]["ci95"]
        saving = arm.get("train_seconds_saving")
        table.add_row(
            arm["arm"],
            _with_std(arm["accuracy"], 3),
            f"{low:.3f}-{high:.3f}",
            _with_std(arm["train_seconds"], 1),
            f"{arm['eval_seconds']['mean']:.1f}",
            f"{arm['student_tokens']['mean']:,.0f}",
            f"{arm['teacher_tokens']['mean']:,.0f}",
            "-" if saving is None or arm["arm"] == BASELINE else f"{saving:.1%}",
        )
    return table


def _with_std(value: dict[str, Any], digits: int) -> str:
    return f"{value['mean']:.{digits}f}" + (f" ± {value['std']:.{digits}f}" if value["std"] is not None else "")

"""How runs are held against each other: means and intervals over seeds, differences, time to an accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from prune_opd.errors import RunLogError
from prune_opd.evaluation.evaluate import ci95

QUANTITIES = ("train_seconds", "eval_seconds", "student_tokens", "teacher_tokens")
# 97.5% quantiles of Student's t for 1, 2, 3, ... degrees of freedom; 1.96 beyond.
T_QUANTILES = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def evaluation_curve(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations among the records of a metrics.jsonl, as `compare.json` has them."""
    return [
        {
            "step": record["step"],
            "accuracy": record["eval/accuracy"],
            "train_seconds": record.get("time/train_so_far", 0.0),
            "mean_length": record["eval/mean_length"],
            "eos_rate": record["eval/eos_rate"],
        }
        for record in records
        if "eval/accuracy" in record
    ]


def summary(accuracies: Sequence[float], per_problem: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean and deviation of an accuracy over seeds. Its interval resamples problems, each averaged over seeds."""
    _check_same_problems(per_problem)
    return spread(accuracies) | {"ci95": ci95(np.mean(per_problem, axis=0))}


def _check_same_problems(per_problem: Sequence[Sequence[float]]) -> None:
    """RunLogError where runs that are held against each other answered other numbers of problems."""
    counts = sorted({len(answers) for answers in per_problem})
    if len(counts) > 1:
        raise RunLogError(
            f"runs with {' and '.join(map(str, counts))} held-out problems cannot be held against each other; one of "
            "their metrics.jsonl was edited or damaged: restore it, or report the runs one by one"
        )


def difference(
    runs: list[dict[str, Any]], baseline: list[dict[str, Any]], quantities: Sequence[str] = QUANTITIES
) -> dict[str, Any]:
    """Arm minus baseline, paired by seed, for accuracy and each quantity: mean, std and t-interval over seeds.

    accuracy also has `ci95_problems`. Both arms answered the same problems with the same random numbers, so it
    resamples the difference on each problem, averaged over seeds. It exists with one seed too, and leaves out how seeds
    differ. Seeds that only one of the two has are left out.
    """
    theirs = {run["seed"]: run for run in baseline}
    pairs = [(run, theirs[run["seed"]]) for run in runs if run["seed"] in theirs]
    if not pairs:
        return {}
    found = {name: spread([a[name] - b[name] for a, b in pairs]) for name in ("accuracy", *quantities)}
    _check_same_problems([run["per_problem"] for pair in pairs for run in pair])
    by_problem = np.mean([np.subtract(a["per_problem"], b["per_problem"]) for a, b in pairs], axis=0)
    found["accuracy"]["ci95_problems"] = ci95(by_problem, least=-1.0)
    return found


def seconds_to(accuracy: float, runs: Sequence[dict[str, Any]]) -> float | None:
    """Training time at which an arm's accuracy, the mean over its seeds, first was `accuracy`; None if it never was.

    Straight lines join the evaluations, whose times are means over seeds too. One evaluation is noisy, and the first
    one that is high enough is noisier: read this number with the whole curve.
    """
    seconds, reached = (
        np.mean([[e[name] for e in run["evaluations"]] for run in runs], axis=0)
        for name in ("train_seconds", "accuracy")
    )
    high = np.flatnonzero(reached >= accuracy - 1e-12)  # a mean of the same numbers in another order
    if not len(high):
        return None
    last = high[0]
    between = slice(max(last - 1, 0), last + 1)
    return float(np.interp(accuracy, reached[between], seconds[between]))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds, and the 95% t-interval of the mean (null with one seed)."""
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return {"mean": mean, "std": None, "ci95": None}
    std = float(np.std(values, ddof=1))
    half = (T_QUANTILES[count - 2] if count - 2 < len(T_QUANTILES) else 1.96) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "ci95": (mean - half, mean + half)}

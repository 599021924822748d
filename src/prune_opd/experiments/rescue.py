"""Does the teacher get there less often from where a signal says drift, and is that more than length tells?

Pure functions of what `probe` counts at N cuts: prefixes of the student's rollouts, from which a model went on n times.
Of a cut, `right` of n continuations are right; its prompt is the unit that intervals resample, because prefixes of one
prompt are alike. Only cuts of equal length are held against each other where it says so: reliability falls along a
rollout, and so does what is left to do, so the two go together on any pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

RESAMPLES = 1000
BUCKETS = (("R = 1", 1.0), ("1 > R ≥ 1/2", 0.5), ("1/2 > R > 0", 0.0), ("R = 0", -1.0))
MATTERS = 0.05  # an AUC this far from 0.5, with an interval that leaves 0.5 out, is called an effect
NOTHING = 0.1  # within this of 0.5 an interval must lie for the verdict that there is none


def resampled(prompt: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """(resamples + 1, N) int: how often each cut is drawn when prompts are, with replacement; the first row is all 1.

    prompt (N,) int: the prompt of each cut, 0-based.
    """
    count = int(prompt.max()) + 1
    present = np.unique(prompt)
    draws = np.random.default_rng(seed).choice(present, size=(resamples, len(present)))
    times = np.stack([np.bincount(row, minlength=count) for row in draws])
    return np.concatenate([np.ones((1, len(prompt)), dtype=int), times[:, prompt]])


def estimate(values: Array) -> dict[str, float | None]:
    """The first value, and the 95% percentile interval of the others; None where there are too few that are defined."""
    value, drawn = values[0], values[1:][np.isfinite(values[1:])]
    if not np.isfinite(value) or len(drawn) < len(values) / 2:
        return {"value": float(value) if np.isfinite(value) else None, "low": None, "high": None}
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


def auc(score: Array, right: Array, wrong: Array, times: Array, stratum: Array | None = None) -> Array:
    """(R,) chance that a continuation which went wrong starts at a higher score than one that got there; ties half.

    score, right, wrong (N,): of each cut, and how many of its continuations were which · times (R, N): how often each
    cut counts · stratum (N,): only cuts of the same one are compared. NaN where there is no such pair.
    """
    over = (score[:, None] > score) + 0.5 * (score[:, None] == score)
    pairs = np.ones_like(over) if stratum is None else (stratum[:, None] == stratum).astype(float)
    lost, rescued = times * wrong, times * right
    above, all_pairs = (((lost @ matrix) * rescued).sum(-1) for matrix in (over * pairs, pairs))
    return np.divide(above, all_pairs, out=np.full(len(times), np.nan), where=all_pairs > 0)


def share(right: Array, n: int, times: Array, chosen: Array) -> Array:
    """(R,) share of right continuations of the chosen (N,) cuts; NaN where none is drawn."""
    drawn = times * chosen
    cuts = drawn.sum(-1)
    return np.divide((drawn * right).sum(-1), n * cuts, out=np.full(len(times), np.nan), where=cuts > 0)


def ratio(right: Array, n: int, times: Array, low: Array, high: Array, stratum: Array) -> Array:
    """(R,) how much of what is rescued from `high` cuts is rescued from `low` ones (both (N,) bool) of equal stratum.

    Mantel and Haenszel's ratio of risks (J. Natl. Cancer Inst. 22, 1959) over strata that have both. NaN without one.
    """
    above, below = np.zeros(len(times)), np.zeros(len(times))
    for at in np.unique(stratum):
        here = stratum == at
        lows, highs = (times * (here & group) for group in (low, high))
        cuts_low, cuts_high = lows.sum(-1), highs.sum(-1)
        weight = np.divide(1.0, cuts_low + cuts_high, out=np.zeros(len(times)), where=cuts_low * cuts_high > 0)
        above += (lows * right).sum(-1) * cuts_high * weight
        below += (highs * right).sum(-1) * cuts_low * weight
    return np.divide(above, below, out=np.full(len(times), np.nan), where=below > 0)


def bucket_of(reliability: Array) -> Array:
    """(N,) index into BUCKETS of each reliability."""
    edges = [edge for _, edge in BUCKETS]
    return np.array(
        [next(i for i, edge in enumerate(edges) if (r > edge if edge <= 0 else r >= edge)) for r in reliability]
    )


def analyse(
    prompt: Array, length: Array, reliability: Array, signals: dict[str, Array], teacher: Array, student: Array, n: int
) -> dict[str, Any]:
    """Everything that `probe` says of its cuts, ready for JSON.

    prompt, length (N,) int · reliability (N,) in [0, 1] · signals: (N,) each, higher for more drift · teacher, student
    (N,) int: right continuations of n. Lengths are compared when they are equal, so cut all rollouts at the same ones.
    """
    times, bucket = resampled(prompt), bucket_of(reliability)
    lengths = np.unique(length)
    thirds = np.searchsorted(np.quantile(lengths, [1 / 3, 2 / 3], method="inverted_cdf"), length)

    def rates(chosen: Array) -> dict[str, Any]:
        counted = {"cuts": int(chosen.sum()), "prompts": len(np.unique(prompt[chosen]))}
        return counted | {
            whose: estimate(share(right, n, times, chosen))
            for whose, right in (("teacher", teacher), ("student", student))
        }

    by_reliability = [{"reliability": name, **rates(bucket == i)} for i, (name, _) in enumerate(BUCKETS)]
    by_length = [
        {"from": int(length[thirds == i].min()), "to": int(length[thirds == i].max()), **rates(thirds == i)}
        for i in np.unique(thirds)
    ]
    by_both = [
        {"reliability": name, "from": row["from"], "to": row["to"], **rates((bucket == i) & (thirds == j))}
        for i, (name, _) in enumerate(BUCKETS)
        for j, row in zip(np.unique(thirds), by_length, strict=True)
    ]
    scores = {"1 - R": 1 - reliability, **signals}
    predicts = [
        {
            "signal": name,
            "auc": estimate(auc(score, teacher, n - teacher, times)),
            "auc_at_equal_length": estimate(auc(score, teacher, n - teacher, times, length)),
        }
        for name, score in scores.items()
    ]
    low, high = _ends(bucket)
    found = {
        "rescue": estimate(share(teacher, n, times, np.ones(len(prompt), dtype=bool))),
        "by_reliability": by_reliability,
        "by_length": by_length,
        "by_both": by_both,
        "length_alone": estimate(auc(length.astype(float), teacher, n - teacher, times)),
        "signals": predicts,
        "compared": [BUCKETS[low][0], BUCKETS[high][0]],
        "rescued_behind": estimate(ratio(teacher, n, times, bucket == low, bucket == high, length)),
    }
    return found | {"verdict": verdict(found)}


def _ends(bucket: Array) -> tuple[int, int]:
    """The lowest and the highest bucket that have a twentieth of the cuts, or that have any."""
    counts = np.bincount(bucket, minlength=len(BUCKETS))
    there = np.flatnonzero(counts >= max(1, len(bucket) / 20))
    return int(there[-1]), int(there[0])


def verdict(found: dict[str, Any]) -> str:
    """What `analyse` found, in a sentence."""
    rescue, (low, high) = found["rescue"]["value"], found["compared"]
    at_equal = found["signals"][0]["auc_at_equal_length"]
    value, lower, upper = at_equal["value"], at_equal["low"], at_equal["high"]
    if rescue in (0.0, 1.0):
        return f"nothing to tell apart: the teacher gets there from {'all' if rescue else 'none'} of the prefixes"
    if low == high:
        return f"nothing to tell apart: nearly all prefixes have {low}"
    if lower is None:
        return "nothing to tell apart: no two prefixes of equal length, one rescued and one not; take more prompts"
    text = f"AUC of R {value:.2f} [{lower:.2f}, {upper:.2f}] at equal lengths, 0.50 where it says nothing"
    if lower > 0.5 and value >= 0.5 + MATTERS:
        said = "drift is real here" if lower >= 0.5 + NOTHING else "drift says a little more here than length does"
        behind = found["rescued_behind"]
        if behind["value"] is not None:
            said += f": behind {low} the teacher rescues {interval_text(behind)} of what it rescues at {high}"
        return f"{said}: {text}"
    if upper < 0.5 and value <= 0.5 - MATTERS:
        return f"R is the wrong way round here: where it has fallen, the teacher rescues more ({text})"
    if max(upper - 0.5, 0.5 - lower) > NOTHING:
        return f"undecided: too few prompts to tell ({text})"
    return f"here, drift means nothing that length does not ({text})"


def table_rows(found: dict[str, Any]) -> Sequence[tuple[str, str, str, str]]:
    """(prefixes, how many, the teacher's rate, the student's) of each bucket that has some."""
    rows = [(row["reliability"], row) for row in found["by_reliability"]]
    rows += [(f"{row['from']} to {row['to']} tokens", row) for row in found["by_length"]]
    rows += [(f"{row['reliability']}, {row['from']} to {row['to']} tokens", row) for row in found["by_both"]]
    return [
        (name, str(row["cuts"]), *(interval_text(row[whose]) for whose in ("teacher", "student")))
        for name, row in rows
        if row["cuts"]
    ]


def interval_text(found: dict[str, float | None], percent: bool = True) -> str:
    """An estimate with its interval."""
    value, low, high = found["value"], found["low"], found["high"]
    if value is None:
        return "-"
    if low is None or high is None:
        return f"{value:.0%}" if percent else f"{value:.2f}"
    return f"{value:.0%} [{low:.0%}, {high:.0%}]" if percent else f"{value:.2f} [{low:.2f}, {high:.2f}]"

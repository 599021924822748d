"""What the report's script draws of one run: its series, its heat map, its curves over positions, its rollouts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps

from prune_opd.reporting.records import NEXT_WINDOW, POSITIONS, THIS_WINDOW, bytes_of_text, read_lines
from prune_opd.reporting.run_logs import PHASES, Run

MOST_POINTS = 240  # of a line; longer runs are thinned
MOST_COLUMNS, MOST_ROWS = 120, 80  # of the heat map: steps and positions
CURVES = 5  # steps whose curves over positions are drawn
MOST_TEXT = 4_000  # characters of a prompt or response

SERIES = {  # name in the page: metric
    "window": THIS_WINDOW,
    "effective_mean": "prune_opd/effective_response_length_mean",
    "effective_p90": "prune_opd/effective_response_length_p90",
    "length": "completions/mean_length",
    "overlap": "distillation/overlap_ratio",
    "ended": "completions/eos_rate",
}


def page_run(run: Run, rollout_bytes: int) -> dict[str, Any]:
    """What the page's script draws of one run; docs/metrics.md has the logs that it comes from."""
    drift = _drift(run)
    stride = math.ceil(len(run.steps) / MOST_POINTS) or 1
    thinned = run.steps[::stride]
    shown = _evenly(run.steps, CURVES)
    return {
        "name": run.name,
        "arm": run.arm,
        "seed": run.seed,
        "prunes": run.config["pruning"]["enable"],
        "threshold": run.config["pruning"]["threshold"],
        "metric": run.config["pruning"]["metric"],
        "k": run.config["objective"]["top_k"],
        "full_weight": 1 + run.config["pruning"]["w_base"] if run.config["pruning"]["enable"] else 1,
        "done": len(run.steps),
        "steps": [step["step"] for step in thinned],
        "series": {name: [_short(step.get(key)) for step in thinned] for name, key in SERIES.items()},
        "seconds": {name: _short(run.total(f"time/{name}")) for name in (*PHASES, "total")},
        "tokens": {name: run.total(key) for name, key in PHASES.items()} | {"saved": run.total("tokens/saved")},
        "grew": sum(step[NEXT_WINDOW] > step[THIS_WINDOW] for step in run.steps),
        "evaluations": [
            {
                "step": e["step"],
                "seconds": _short(e.get("time/train_so_far", 0.0)),
                "accuracy": _short(e["eval/accuracy"]),
                "low": _short(e["eval/ci95"][0]),
                "high": _short(e["eval/ci95"][1]),
            }
            for e in run.evaluations
        ],
        "buckets": {
            name: [{"step": step["step"], "values": _buckets(step, f"distillation/{name}")} for step in shown]
            for name in ("reverse_kl", "entropy_gap")
        },
        **drift,
        "rollouts": list(_rollouts(run, rollout_bytes)),
    }


def _drift(run: Run) -> dict[str, Any]:
    """What the page shows of drift.jsonl: overlap by position and step, weight by position, onsets."""
    path = run.path / "drift.jsonl"
    nothing: dict[str, Any] = {"heat": None, "weights": [], "onset": None}
    if not run.steps or not path.is_file():
        return nothing
    last = run.steps[-1]["step"]
    longest = int(max(step[SERIES["window"]] for step in run.steps))
    height, width = math.ceil(longest / MOST_ROWS), math.ceil(last / MOST_COLUMNS)
    rows, columns = math.ceil(longest / height), math.ceil(last / width)
    sums, counts = np.zeros((columns, rows)), np.zeros((columns, rows))
    curves = {step["step"] for step in _evenly(run.steps, CURVES)}
    weights = []
    onsets: list[list[int]] = [[], []]  # of the first and of the second half of the steps
    for record in read_lines(path):
        step = record["step"]
        if step > last:
            break
        column = (step - 1) // width
        for line in record["shared"]:
            shared = np.frombuffer(bytes_of_text(line), dtype=np.uint8)
            row = np.arange(len(shared)) // height
            sums[column] += np.bincount(row, shared, minlength=rows)
            counts[column] += np.bincount(row, minlength=rows)
        onsets[2 * step > last] += record["onset"]
        if step in curves and "weight_by_position" in record:
            curve = record["weight_by_position"]
            every = math.ceil(len(curve) / MOST_POINTS) or 1
            weights.append({"step": step, "every": every, "values": [_short(w) for w in curve[::every]]})
    overlap = (
        np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0) / run.config["objective"]["top_k"]
    )
    # Two hexadecimal digits a cell: the overlap in 250ths, ff where no rollout reached.
    cells = np.where(np.isnan(overlap), 255, np.rint(np.nan_to_num(overlap) * 250)).astype(np.uint8)
    return {
        "heat": {"height": height, "width": width, "columns": [bytes(column).hex() for column in cells]},
        "weights": weights,
        "onset": _onset_histogram(onsets, longest),
    }


def _onset_histogram(halves: list[list[int]], longest: int) -> dict[str, Any]:
    """Share of rollouts by the position of their first event: 0, 1, 2-3, 4-7 and so on; none is the rest."""
    edges = [0, 1]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    shares = []
    for onsets in halves:
        found = np.histogram([onset for onset in onsets if onset >= 0], bins=edges)[0]
        shares.append([_short(n / len(onsets)) for n in found.tolist()] if onsets else [])
    none = [_short(sum(o < 0 for o in onsets) / len(onsets)) if onsets else None for onsets in halves]
    return {"edges": edges, "halves": shares, "none": none}


def _buckets(step: dict[str, Any], key: str) -> list[list[float | None]]:
    """[from, to, mean] of each position bucket of a metric."""
    found = []
    for name, value in step.items():
        if name.startswith(key) and (positions := POSITIONS.fullmatch(name, len(key))):
            found.append([int(positions[1]), int(positions[2]), _short(value)])
    return sorted(found)


def _rollouts(run: Run, budget: int) -> Iterator[dict[str, Any]]:
    """Rollouts of steps that lie evenly over the run, as many as `budget` bytes of JSON hold; one step at least."""
    path = run.path / "rollouts.jsonl"
    if not path.is_file():
        return
    sizes: dict[int, int] = {}
    for record in read_lines(path):
        sizes[record["step"]] = sizes.get(record["step"], 0) + len(json.dumps(record))
    count = min(len(sizes), 40)
    while count > 1 and sum(sizes[step] for step in _evenly(list(sizes), count)) > budget:
        count -= 1
    chosen = set(_evenly(list(sizes), count))
    left = budget
    for record in read_lines(path):
        if record["step"] in chosen and left > 0:
            rollout = _page_rollout(record, left)
            left -= _size(rollout)
            yield rollout


def _page_rollout(record: dict[str, Any], budget: int) -> dict[str, Any]:
    """One rollout with about `budget` bytes of tokens at most; a long text is cut and marked."""
    tokens = len(record.get("token_ids", ()))
    if not tokens:  # tracking.rollout_tokens = 0, or a log of an earlier version: text alone
        return {**record, "prompt": _cut(record["prompt"]), "response": _cut(record["response"])}
    kept = max(1, min(tokens, budget * tokens // _size(record)))
    by_token = {name: record[name][:kept] for name in ("token_ids", "weight", "shared", "teacher_logprob")}
    sides = {side: {name: record[side][name][:kept] for name in ("ids", "logprobs")} for side in ("student", "teacher")}
    used = {*by_token["token_ids"], *(v for side in sides.values() for at in side["ids"] for v in at)}
    rest = {name: value for name, value in record.items() if name != "response"}
    texts = {str(v): record["texts"][str(v)] for v in used}
    return {**rest, **by_token, **sides, "texts": texts, "prompt": _cut(record["prompt"])}


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, first and last among them, evenly apart."""
    if not items:
        return []
    return [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, min(count, len(items)))})]


def _short(value: float | None) -> float | None:
    """Four significant digits."""
    return value if value is None or isinstance(value, int) else float(f"{value:.4g}")


def _size(value: Any) -> int:
    """Bytes that it takes in the page: a `<` takes six."""
    return len(htmlsafe_json_dumps(value, dumps=json.dumps))


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}… ({len(text) - MOST_TEXT:,} more characters)"

"""`prune-opd report`: runs and comparisons as one HTML file that needs no network and runs no script but its own.

Everything a model wrote is hostile input. It reaches the page as JSON, whose `<`, `>`, `&` and line separators jinja2
escapes, and from there as text nodes only; a content security policy with the hash of the page's one script forbids
any other script and every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from prune_opd.reporting.charts import SERIES, page_run
from prune_opd.reporting.records import Probe, read_object, write_text
from prune_opd.reporting.run_logs import PHASES, Run, read_runs
from prune_opd.reporting.saturation import when_saturated
from prune_opd.reporting.statistics import difference, evaluation_curve, seconds_to, summary
from prune_opd.reporting.wording import duration, flattened, percent

OF_TEACHER = {
    "overlap": "overlap_ratio",
    "events": "events",
    "reliable tokens": "effective_response_length_mean",
    "length": "mean_length",
    "own endings": "eos_rate",
}
"""Columns of the table of teachers, by the metric teacher/NAME/... that they show."""
ROLLOUT_BYTES = 2_500_000  # of rollouts in the page, all runs together; the rest of a page stays below as much again


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of run directories, or of `compare` directories, and return where it is.

    `output` is report.html in the directory when there is one, else in the current one. Raises RunLogError, and
    StorageError where it cannot be written.
    """
    if output is None:
        output = paths[0] / "report.html" if len(paths) == 1 else Path("report.html")
    write_text(output, render(read_runs(paths)), "--output")
    return output


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    templates = files("prune_opd.reporting") / "templates"
    script, style, page = (
        (templates / name).read_text("utf-8") for name in ("report.js", "report.css", "report.html.j2")
    )
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"duration": duration, "percent": percent, "count": lambda n: f"{n:,.0f}"}
    arms = arm_rows(runs)
    budget = ROLLOUT_BYTES // len(runs)
    data = {
        "runs": [_finite(page_run(run, budget)) for run in runs],
        "arms": [{"arm": arm["arm"], "seconds": arm["seconds"]} for arm in arms],
    }
    return environment.from_string(page).render(
        runs=runs,
        arms=arms,
        verdict=list(verdict(arms)),
        saturated=[(run.name, said) for run in runs for said in when_saturated(run.steps)],
        missing=[(run.name, note) for run in runs for note in missing(run)],
        probes=list(probes(runs)),
        teachers=list(teachers_table(runs)),
        settings=settings_table(runs),
        data=data,
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        phases=list(PHASES),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=version("prune-opd"),
    )


# ---- over runs: what the tables show ----


def arm_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each arm: means over its seeds, and what it saved against the baseline where they can be compared.

    The baseline is the arm `opd`, else the only one without pruning. `saved` is None unless both arms ran the same
    seeds for the same number of steps on the same models and data; then `difference` is the accuracy less the
    baseline's, paired by seed (or by problem, with one seed), and `to_equal` the training seconds until it was equal.
    """
    of_arm = {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs)}
    rows = [_arm_row(arm, its_runs) for arm, its_runs in of_arm.items()]
    unpruned = [row for row in rows if not row["prunes"]]
    named = [row for row in rows if row["arm"] == "opd"]
    baseline = named[0] if named else unpruned[0] if len(unpruned) == 1 else None
    for row in rows:
        row |= {"is_baseline": row is baseline, "baseline": baseline["arm"] if baseline else None}
        row |= dict.fromkeys(("saved", "difference", "to_equal"))
        if baseline is None or row is baseline or row["same"] != baseline["same"]:
            continue
        if not (baseline["seconds"]["all"] and baseline["tokens"]["all"]):  # it has not run yet, or its log is lost
            continue
        row["saved"] = {name: _share_saved(row[name], baseline[name]) for name in ("seconds", "tokens")}
        if row["accuracy"] is not None and baseline["accuracy"] is not None:
            row["difference"] = _difference(of_arm[row["arm"]], of_arm[baseline["arm"]])
            row["to_equal"] = _to_equal(of_arm[row["arm"]], baseline["accuracy"])
    return rows


def _difference(runs: Sequence[Run], baseline: Sequence[Run]) -> tuple[float, float, float]:
    """Accuracy minus the baseline's, and its 95% interval, as in `compare`."""

    def last(run: Run) -> dict[str, Any]:
        return {"seed": run.seed, **{name: run.evaluations[-1][f"eval/{name}"] for name in ("accuracy", "per_problem")}}

    found = difference([last(run) for run in runs], [last(run) for run in baseline], quantities=())["accuracy"]
    return (found["mean"], *(found["ci95"] or found["ci95_problems"]))


def _to_equal(runs: Sequence[Run], accuracy: float) -> float | None:
    """Training seconds until `accuracy`, as in `compare`; None if never, or if seeds have unlike evaluations."""
    if len({len(run.evaluations) for run in runs}) > 1:
        return None
    return seconds_to(accuracy, [{"evaluations": evaluation_curve(run.evaluations)} for run in runs])


def _arm_row(arm: str, runs: list[Run]) -> dict[str, Any]:
    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    phases = {name: mean([run.total(f"time/{name}") for run in runs]) for name in PHASES}
    whole = mean([run.total("time/total") for run in runs])
    tokens = {name: mean([run.total(key) for run in runs]) for name, key in PHASES.items()}
    last = [run.evaluations[-1] for run in runs if run.evaluations]
    accuracy: dict[str, Any] = {"mean": None, "std": None, "ci95": None}
    if len(last) == len(runs):  # else the mean would be over other seeds than the costs
        accuracy = summary([e["eval/accuracy"] for e in last], [e["eval/per_problem"] for e in last])
    config = runs[0].config
    return {
        "arm": arm,
        "seeds": [run.seed for run in runs],
        "steps": [len(run.steps) for run in runs],
        "planned": [run.planned for run in runs],
        "prunes": config["pruning"]["enable"],
        "accuracy": accuracy["mean"],
        "ci95": accuracy["ci95"],
        "spread": accuracy["std"],
        "seconds": {**phases, "other": whole - sum(phases.values()), "all": whole},
        "tokens": {**tokens, "all": sum(tokens.values())},
        "cut_tokens": mean([run.total("tokens/saved") for run in runs]),
        "eval_seconds": mean([sum(e["time/eval"] for e in run.evaluations) for run in runs]),
        "window": _first_and_last(runs, SERIES["window"]),
        "overlap": _first_and_last(runs, SERIES["overlap"]),
        "ended": _first_and_last(runs, SERIES["ended"]),
        "same": (
            sorted(run.seed for run in runs),
            [len(run.steps) for run in runs],
            *(config[section] for section in ("model", "data", "evaluation")),
        ),
    }


def teachers_table(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A row for each teacher of the runs that have several; numbers of the first and last step that asked it."""
    for run in runs:
        for teacher in run.config["model"]["teachers"]:
            prefix = f"teacher/{teacher['name']}/"
            asked = [step for step in run.steps if step.get(f"{prefix}rollouts")]
            yield {
                "run": run.name,
                "teacher": teacher["name"],
                "rollouts": sum(step[f"{prefix}rollouts"] for step in asked),
                "saved": sum(step[f"{prefix}tokens_saved"] for step in asked),
                "change": {
                    name: (asked[0][prefix + key], asked[-1][prefix + key]) if asked else None
                    for name, key in OF_TEACHER.items()
                },
            }


def verdict(arms: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The comparison in sentences, of the first two arms; nothing where no arm can be compared."""
    baseline = next((arm for arm in arms if arm["is_baseline"]), None)
    if baseline is None:
        return
    compared = [arm for arm in arms if arm["saved"] is not None]
    for arm in compared[:2]:
        saved = arm["saved"]["seconds"]["all"]
        sentence = (
            f"{arm['arm']} trained in {duration(arm['seconds']['all'])} where {baseline['arm']} took "
            f"{duration(baseline['seconds']['all'])}: {abs(saved):.0%} {'less' if saved >= 0 else 'more'}"
        )
        if arm["accuracy"] is not None and baseline["accuracy"] is not None:
            apart = arm["ci95"][0] > baseline["ci95"][1] or arm["ci95"][1] < baseline["ci95"][0]
            sentence += (
                f", with {percent(arm['accuracy'])} right against {percent(baseline['accuracy'])} (95% intervals over "
                f"problems {'lie apart' if apart else 'overlap'})"
            )
        yield sentence + "."
    if len(compared) > 2:
        yield f"{len(compared) - 2} more {'arm is' if len(compared) == 3 else 'arms are'} in the table."


def missing(run: Run) -> Iterator[str]:
    """What the page lacks of a run, and why."""
    if len(run.steps) < run.planned:
        yield f"{len(run.steps)} of {run.planned} steps are done; the rest is not in this page."
    if not run.evaluations:
        why = "has no result yet" if run.config["evaluation"]["data"] else "is off (evaluation.data is not set)"
        yield f"Evaluation {why}, so there is no accuracy."
    if not run.config["pruning"]["enable"]:
        weights = (
            "tokens to train on are drawn at random"
            if run.config.get("control", {}).get("kept_tokens")
            else ("every token has weight 1")
        )
        yield f"Pruning is off: {weights}, and effective length is only what drift would have left."
    if not (run.path / "drift.jsonl").is_file() and run.steps:
        yield "drift.jsonl is not there, so overlap by position, weights and drift onset are not shown."
    if not (run.path / "rollouts.jsonl").is_file() and run.steps:
        yield "rollouts.jsonl is not there (tracking.rollouts_per_step = 0 writes none), so no rollout is shown."


def probes(runs: Sequence[Run]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(folder, what `prune-opd probe` wrote) of each folder of runs, or of a comparison, that has a probe.json."""
    for folder in dict.fromkeys(folder for run in runs for folder in (run.path, run.path.parent)):
        if (folder / "probe.json").is_file():
            yield folder.name, read_object(folder / "probe.json", Probe)


def settings_table(runs: Sequence[Run]) -> dict[str, Any]:
    """Dotted settings: those that all runs share, by section, and those in which arms differ (seeds aside)."""
    flat = {run.arm: dict(flattened(run.config)) for run in runs}
    names = list(dict.fromkeys(name for settings in flat.values() for name in settings))
    differing = [n for n in names if n != "training.seed" and len({repr(s.get(n)) for s in flat.values()}) > 1]
    shared: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if name not in differing:
            section, _, rest = name.partition(".")
            value = next(settings[name] for settings in flat.values() if name in settings)
            if name == "training.seed":
                value = sorted({run.seed for run in runs}) if len(runs) > 1 else value
            shared.setdefault(section, []).append((rest, _setting(value)))
    return {
        "arms": list(flat),
        "differing": [(name, [_setting(settings.get(name)) for settings in flat.values()]) for name in differing],
        "shared": shared,
    }


# ---- numbers ----


def _share_saved(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    return {name: 1 - ours[name] / theirs[name] for name in ours if theirs[name] > 0}


def _first_and_last(runs: Sequence[Run], key: str) -> tuple[float, float] | None:
    found = [(run.steps[0][key], run.steps[-1][key]) for run in runs if run.steps]
    return (float(np.mean([a for a, _ in found])), float(np.mean([b for _, b in found]))) if found else None


def _finite(value: Any) -> Any:
    """NaN and infinities as null, which JSON has; what was not logged is null too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _setting(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:  # one number a step, of a control
        return f"{json.dumps(value[:3])[:-1]}, …, {json.dumps(value[-1])}] ({len(value)} entries)"
    return value if isinstance(value, str) else "not set" if value is None else json.dumps(value)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

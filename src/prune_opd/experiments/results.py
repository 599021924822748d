"""What a comparison came to: the table, `compare.json`, `compare.csv`, and the plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from prune_opd.config import Config
from prune_opd.errors import RunLogError
from prune_opd.reporting.records import THIS_WINDOW
from prune_opd.reporting.run_logs import read_metrics, trained
from prune_opd.reporting.statistics import QUANTITIES, difference, evaluation_curve, seconds_to, spread, summary

BASELINE = "opd"  # the arm that others are compared with, if it is among them


def run_record(run_dir: Path, seed: int, totals: dict[str, float], config: Config) -> dict[str, Any]:
    """What a comparison keeps of one finished run, read from its metrics.jsonl.

    Raises RunLogError where that lacks an evaluation, which leaves nothing to compare.
    """
    records = list(read_metrics(run_dir))
    every, steps = config.evaluation.every, config.training.steps
    lacking = {0, *range(every, steps, every), steps} - {r["step"] for r in records if "eval/accuracy" in r}
    if lacking:
        raise RunLogError(
            f"{run_dir / 'metrics.jsonl'} lacks the evaluation after step {min(lacking)}, which arms are compared by; "
            f"put it back from a copy, or remove {run_dir} to run it again"
        )
    last = [r for r in records if "eval/accuracy" in r][-1]
    return {
        "seed": seed,
        "run_dir": run_dir.name,
        "accuracy": last["eval/accuracy"],
        "per_problem": last["eval/per_problem"],
        "evaluations": evaluation_curve(records),
        "window": [r[THIS_WINDOW] for r in records if trained(r)],
        **{name: totals[name] for name in QUANTITIES},
    }


def write_results(output_dir: Path, config: Config, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Write `compare.json` and `compare.csv` of the runs so far, so that an interrupted comparison keeps what it has.

    runs: of each arm, in order, its `run_record`s. Arms are compared with opd, or with the first arm where opd is none
    of them.
    """
    arms = {arm: summarise(arm, of_arm) for arm, of_arm in runs.items() if of_arm}
    baseline = BASELINE if BASELINE in runs else next(iter(runs))
    if baseline in arms:  # else it has not run yet
        for name, arm in arms.items():
            arm["seconds_to_baseline"] = seconds_to(arms[baseline]["accuracy"]["mean"], arm["runs"])
            if name != baseline:
                arm["difference"] = difference(runs[name], runs[baseline])
                for quantity in ("train_seconds", "student_tokens"):
                    arm[f"{quantity}_saving"] = 1 - arm[quantity]["mean"] / arms[baseline][quantity]["mean"]
    results = {"arms": list(arms.values()), "baseline": baseline, "recipe": config.model_dump()}
    (output_dir / "compare.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    columns = ("arm", "seed", "accuracy", *QUANTITIES, "run_dir")
    with (output_dir / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        rows.writerows({"arm": arm, **run} for arm, of_arm in runs.items() for run in of_arm)
    return results


def summarise(arm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm over its seeds."""
    kept = [{name: value for name, value in run.items() if name != "per_problem"} for run in runs]
    return {
        "arm": arm,
        "seeds": [run["seed"] for run in runs],
        "accuracy": summary([run["accuracy"] for run in runs], [run["per_problem"] for run in runs]),
        **{name: spread([run[name] for run in runs]) for name in QUANTITIES},
        "runs": kept,
    }


def results_table(results: dict[str, Any]) -> Table:
    """The comparison as people read it, in 80 columns; `compare.csv` has the rest."""
    seeds = max((arm["seeds"] for arm in results["arms"]), key=len)
    several = len(seeds) > 1
    table = Table(
        title=f"held-out accuracy and cost, {len(seeds)} seed{'s' * several}, equal steps",
        caption=f"accuracy in % ± sd over seeds; difference from {results['baseline']} in points, paired by "
        + ("seed, with its 95% t-interval over seeds" if several else "problem, with its 95% interval over problems")
        + f"; to equal: training s until the accuracy that {results['baseline']} had at the end",
        box=box.SIMPLE,
        show_edge=False,
        padding=0,  # the box has a space between columns
    )
    for heading in ("arm", "accuracy", "difference", "training s", "saved", "to equal", "tokens"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for arm in results["arms"]:
        found = arm.get("difference", {}).get("accuracy")
        saving, to_equal = arm.get("train_seconds_saving"), arm.get("seconds_to_baseline")
        table.add_row(
            arm["arm"],
            _with_std(arm["accuracy"], 100),
            _difference(found) if found else "-",
            _with_std(arm["train_seconds"], 1, digits=0 if arm["train_seconds"]["mean"] >= 100 else 1),
            "-" if saving is None else f"{saving:.0%}",
            "-" if to_equal is None else f"{to_equal:.0f}",
            f"{arm['student_tokens']['mean'] / 1000:,.0f}k",
        )
    return table


def _with_std(value: dict[str, Any], scale: float, digits: int = 1) -> str:
    std = f" ± {scale * value['std']:.{digits}f}" if value["std"] is not None else ""
    return f"{scale * value['mean']:.{digits}f}{std}"


def _difference(accuracy: dict[str, Any]) -> str:
    low, high = accuracy["ci95"] or accuracy["ci95_problems"]
    return f"{100 * accuracy['mean']:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


# ---- the plot ----

# Okabe and Ito's colours, which stay apart for colour-blind readers; the yellow is left out, too pale on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", ":")


def plot_results(results: dict[str, Any], path: Path) -> None:
    """Accuracy against training time (validation not counted) to `path`, PNG or SVG by its suffix.

    A line joins the means over seeds at each evaluation; bars reach from the lowest to the highest seed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)  # its own canvas: no display, and no state of pyplot is touched
    axes = figure.add_subplot()
    for i, arm in enumerate(results["arms"]):
        seconds, accuracy = (
            np.array([[e[name] for e in run["evaluations"]] for run in arm["runs"]])
            for name in ("train_seconds", "accuracy")
        )
        x, y = seconds.mean(0), 100 * accuracy
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        axes.plot(x, y.mean(0), dashes, color=colour, marker="o", markersize=4, label=arm["arm"])
        axes.vlines(x, y.min(0), y.max(0), color=colour, alpha=0.4)
    seeds = results["arms"][0]["seeds"]
    axes.set(
        xlabel="training time, s (validation not counted)",
        ylabel="held-out accuracy, %",
        title=f"{results['recipe']['model']['model_name_or_path']} ← "
        f"{results['recipe']['model']['teacher_model_name_or_path']}, {len(seeds)} seed{'s' * (len(seeds) > 1)}",
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)

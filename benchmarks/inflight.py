"""What stopping in flight costs and spares in one step: `python benchmarks/inflight.py`.

Three arms alternate in one process, each step from the same weights, on the embedded pairs without a training window:
plain OPD; drift watched in flight, but no rollout ever stopped (all of them audits); rollouts stopped. From them:

    monitoring   seconds of the drift phase (overlap, events, stop decisions) as a share of the watched step
    reading      the watched step's time over that of plain OPD, which scores each batch once
    teacher      tokens that went through the teacher, against tokens kept + one chunk for each stopped rollout
    saved        the stopped step's time against plain OPD's

A whole training run is `prune-opd compare recipes/inflight.toml --arms opd,prune,prune-inflight`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from prune_opd.config import load_config, with_settings
from prune_opd.training.trainer import Trainer

RECIPES = Path(__file__).parent.parent / "recipes"
ARMS: dict[str, dict[str, Any]] = {
    "opd": {"pruning.in_flight.enable": False, "pruning.enable": False},
    "watched": {"pruning.in_flight.enable": True, "pruning.in_flight.audit_share": 1.0},
    "stopped": {"pruning.in_flight.enable": True},
}
QUANTITIES = (
    "time/total",
    "time/rollout",
    "time/teacher",
    "time/drift",
    "time/update",
    "tokens/generated",
    "tokens/scored",
    "tokens/trained",
    "completions/stopped_by_drift",
    "rollout/slot_occupancy",
)


def measure(recipe: Path, settings: dict[str, Any], repeats: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """The metrics of `repeats` steps of each arm, alternating, after one warm-up step of each."""
    trainers = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # settings of the recipe that an arm has no use for
        config = with_settings(
            load_config(recipe), **{"pruning.dynamic_response_length.enable": False, "evaluation.data": "", **settings}
        )
        for arm, changes in ARMS.items():
            trainers[arm] = Trainer(with_settings(config, **changes), folder / arm, console=Console(quiet=True))
            (folder / arm).mkdir()
    weights = {name: value.clone() for name, value in trainers["opd"].student.state_dict().items()}
    samples: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for repeat in range(repeats + 1):
        for arm, trainer in trainers.items():
            trainer.parts.student.load_state_dict(weights)
            record = trainer._step(repeat)
            if repeat:
                samples[arm].append({name: record.get(name, 0.0) for name in QUANTITIES})
    return samples


def summary_of(samples: dict[str, list[dict[str, float]]], chunk: int, rollouts: int) -> dict[str, Any]:
    """Medians by arm, and the four shares that this benchmark is about, each the median over repeats side by side."""

    def median_of(quantity: Any) -> float:
        return statistics.median(map(quantity, zip(*(samples[arm] for arm in ARMS), strict=True)))

    return {
        "medians": {
            arm: {name: statistics.median(repeat[name] for repeat in repeats) for name in QUANTITIES}
            for arm, repeats in samples.items()
        },
        "monitoring": median_of(lambda r: r[1]["time/drift"] / r[1]["time/total"]),
        "reading": median_of(lambda r: r[1]["time/total"] / r[0]["time/total"]),
        "saved": median_of(lambda r: 1 - r[2]["time/total"] / r[0]["time/total"]),
        "teacher": median_of(
            lambda r: (
                r[2]["tokens/scored"]
                / (r[2]["tokens/trained"] + chunk * rollouts * r[2]["completions/stopped_by_drift"])
            )
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each arm")
    parser.add_argument("--chunk", type=int, default=64, help="tokens between two looks of the teacher")
    parser.add_argument("--stop-after-events", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/inflight.json"))
    args = parser.parse_args()
    logging.disable_progress_bar()
    console, pairs = Console(width=130), {}
    settings = {
        "pruning.in_flight.chunk": args.chunk,
        "pruning.in_flight.stop_after_events": args.stop_after_events,
        "training.threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
    }
    for pair, recipe in {"low compatibility": "quickstart.toml", "high compatibility": "high.toml"}.items():
        with tempfile.TemporaryDirectory() as folder:
            samples = measure(RECIPES / recipe, settings, args.repeats, Path(folder))
        config = load_config(RECIPES / recipe)
        rollouts = config.rollout.prompts_per_step * config.rollout.num_generations
        found = summary_of(samples, args.chunk, rollouts)
        pairs[pair] = {**found, "samples": samples}
        table = Table(title=f"{pair}: one step, median of {args.repeats}", title_justify="left")
        table.add_column("")
        for name in QUANTITIES:
            table.add_column(name.split("/")[1].replace("_", " "), justify="right")
        for arm, row in found["medians"].items():
            table.add_row(arm, *(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in row.values()))
        console.print(table)
        console.print(
            f"monitoring {found['monitoring']:.2%} of the watched step; watching costs {found['reading'] - 1:+.1%}; "
            f"stopping saves {found['saved']:.1%}; teacher tokens {found['teacher']:.3f} of the bound\n",
            highlight=False,
        )
    about = {
        "settings": settings,
        "versions": {name: version(name) for name in ("prune-opd", "torch", "transformers")},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**about, "pairs": pairs}, indent=1) + "\n", encoding="utf-8")
    console.print(f"{about['versions']}; written to {args.output}", highlight=False)


if __name__ == "__main__":
    main()

"""Two thousand steps on the smallest pair: does memory grow, do file handles, is a step slow without a logged cause?

    python benchmarks/soak.py [--steps 2000]        (or make soak)

Runs `prune-opd train` as a process of its own and looks at it from outside, through /proc, every half second. Writes
soak.json in the output directory and exits with 1 when a promise of docs/reliability.md does not hold:

- memory: the slope of the resident size over the steps after 100, times the steps, is below 2% of its mean, or not
  significant (its 95% interval, from means of blocks since neighbours in time are alike, holds zero);
- file handles: as many at the end as after step 100, give or take those of a checkpoint being written;
- no step took more than three times the median of its 51 neighbours for which metrics.jsonl has no cause: more tokens,
  or processor time (`time/cpu`) as usual, so that it waited for the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
SETTINGS = {
    "rollout.prompts_per_step": 2,
    "rollout.num_generations": 2,
    "rollout.max_completion_length": 48,
    "pruning.dynamic_response_length.init_len": 16,
    "pruning.dynamic_response_length.min_len": 16,
    "pruning.dynamic_response_length.max_len": 48,
    "pruning.in_flight.enable": "true",
    "pruning.in_flight.chunk": 8,
    "training.save_every": 50,
    "training.keep_every": 500,
    "evaluation.every": 100,
    "evaluation.num_problems": 8,
    "evaluation.k": 1,
    "evaluation.max_tokens": 48,
}
WARM_UP = 100
TIMES = 3.0  # a step this many times the median of its neighbours is slow


def watch(pid: int, log: Path, process: subprocess.Popen[bytes]) -> list[tuple[int, int, int]]:
    """(step, resident bytes, open files) of a process, until it ends."""
    samples = []
    while process.poll() is None:
        try:
            step = sum(1 for _ in log.open("rb")) - 1 if log.exists() else 0  # the first line is step 0
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            if pages == 0:  # it has ended, and nobody has waited for it yet
                break
            samples.append((step, pages * 4096, len(list(Path(f"/proc/{pid}/fd").iterdir()))))
        except (OSError, IndexError):
            break
        time.sleep(0.5)
    return samples


def memory_slope(samples: list[tuple[int, int, int]], blocks: int = 20) -> dict[str, float]:
    """Bytes a step after the warm-up, with a 95% interval from a line through the means of `blocks` stretches."""
    steps, resident = (np.array([s[i] for s in samples if s[0] > WARM_UP], dtype=float) for i in (0, 1))
    x, y = (np.array([part.mean() for part in np.array_split(values, blocks)]) for values in (steps, resident))
    (slope, offset), covariance = np.polyfit(x, y, 1, cov=True)
    half = 2.1 * float(np.sqrt(covariance[0, 0]))  # Student's t of 18 degrees of freedom
    return {"slope": float(slope), "low": float(slope) - half, "high": float(slope) + half, "mean": float(y.mean())}


def slow_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps far above the median of their neighbours, each with the cause that its record tells, or None."""
    seconds, cpu, tokens = (
        np.array([r[name] for r in records]) for name in ("time/total", "time/cpu", "tokens/generated")
    )
    found = []
    for i, record in enumerate(records):
        near = slice(max(0, i - 25), i + 26)
        usual, usual_tokens = np.median(seconds[near]), np.median(tokens[near])
        if seconds[i] > TIMES * usual:
            waited = cpu[i] <= TIMES * np.median(cpu[near])
            longer = tokens[i] > TIMES / 2 * usual_tokens
            cause = "waited for the processor or the disk" if waited else "more tokens" if longer else None
            found.append({"step": record["step"], "times": float(seconds[i] / usual), "cause": cause})
    return found


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output-dir", type=Path, default=Path("runs") / time.strftime("soak-%Y%m%d-%H%M%S"))
    options = parser.parse_args()
    command = [sys.executable, "-c", "from prune_opd.cli import main; main()", "train", str(RECIPE)]
    command += ["--output-dir", str(options.output_dir / "run"), "--set", f"training.steps={options.steps}"]
    command += [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    options.output_dir.mkdir(parents=True)
    began, log = time.perf_counter(), options.output_dir / "run" / "metrics.jsonl"
    with (options.output_dir / "console.txt").open("wb") as console:
        process = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT)
        samples = watch(process.pid, log, process)
        process.wait()
    records = [r for line in log.read_text().splitlines() if (r := json.loads(line))["step"] > 0]
    memory, slow = memory_slope(samples), slow_steps(records)
    handles = [s[2] for s in samples if s[0] > WARM_UP]
    growth = memory["slope"] * (options.steps - WARM_UP) / memory["mean"]
    checks = {
        "the run ended well": process.returncode == 0 and len(records) == options.steps,
        "memory flat": growth < 0.02 or memory["low"] <= 0,
        "file handles flat": handles[-1] <= min(handles) + 2 and max(handles) <= min(handles) + 4,
        "no slow step without a cause": all(s["cause"] for s in slow),
    }
    seconds = np.array([r["time/total"] for r in records])
    found = {
        "command": " ".join(command),
        "seconds": time.perf_counter() - began,
        "steps": len(records),
        "memory_mb": memory["mean"] / 1e6,
        "memory_slope_bytes_per_step": [memory["slope"], memory["low"], memory["high"]],
        "memory_growth_share": growth,
        "file_handles": [min(handles), max(handles)],
        "step_seconds": {
            "median": float(np.median(seconds)),
            "p99": float(np.quantile(seconds, 0.99)),
            "max": seconds.max(),
        },
        "slow_steps": slow,
        "checks": checks,
    }
    (options.output_dir / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

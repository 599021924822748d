"""Does a change leave every number as it was? Run before and after it, and compare the two files.

    python scripts/fingerprint.py before.json
    (the change)
    python scripts/fingerprint.py after.json --against before.json

Each case trains the embedded pair for three steps through the command line, and keeps the SHA-256 of the weights and of
the metrics, times left out. `--only NAME` runs one case.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = {
    "training.steps": 3,
    "rollout.prompts_per_step": 4,
    "evaluation.num_problems": 4,
    "evaluation.k": 1,
    "evaluation.every": 3,
}
CASES: dict[str, tuple[str, dict[str, object], int]] = {  # recipe, settings, processes
    "quickstart": ("quickstart", {}, 1),
    "in flight": ("inflight", {}, 1),
    "reward": ("high", {"reward.function": "grade", "reward.after_drift": "task_only", "pruning.w_drop": 0.2}, 1),
    "lora": ("quickstart", {"model.lora.r": 4}, 1),
    "union, weight_mean": (
        "quickstart",
        {"objective.top_k_strategy": "union", "objective.weight_normalization": "weight_mean"},
        1,
    ),
    "reverse_kl": ("quickstart", {"objective.loss": "reverse_kl"}, 1),
    "ahead": ("inflight", {"rollout.ahead": True, "rollout.importance_sampling_cap": 2.0}, 1),
    "random tokens": ("quickstart", {"pruning.enable": False, "control.kept_tokens": [200, 150, 100]}, 1),
    "compiled": ("inflight", {"model.compile": True}, 1),
    "two ranks": ("inflight", {}, 2),
    "two ranks, fsdp2": ("inflight", {"training.parallel": "fsdp2"}, 2),
}
UNLIKE = ("time/", "eta_seconds")  # what differs between two runs of the same code


def fingerprint(recipe: str, settings: dict[str, object], processes: int, run_dir: Path) -> dict[str, str]:
    """Train, and say what came out: SHA-256 of the weights, and of the metrics without times."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(Path(sys.executable).with_name("prune-opd")), "train", str(ROOT / f"recipes/{recipe}.toml")]
    command += ["--output-dir", str(run_dir), "--quiet"]
    for name, value in (SMALL | settings).items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    (weights,) = (run_dir / "checkpoints/step_3").glob("*model.safetensors")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in record.items() if not key.startswith(UNLIKE)} for record in records]
    logs = b"".join((run_dir / name).read_bytes() for name in ("drift.jsonl", "rollouts.jsonl"))
    return {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "metrics": hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest(),
        "logs": hashlib.sha256(logs).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path, help="a file of an earlier call; exits with 1 where it differs")
    parser.add_argument("--only", choices=CASES, help="one case")
    args = parser.parse_args()
    earlier = json.loads(args.against.read_text()) if args.against else {}
    found, differs = {}, False
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, case) in enumerate(CASES.items()):
            if args.only in (None, name):
                found[name] = fingerprint(*case, Path(folder) / str(number))
                changed = [part for part, digest in found[name].items() if earlier.get(name, {}).get(part) != digest]
                differs |= bool(earlier) and bool(changed)
                verdict = ("differs: " + ", ".join(changed) if changed else "equal") if earlier else "written"
                print(f"{name:20} {found[name]['weights'][:12]} {verdict}", flush=True)
                args.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(differs)


if __name__ == "__main__":
    main()

"""Thirty steps of the low pair through verl on the CPU, and through our trainer with the same settings and prompts.

    .venv-verl/bin/python -m tests.integrations.verl_e2e.thirty_steps build/thirty-steps --seeds 3

Prints both windows step by step and the held-out accuracy after them. The seeds are our trainer's; verl's sampling is
the server's (cpu.py). Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.integrations.verl_e2e import launch
from tests.integrations.verl_e2e.launch import ACTOR, OWN, ROLLOUT, ROOT

PROMPTS, ROLLOUTS_OF_A_PROMPT, STEPS, LONGEST = 8, 2, 30, 322
PRUNING = {  # of recipes/quickstart.toml
    "threshold": 0.6,
    "w_drop": 0.02,
    "dynamic_response_length.init_len": 48,
    "dynamic_response_length.min_len": 48,
    "dynamic_response_length.max_len": LONGEST,
    "dynamic_response_length.step": 4,
    "dynamic_response_length.margin": 4,
    "dynamic_response_length.hit_ratio": 0.1,
    "dynamic_response_length.shrink_patience": 3,
}
WINDOW = "prune_opd/current_max_response_length"
CLI = [sys.executable, "-c", "from prune_opd.cli import main; main()"]


def through_verl(out: Path) -> list[dict[str, float]]:
    """Metrics of each step; the student after them is in out/student."""
    data = out / "data"
    data.mkdir(parents=True)
    launch.write_data(data, steps=STEPS, prompts_per_step=PROMPTS)
    changes: dict[str, object] = {
        "data.shuffle": "false",
        "data.train_batch_size": PROMPTS,
        "data.max_response_length": LONGEST,
        f"{ACTOR}.ppo_mini_batch_size": PROMPTS,
        f"{ACTOR}.ppo_max_token_len_per_gpu": 2048,
        f"{ROLLOUT}.n": ROLLOUTS_OF_A_PROMPT,
        **{f"+{OWN}.pruning.{name}": value for name, value in PRUNING.items()},
    }
    run = launch.train(data, out / "run", steps=STEPS, changes=changes)
    assert run.code == 0, run.log[-5000:]
    student = AutoModelForCausalLM.from_pretrained(data / "low-student", dtype=torch.float32)
    student.load_state_dict(run.weights[-1], strict=False)
    student.tie_weights()
    (out / "student").mkdir()
    for path in (data / "low-student").iterdir():
        if path.suffix == ".json":
            (out / "student" / path.name).write_bytes(path.read_bytes())
    student.save_pretrained(out / "student")
    return [step.metrics for step in run.steps]


def through_ours(out: Path, seed: int) -> list[dict[str, float]]:
    settings = {
        "rollout.prompts_per_step": PROMPTS,
        "rollout.num_generations": ROLLOUTS_OF_A_PROMPT,
        "training.steps": STEPS,
        "training.seed": seed,
        "evaluation.num_problems": 1,  # what counts is `prune-opd eval`, for both
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    recipe = str(ROOT / "recipes" / "quickstart.toml")
    subprocess.run([*CLI, "train", recipe, *words, "--output-dir", str(out), "--quiet"], check=True)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if WINDOW in line]


def accuracy(model: Path, out: Path) -> str:
    """On 200 held-out problems, with its 95% interval."""
    sampling = ["--k", "2", "--top-p", "1.0", "--max-tokens", str(LONGEST), "--num-problems", "200"]
    subprocess.run(
        [*CLI, "eval", str(model), "--benchmark", "task:chain_sum", *sampling, "--output-dir", str(out), "--quiet"],
        check=True,
    )
    found = json.loads((out / "eval.json").read_text())
    return f"{found['accuracy']:.4f} {found['ci95']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    verl = through_verl(options.out / "verl")
    print("verl  ", [int(step[WINDOW]) for step in verl])
    print("verl  ", accuracy(options.out / "verl" / "student", options.out / "verl" / "eval"))
    for seed in range(options.seeds):
        folder = options.out / f"ours-{seed}"
        ours = through_ours(folder, seed)
        print("ours", seed, [int(step[WINDOW]) for step in ours])
        print("ours", seed, accuracy(folder / "checkpoints" / f"step_{STEPS}", options.out / f"eval-{seed}"))


if __name__ == "__main__":
    main()

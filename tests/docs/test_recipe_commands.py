"""The commands in the heads of the recipes for GPUs: they name their recipe, pass the dry run, fit, and start.

Started on the CPU with two processes, and the embedded pair in place of the models; engines of vLLM are in
tests/engines.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prune_opd.cli import app
from prune_opd.config import load_config, with_settings

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
RECIPES = {
    path.stem: path for folder in ("scale", "paper") for path in sorted((ROOT / "recipes" / folder).glob("*.toml"))
}
ON_A_CPU = [
    "model.model_name_or_path=embedded:low-student",
    "model.teacher_model_name_or_path=embedded:teacher",
    "model.teacher_dtype=float32",
    "data.train=task:chain_sum",
    "data.prompt_suffix=",
    "data.chat_template_kwargs={}",
    "data.max_prompt_length=64",
    "rollout.use_vllm=false",
    "rollout.dtype=float32",
    "rollout.prompts_per_step=2",
    "rollout.num_generations=2",
    "rollout.max_completion_length=24",
    "objective.top_k=4",
    "pruning.dynamic_response_length.init_len=16",
    "pruning.dynamic_response_length.min_len=16",
    "pruning.dynamic_response_length.max_len=24",
    "pruning.in_flight.chunk=8",
    "training.steps=1",
    "training.device=cpu",
    "evaluation.data=task:chain_sum",
    "evaluation.num_problems=1",
    "evaluation.k=1",
    "evaluation.max_tokens=8",
]


def commands(path: Path) -> list[list[str]]:
    """The commands that train in a recipe's head, each as words, its variables in front."""
    head = path.read_text(encoding="utf-8").split("\n\n[")[0].split("\nextends")[0]
    lines = "\n".join(line.removeprefix("#     ") for line in head.splitlines() if line.startswith("#     "))
    text = lines.replace("\\\n", " ").replace("$(which prune-opd)", "prune-opd")
    found = [shlex.split(line) for line in text.splitlines()]
    return [words for words in found if "train" in words]


HEADS = {name: commands(path)[0] for name, path in RECIPES.items()}
GPUS = {"1x1-24gb": 1, "1x1-80gb": 1, "1x8": 8, "1x8-servers": 4, "2x8": 16, "4x8": 32}  # the paper's: 8


def processes(words: list[str]) -> int:
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--n"))
    return int(options.get("nnodes", 1)) * int(options.get("nproc-per-node", 1))


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_has_its_command(name):
    assert HEADS[name][HEADS[name].index("train") + 1] == str(RECIPES[name].relative_to(ROOT))
    assert processes(HEADS[name]) == GPUS.get(name, 8)


@pytest.mark.parametrize("name", [*GPUS, "justrl-1.5b"])
def test_the_command_passes_the_dry_run_and_fits(name, monkeypatch):
    """The other pairs of the paper: tests/preflight/test_topology.py."""
    monkeypatch.chdir(ROOT)
    words = HEADS[name][HEADS[name].index("train") :]
    memory = "24GB" if "24gb" in name else "80GB"
    plan = ["--dry-run", "--gpus", str(processes(HEADS[name])), "--gpu-memory", memory]
    result = CliRunner().invoke(app, [*words, *plan], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    verdict = next(line for line in result.output.splitlines() if line.strip().startswith("verdict"))
    assert verdict.split()[1] == "fits", verdict


def test_four_gpus_that_train_and_four_that_serve_are_the_papers_run():
    servers, paper = (load_config(RECIPES[name]) for name in ("1x8-servers", "justrl-1.5b"))
    urls = servers.rollout.vllm_server_url
    share = paper.rollout.vllm_gpu_memory_utilization
    same = with_settings(paper, **{"rollout.vllm_server_url": urls, "rollout.vllm_gpu_memory_utilization": 0.3})
    assert share != 0.3 and servers == same
    started = [f"http://127.0.0.1:800{gpu}" for gpu in (4, 5, 6, 7)]
    assert urls == started and "for gpu in 4 5 6 7" in RECIPES["1x8-servers"].read_text(encoding="utf-8")


def started(command: list[str], run: Path, **variables: str) -> dict:
    """Start it with two processes on the CPU; the metrics of its step."""
    arguments = [word for setting in ON_A_CPU for word in ("--set", setting)]
    path = f"{variables.pop('PATH', '')}{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "PATH": path} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((run / "env.json").read_text(encoding="utf-8"))["processes"] == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(row for row in rows if "loss" in row)


def with_two_processes(words: list[str]) -> list[str]:
    found = ["--nproc-per-node=2" if word.startswith("--nproc-per-node") else word for word in words]
    return [str(BIN / "prune-opd") if word == "prune-opd" else word for word in found]


@pytest.mark.slow
def test_the_command_of_the_node_starts(tmp_path):
    """Sharded, with stops in flight, in bfloat16: all that the recipe sets but vLLM and the models."""
    run = tmp_path / "run"
    row = started([*with_two_processes(HEADS["1x8"]), "--output-dir", str(run)], run)
    assert row["tokens/trained"] > 0 and row["grad_norm"] > 0


@pytest.mark.slow
def test_the_script_for_slurm_starts(tmp_path):
    """srun and scontrol are Slurm's; here they are a shell's, for one node that has two processes."""
    for name, body in (("srun", 'shift; exec "$@"'), ("scontrol", "echo localhost")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    row = started(
        ["bash", "recipes/scale/2x8.sbatch"],
        run,
        PATH=f"{tmp_path}{os.pathsep}",
        RUN_DIR=str(run),
        SLURM_JOB_ID=str(os.getpid()),
        **slurm,
    )
    assert row["tokens/trained"] > 0 and row["grad_norm"] > 0
    text = (ROOT / "recipes/scale/2x8.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --nodes=2\n" in text and "#SBATCH --gpus-per-node=8\n" in text

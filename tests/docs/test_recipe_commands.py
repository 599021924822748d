"""The commands in the heads of the recipes for GPUs, and in their files for Slurm and Kubernetes: they name their
recipe, pass the dry run, fit, and start. What Kubernetes and a container builder read besides: test_containers.py.

Started on the CPU with two processes, and the embedded pair in place of the models; engines of vLLM are in
tests/engines.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from prune_opd.cli import app
from prune_opd.config import load_config, with_settings
from prune_opd.errors import RunInterrupted

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


def split(script: str) -> list[list[str]]:
    """The commands of a shell script, each as words."""
    text = script.replace("\\\n", " ").replace("$(which prune-opd)", "prune-opd")
    return [shlex.split(line, comments=True) for line in text.splitlines() if "$(" not in line]


def commands(path: Path) -> list[list[str]]:
    """The commands that train in a recipe's head, each as words, its variables in front."""
    head = path.read_text(encoding="utf-8").split("\n\n[")[0].split("\nextends")[0]
    lines = "\n".join(line.removeprefix("#     ") for line in head.splitlines() if line.startswith("#     "))
    return [words for words in split(lines) if "train" in words]


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


SCALE = ROOT / "recipes" / "scale"
JOBSET = yaml.safe_load((SCALE / "2x8.jobset.yaml").read_text(encoding="utf-8"))
JOB = yaml.safe_load((SCALE / "1x1-80gb.job.yaml").read_text(encoding="utf-8"))


def only_container(job: dict) -> dict:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


NODE = only_container(JOBSET["spec"]["replicatedJobs"][0]["template"])
SCHEDULED = {  # all commands of a file for a scheduler
    "2x8.sbatch": split((SCALE / "2x8.sbatch").read_text(encoding="utf-8")),
    "1x8-servers.sbatch": split((SCALE / "1x8-servers.sbatch").read_text(encoding="utf-8")),
    "2x8.jobset.yaml": split(NODE["args"][0]),
    "1x1-80gb.job.yaml": [
        ["prune-opd", *JOB["spec"]["template"]["spec"]["initContainers"][0]["args"]],
        ["prune-opd", *only_container(JOB)["args"]],
    ],
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_what_a_scheduler_starts_is_known_to_torchrun_and_to_us(name, tmp_path, monkeypatch):
    """Slurm's start from the repository, those of Kubernetes in an image that has the wheel alone. Read and not run:
    the same recipes pass the dry run above."""
    monkeypatch.chdir(ROOT if name.endswith("sbatch") else tmp_path)
    (train,) = [words for words in SCHEDULED[name] if "train" in words]
    at = train.index("train")
    words = [word for word in train[at:] if word not in ("&", "$@")]
    for copied in (words for words in SCHEDULED[name] if words[:2] == ["prune-opd", "recipes"]):
        here = str(tmp_path / Path(copied[3]).name)
        assert CliRunner().invoke(app, [*copied[1:3], here]).exit_code == 0
        assert words[1] == copied[3], "the recipe that was copied is the one that is read"
        words[1] = here
    launched = train[:at]
    if "torchrun" in launched:
        launched = launched[launched.index("torchrun") + 1 :]
        numbers = {"$SLURM_NNODES": "2", "$SLURM_GPUS_ON_NODE": "8", "$JOB_COMPLETION_INDEX": "1"}
        filled = [re.sub(r"\$\w+$", lambda found: numbers.get(found[0], found[0]), word) for word in launched]
        options = get_args_parser().parse_args(filled)
        gpus = int(options.nnodes.partition(":")[0]) * int(options.nproc_per_node)
    else:
        gpus = 1
    recipe = name.partition(".")[0]
    assert gpus == GPUS[recipe]
    settings = typer.main.get_command(app).commands["train"].make_context("train", words[1:]).params  # type: ignore[attr-defined]
    assert settings["resume"] == "auto" and str(settings["output_dir"]).endswith(
        f"/{recipe}" if "$" not in words[3] else "$run"
    )
    assert load_config(words[1]) == load_config(RECIPES[recipe])


def test_the_servers_are_those_of_the_recipe():
    head = RECIPES["1x8-servers"].read_text(encoding="utf-8").replace("#     ", "").split("then the trainer")[0]
    theirs, mine = (
        next(words[: words.index("800$gpu")] for words in found if "serve" in words)
        for found in (
            split("\n".join(line for line in head.splitlines() if "#" not in line)),
            SCHEDULED["1x8-servers.sbatch"],
        )
    )
    assert mine == theirs and "--max-logprobs" in mine


def test_torchrun_leaves_the_step_nearly_the_time_that_the_scheduler_does():
    """Its own 30 seconds would kill a step of minutes, whatever the scheduler gives."""
    given = {"2x8.jobset.yaml": JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]}
    found = {name: spec["terminationGracePeriodSeconds"] for name, spec in given.items()}
    left = {"2x8.jobset.yaml": next(e["value"] for e in NODE["env"] if e["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")}
    for name in ("2x8.sbatch", "1x8-servers.sbatch"):
        text = (SCALE / name).read_text(encoding="utf-8")
        found[name] = re.search(r"^#SBATCH --signal=\S*TERM@(\d+)$", text, re.MULTILINE)[1]  # type: ignore[index]
        left[name] = re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+) ", text, re.MULTILINE)[1]  # type: ignore[index]
    assert found.keys() == left.keys()
    assert all(30 <= int(found[name]) - int(left[name]) <= 60 for name in found), (found, left)


@contextlib.contextmanager
def ended(command: list[str], env: dict[str, str], ready: Path, text: str) -> Iterator[tuple[int, str]]:
    """Start it, and send SIGTERM once `ready` has the text: the exit status and what was said."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=env, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            end = time.monotonic() + 240
            while process.poll() is None and not (ready.exists() and text in ready.read_text(encoding="utf-8")):
                assert time.monotonic() < end, "it did not get there in four minutes"
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=240)
            said.seek(0)
            yield code, said.read()
        finally:
            with contextlib.suppress(ProcessLookupError):  # what a script that does not clean up leaves
                os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.slow
def test_the_node_of_the_jobset_saves_and_exits_with_75(tmp_path):
    """Its shell script, for one node that has two processes on the CPU."""
    settings = [word for setting in [*ON_A_CPU, "training.steps=1000"] for word in ("--set", setting)]
    script = NODE["args"][0]
    for old, new in {
        "--nnodes=2": "--nnodes=1",
        "--nproc-per-node=8": "--nproc-per-node=2",
        "prune-opd-node-0-0.prune-opd": "localhost",
        "--master-port=29500": f"--master-port={20000 + os.getpid() % 10000}",
        "/tmp/": f"{tmp_path}/",
        "/shared/": f"{tmp_path}/",
        "--resume auto": f"--resume auto {shlex.join(settings)}",
    }.items():
        assert old in script
        script = script.replace(old, new)
    env = os.environ | {entry["name"]: entry["value"] for entry in NODE["env"]}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "JOB_COMPLETION_INDEX": "0"}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    run = tmp_path / "runs/2x8"
    with ended([*NODE["command"], script], env, run / "metrics.jsonl", '"loss"') as (code, said):
        assert code == RunInterrupted.exit_code == 75, said
    assert "saved; continue with --resume auto" in said and list((run / "checkpoints").glob("step_*"))


def test_the_script_with_servers_stops_the_trainer_first_and_the_servers_last(tmp_path):
    """vLLM and the trainer are a shell's, and write what happens to them in one file."""
    log = tmp_path / "log"
    waits = "trap 'echo $said ends >> $LOG; exit 1' TERM; while :; do sleep 0.05; done"
    for name, body in {
        "vllm": f'said="server $CUDA_VISIBLE_DEVICES"; echo "$said starts" >> $LOG; touch {tmp_path}/up; {waits}',
        "torchrun": f"said=trainer; echo $said starts $CUDA_VISIBLE_DEVICES >> $LOG; {waits}",
        "curl": f"test -e {tmp_path}/up",
        "prune-opd": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(log),
        "RUN_DIR": f"{tmp_path}/run",
    }
    command = ["bash", str(SCALE / "1x8-servers.sbatch")]
    with ended(command, env, log, "trainer starts") as (code, said):
        assert code == RunInterrupted.exit_code, said
        end = time.monotonic() + 10
        while len(lines := log.read_text(encoding="utf-8").splitlines()) < 10 and time.monotonic() < end:
            time.sleep(0.05)
    assert sorted(lines[:5]) == [*(f"server {gpu} starts" for gpu in (4, 5, 6, 7)), "trainer starts 0,1,2,3"]
    assert lines[5] == "trainer ends" and sorted(lines[6:]) == [f"server {gpu} ends" for gpu in (4, 5, 6, 7)]

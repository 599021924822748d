"""2 and 4 processes under torchrun against one: the same rollouts, loss, gradient, weights, window and files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_opd.config import load_config
from prune_opd.distributed.world import ALONE, World
from prune_opd.training.trainer import Trainer
from tests.distributed.distributed_cases import CASES_OF, run_case, run_half
from tests.training.test_trainer import BUDGET, SMALL

ROOT = Path(__file__).parents[2]


def torchrun(size: int, *command: str, timeout: float = 400) -> str:
    """Run a command in `size` processes; what they printed."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    @cache
    def run(size: int):
        out = tmp_path_factory.mktemp("ranks") / f"{size}.pt"
        torchrun(size, str(ROOT / "tests/distributed/distributed_cases.py"), str(out))
        return torch.load(out, weights_only=False)

    return run


@cache
def of_one(name: str):
    return run_case(name, ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in CASES_OF.items() for name in names])
def test_ranks_do_what_one_process_does(of_ranks, size, parallel, name):
    one, many = of_one(name), of_ranks(size)[name, parallel]
    for step, (alone, together) in enumerate(zip(one["steps"], many["steps"], strict=True)):
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-5), step
        assert many["ids"][step] == one["ids"][step], step
        for key in ("lengths", "effective"):
            assert torch.equal(many[key][step], one[key][step]), (step, key)
        empty = many["rows"][step].count(0)
        assert empty == (size - 1 if "one-prompt" in name else 0), "the case does not test what it says"
    assert one["gradients"].keys() == many["gradients"].keys() and one["weights"].keys() == many["weights"].keys()
    for kind in ("gradients", "weights"):
        for key, value in one[kind].items():
            torch.testing.assert_close(many[kind][key], value, rtol=1e-5, atol=1e-5, msg=f"{kind} {key}")
    windows = {record["prune_opd/next_max_response_length"] for record in one["steps"]}
    assert windows != {12} or name.endswith("full-logits"), "the window never moved: nothing tested"


@pytest.mark.slow
def test_layers_are_gathered_in_bfloat16_and_mastered_in_float32(of_ranks):
    """What autocast does in one process, but for the rounding of norms' weights."""
    one, two = run_half(ALONE, "ddp"), of_ranks(2)["half"]
    assert (one["weight"], two["weight"]) == (torch.float32, torch.bfloat16)
    assert one["between"] == two["between"] == torch.float32
    assert one["masters"] == two["masters"] == {torch.float32}
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-2)
    for name, gradient in one["gradients"].items():
        assert two["gradients"][name].dtype == torch.float32
        assert ((two["gradients"][name] - gradient).norm() / gradient.norm()).item() < 3e-2, name


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_nan_on_one_rank_stops_all_of_them(of_ranks, size, parallel):
    said = of_ranks(size)["broken"][parallel]
    assert said[0].startswith("step 8: the teacher's logits are NaN or infinite at ") and said == [said[0]] * size


# ---- whole runs: one launch of each kind, files compared with those of one process ----

RECIPE = str(ROOT / "recipes" / "quickstart.toml")
SECONDS = ("time/", "eta_seconds")
COST = ("tokens/generated", "tokens/scored", "tokens/update_padding", "rollout/slot_occupancy")


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith((*SECONDS, *COST))} for row in rows]


def train(size: int, folder: Path, *settings: str, resume: str = "never") -> None:
    if size == 1:
        config = load_config(RECIPE, [*SMALL, *BUDGET, *settings])
        Trainer(config, folder, resume=resume, console=Console(quiet=True)).train()
        return
    command = ["train", RECIPE, "--output-dir", str(folder), "--resume", resume]
    command += [word for setting in [*SMALL, *BUDGET, *settings] for word in ("--set", setting)]
    torchrun(size, "--no-python", str(Path(sys.executable).parent / "prune-opd"), *command)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(1, folder)
    assert len({row["rollout/prompts"] for row in records(folder)[1:]}) > 1, "the budget never changed: nothing tested"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_run_of_two_writes_what_a_run_of_one_writes_and_goes_on_with_any_number(tmp_path, alone, parallel):
    """Half of the steps with 2 processes, which share the teacher if sharded, the other half with 1 and with 4."""
    run = tmp_path / "run"
    placed = "model.teacher_placement=" + ("sharded" if parallel == "fsdp2" else "replicated")
    train(2, run, f"training.parallel={parallel}", "training.steps=2", placed)
    assert json.loads((run / "env.json").read_text())["processes"] == 2
    assert len(list((run / "checkpoints/step_2").glob("optimizer-*"))) == (2 if parallel == "fsdp2" else 1)
    AutoModelForCausalLM.from_pretrained(run / "checkpoints/step_2")
    for size, way in ((1, "ddp"), (4, "ddp" if parallel == "fsdp2" else "fsdp2")):
        copy = tmp_path / f"then-{size}" / "run"
        shutil.copytree(run, copy)
        train(size, copy, f"training.parallel={way}", resume="auto")
        for name in ("drift.jsonl", "rollouts.jsonl"):
            assert records(copy, name) == records(alone, name)
        for one, many in zip(records(alone), records(copy), strict=True):
            numbers = {k: v for k, v in one.items() if isinstance(v, float | int) and k != "steps"}
            assert {k: many[k] for k in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-5), one["step"]
        weights = [load_file(folder / "checkpoints/step_4/model.safetensors") for folder in (alone, copy)]
        assert weights[0].keys() == weights[1].keys()
        for name, value in weights[0].items():
            # Adam makes a whole step of a gradient that is zero but for rounding, so a few entries may differ.
            assert ((weights[1][name] - value).abs() > 1e-5).double().mean() < 1e-3, name


@given(costs=st.lists(st.floats(0.1, 100), max_size=40), size=st.integers(1, 6))
def test_shares_are_a_partition_and_even(costs, size):
    shares = [World(rank, size).partition(costs) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(len(costs)))
    loads = [sum(costs[item] for item in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0) + 1e-6
    assert shares[0] == list(range(len(costs))) or size > 1

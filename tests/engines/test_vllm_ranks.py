"""Several processes with the real vLLM, on the CPU: `make test-engines`. Runs of two gloo ranks against runs of one.

Rollouts are those of one process, with the same stops, so drift.jsonl is compared field by field; losses, gradients
and weights to 1e-5. A served rollout is not the engine's in the process, so served runs are compared with served runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-engines installs it")

from safetensors.torch import load_file

from tests.vllm_server import student_arguments

from .test_vllm import vllm_server

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart.toml"
BIN = Path(sys.executable).parent
# Some rollouts end by themselves, effective lengths differ, the window moves, and the weights move far.
SMALL = [
    "training.steps=3",
    "training.learning_rate=1e-3",
    "rollout.use_vllm=true",
    "rollout.slots=8",
    "rollout.prompts_per_step=4",
    "pruning.w_drop=0.2",
    "pruning.dynamic_response_length.init_len=120",
    "evaluation.num_problems=4",
    "evaluation.max_tokens=40",
    "evaluation.every=3",
]
IN_FLIGHT = ["pruning.in_flight.enable=true", "pruning.in_flight.chunk=4", "model.lora.r=2"]


def train(folder: Path, size: int, *settings: str) -> Path:
    run = folder / "run"
    command = [str(BIN / "prune-opd"), "train", str(RECIPE), "--output-dir", str(run)]
    command += [word for setting in [*SMALL, *settings] for word in ("--set", setting)]
    if size > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command = [*launch, "--no-python", *command]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr, "engines are shut down before the ranks part"
    return run


def rows(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def same_run(one: Path, many: Path) -> None:
    for alone, together in zip(rows(one, "drift.jsonl"), rows(many, "drift.jsonl"), strict=True):
        names = ("length", "finished", "stopped", "effective_length", "onset", "shared", "weight_by_position")
        assert {n: together[n] for n in names} == {n: alone[n] for n in names}
    exact = ("prune_opd/next_max_response_length", "tokens/trained")
    for alone, together in zip(rows(one, "metrics.jsonl"), rows(many, "metrics.jsonl"), strict=True):
        for name in exact if "loss" in alone else ():
            assert together[name] == alone[name]
        for name in ("loss", "grad_norm") if "loss" in alone else ():
            assert together[name] == pytest.approx(alone[name], rel=1e-5)
    name = "adapter_model.safetensors" if (one / "checkpoints/step_3/adapter_model.safetensors").exists() else None
    weights = [load_file(run / "checkpoints/step_3" / (name or "model.safetensors")) for run in (one, many)]
    for key, value in weights[0].items():
        # Adam makes a whole step of a gradient that is zero but for rounding, so a few entries may differ.
        assert ((weights[1][key] - value).abs() > 1e-5).double().mean() < 2e-3, key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process by their settings, each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*settings: str) -> Path:
        if settings not in made:
            made[settings] = train(tmp_path_factory.mktemp("alone"), 1, *settings)
        return made[settings]

    return run


@pytest.mark.parametrize(
    ("parallel", "settings"),
    [("ddp", []), ("fsdp2", []), ("fsdp2", IN_FLIGHT)],
    ids=["ddp", "fsdp2", "fsdp2-in-flight"],
)
def test_an_engine_in_each_rank_samples_what_one_engine_samples(tmp_path, alone, parallel, settings):
    one = alone(*settings)
    lengths = {length for row in rows(one, "drift.jsonl") for length in row["effective_length"]}
    assert len(lengths) > 5, "the case does not test what it says"
    if settings:
        assert any(any(row["stopped"]) for row in rows(one, "drift.jsonl"))
    same_run(one, train(tmp_path, 2, f"training.parallel={parallel}", *settings))


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    with ExitStack() as servers:
        folder = tmp_path_factory.mktemp("servers")
        yield [servers.enter_context(vllm_server(folder / f"{i}.log", *student_arguments())) for i in range(2)]


@pytest.mark.parametrize(("parallel", "count"), [("ddp", 1), ("fsdp2", 2)])
def test_ranks_share_servers(tmp_path, alone, urls, parallel, count):
    """Each replica is handed the weights once a call, and they are those of the trainer (parity is checked there)."""
    served = ["rollout.vllm_server.model=student"]
    one = alone(*served, f"rollout.vllm_server_url={json.dumps(urls[:1])}")
    url = f"rollout.vllm_server_url={json.dumps(urls[:count])}"
    same_run(one, train(tmp_path, 2, f"training.parallel={parallel}", *served, url))

"""`make gpu-check` at a tiny shape on the CPU: the same code, so that it runs on the day that there is a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(check, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    check.make_models(folder, check.TINY, "cpu")
    return folder


SIZES = {"prompts": 2, "length": 32, "device": "cpu"}


def test_a_step_by_parts_with_stops_and_without(check, models):
    """In flight every rollout ends halfway, where half as many events as there are tokens have been seen."""
    off, on = (check.one_arm(name, models, SIZES) for name in ("in flight off", "in flight on"))
    assert (off["tokens"], off["stopped"]) == (2 * 4 * 32, 0.0)
    assert on["stopped"] == 1.0 and 2 * 4 * 16 <= on["tokens"] < 2 * 4 * 32
    for arm in (off, on):
        assert set(check.PHASES) <= arm["parts"].keys()
        assert all(part["peak_bytes"] > 0 for part in arm["parts"].values())
        assert arm["planned_bytes"] > 0 and json.loads(json.dumps(arm)) == arm
    assert len(check.table_of({"off": off, "on": on, "TRL": {"left_out": "no time was left"}}).rows) == 3


@pytest.mark.slow
def test_trls_trainer_takes_the_same_step(check, models):
    pytest.importorskip("trl", reason="make setup-trl installs it")
    arm = check.one_arm("TRL", models, SIZES)
    assert arm["tokens"] == 2 * 4 * 32 and arm["parts"]["total"]["seconds"] > 0


@pytest.mark.slow
def test_it_writes_what_it_found(tmp_path):
    """A process for each arm."""
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--arms", "dense mask", "--output", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["device"] == "cpu" and record["arms"]["dense mask"]["attention"] == "sdpa"


@pytest.mark.slow
def test_an_arm_that_fails_or_has_no_time_left_says_so(check, tmp_path):
    found = check.in_a_process("dense mask", tmp_path, True, 100.0)  # there are no models in this folder
    assert "student" in found["failed"]
    assert check.in_a_process("dense mask", tmp_path, True, 0.0) == {"left_out": "no time was left"}

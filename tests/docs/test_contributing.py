"""The example of CONTRIBUTING.md, a drift metric, applied to a copy of the package: its test passes and it trains."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
(PATCH,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)


def run(copy: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_drift_metric_is_one_case_one_name_and_one_test():
    changed = re.findall(r"^diff --git a/(\S+)", PATCH, re.MULTILINE)
    assert changed == ["src/prune_opd/core/choices.py", "src/prune_opd/core/overlap.py", "tests/core/test_overlap.py"]
    added = [line for line in PATCH.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len(added) < 20


@pytest.mark.slow
def test_the_metric_of_the_example_is_tested_and_trains(tmp_path):
    for name in ("src", "tests", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(["git", "apply", "-"], input=PATCH, text=True, cwd=tmp_path, check=True)
    passed = run(tmp_path, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/core/test_overlap.py")
    assert "test_teacher_mass" in PATCH and re.search(r"\b\d+ passed", passed)
    settings = ["pruning.metric=teacher_mass", "training.steps=1", "rollout.prompts_per_step=2", "evaluation.data="]
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    program = "from prune_opd.cli import app; app()"
    run(tmp_path, sys.executable, "-c", program, "train", "recipes/quickstart.toml", *arguments, "--output-dir", "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["pruning"]["metric"] == "teacher_mass"
    (record,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert 0.5 < json.loads(record)["prune_opd/loss_weight_mean"] < 1.5, "some positions are events and some are not"

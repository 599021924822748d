"""The commands of docs/evidence.md run one after the other, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prune_opd.cli import app
from prune_opd.experiments.arms import SETTINGS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evidence.md").read_text()
SMALL = "--set rollout.prompts_per_step=2 --set evaluation.num_problems=2 --set evaluation.k=1"
SHORT = {"compare": f"--set training.steps=1 --seeds 1 {SMALL}", "doctor": f"--prompts 2 {SMALL}"}
SHORT["probe"] = "--problems 4 --lengths 2 --continuations 1"


@pytest.mark.slow
def test_commands_run_in_their_order(tmp_path, monkeypatch):
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for line in block.splitlines():
        _, name, *arguments = shlex.split(line)
        done = CliRunner().invoke(app, [name, *arguments, *shlex.split(SHORT.get(name, ""))], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "runs/evidence/compare.json").read_text())["arms"]) == 7
    assert {path.name for path in tmp_path.glob("runs/*/report.html")} == {"report.html"}


def test_every_arm_is_explained():
    assert set(re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)) == {*SETTINGS, "fixed:N"}

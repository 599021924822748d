"""A run of two ranks of which a part dies is resumed to the bits: see kill_ranks.py, and `make kill-ranks`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def strike(*arguments: str) -> list[dict]:
    """The rows of kill_ranks.py."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.kill_ranks", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_disk_of_one_rank_is_full_then_the_launcher_is_killed_and_the_run_is_the_same():
    """Both ranks name the disk and the checkpoint before it stays; no rank outlives its launcher."""
    (row,) = strike("--victims", "disk", "launcher", "--in-a-row", "--moments=1", "--settings=training.parallel=fsdp2")
    assert row["difference"] is None and not row["struck"][1]["late"]
    full, orphaned = row["struck"]
    assert full["exit"] == 1 and full["errors"] == {"StorageError": 2} and full["checkpoints"] == ["step_1"]
    assert orphaned["exit"] == -9 and orphaned["orphans"] < 30

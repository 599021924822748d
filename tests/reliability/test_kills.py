"""A run that is killed at any moment and resumed is the run that was not. See kills.py; `make kill` does more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .kills import IN_FLIGHT, difference

PROGRAM = Path(__file__).parent / "kills.py"


def kill(moments: int, settings: list[str], seed: int = 0) -> list[dict]:
    command = [sys.executable, str(PROGRAM), f"--moments={moments}", f"--seed={seed}", "--settings", *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # vLLM logs there too
    assert len(rows) == moments
    return rows


def check(rows: list[dict]) -> None:
    assert [row["difference"] for row in rows] == [None] * len(rows)
    for row in rows:
        assert row["said_so"] or not row["half_written"], f"half a checkpoint was passed over in silence: {row}"


def test_killed_while_writing_checkpoints_and_resumed():
    rows = kill(3, IN_FLIGHT)
    check(rows)
    assert sum(row["signals"][0] != 0 for row in rows) == 3


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], IN_FLIGHT], ids=["window", "in-flight"])
def test_killed_at_ten_moments_and_resumed(settings):
    rows = kill(10, settings, seed=1)
    check(rows)
    assert sum(row["signals"][0] != 0 for row in rows) >= 8  # a kill by the clock can come too late
    assert sum(row["phases"][0] == "checkpoint" for row in rows) >= 4


def test_the_comparison_sees_one_bit_and_one_record():
    import torch

    a = {"weights": {"x": torch.tensor([1.0, 2.0])}, "log": [{"loss": 0.1}]}
    b = {"weights": {"x": torch.tensor([1.0, 2.0000002])}, "log": [{"loss": 0.1}]}
    assert difference(a, a) is None
    assert difference(a, b) == "/weights/x"
    assert difference(a, a | {"log": []}) == "/log: 1 and 0 entries"
    assert difference(a, a | {"log": [{"loss": 0.2}]}) == "/log[0]/loss: 0.1 and 0.2"

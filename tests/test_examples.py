"""The scripts of examples/, as a reader would start them, with few and short steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_trl_distillation_trains_with_a_window(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: make setup-trl")
    small = ["--steps", "2", "--batch", "2", "--window", "8", "--length", "16"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "trl_distillation.py", *small],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step (\d): overlap (0\.\d+), window (\d+)$", done.stdout, re.MULTILINE)
    assert [line[0] for line in lines] == ["1", "2"]
    assert all(0.3 < float(overlap) < 1 and 8 <= int(window) <= 16 for _, overlap, window in lines)
    assert (tmp_path / "runs/trl/model.safetensors").is_file()


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {name for name in names if f'"{name}.py"' in Path(__file__).read_text()} == names

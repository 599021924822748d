"""docs/architecture.md against the code: the picture, the files that it names, and the page that the step has to be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "prune_opd"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_the_picture_is_drawn_from_the_imports_as_they_are():
    done = subprocess.run(
        [sys.executable, "scripts/make_architecture.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_file_that_the_page_names_is_there():
    folder = "rollout"  # of names without one: `vllm.py` or `served.py` beside `rollout/local.py`
    for name in re.findall(r"`([\w/.]+\.(?:py|md|toml|txt))`", PAGE):
        places = [PACKAGE / name, ROOT / name, PACKAGE / folder / name, PACKAGE / "training" / name]
        assert any(place.exists() for place in places), name
        folder = name.rpartition("/")[0] or folder


def test_the_step_is_one_page():
    text = (PACKAGE / "step.py").read_text(encoding="utf-8")
    (step,) = [n for n in ast.parse(text).body if getattr(n, "name", "") == "prune_opd_step"]
    assert len(text.splitlines()) <= 200
    assert step.end_lineno - step.lineno + 1 <= 75


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_and_no_function_is_too_long(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, node.name

"""Imports of our packages only point down: a module imports from its own floor or from one below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import prune_opd

PACKAGE = Path(prune_opd.__file__).parent
FLOORS = [  # from the top
    {"cli", "integrations"},
    {"experiments"},
    {"preflight", "training", "reporting", "step", "update", "data"},
    {"rewards", "evaluation", "rollout", "teachers", "models"},
    {"serving", "distributed", "timing", "types", "config", "core", "errors"},
]
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}
KNOWN = {("distributed", "models")}  # sharding.py asks models where the output head of a model is


def imported(tree: ast.AST):
    """The parts of the package that a module imports, inside functions and for annotations too."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "prune_opd":
            names = [f"prune_opd.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            names = [node.module or ""]
        yield from (name.split(".")[1] for name in names if name.startswith("prune_opd."))


def up(part: str, tree: ast.AST) -> set[tuple[str, str]]:
    return {(part, other) for other in imported(tree) if FLOOR[other] < FLOOR[part]}


@pytest.mark.parametrize("part", sorted(FLOOR))
def test_imports_point_down(part):
    path = PACKAGE / part
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files and all(file.is_file() for file in files)
    assert set().union(*(up(part, ast.parse(file.read_text())) for file in files)) <= KNOWN


def test_every_part_has_a_floor():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert parts - {"__init__"} == set(FLOOR)


def test_the_check_sees_an_import_that_points_up():
    code = "def f():\n    from prune_opd.experiments.results import difference\nfrom prune_opd import core, step"
    assert up("reporting", ast.parse(code)) == {("reporting", "experiments")}
    assert up("rollout", ast.parse("import prune_opd.step")) == {("rollout", "step")}

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prune_opd

PACKAGE = Path(prune_opd.__file__).parent
CORE_FILES = sorted((PACKAGE / "core").glob("*.py"))
CORE_MAY_IMPORT = {"torch", "__future__", "dataclasses", "typing", "math", "prune_opd.core"}

PUBLIC = [
    "Config",
    "DriftMonitor",
    "DriftReport",
    "Trainer",
    "TrainingWindow",
    "drift_report",
    "load_config",
    "nucleus_accept",
    "overlap_mass",
    "topk_overlap",
    "topk_reverse_kl",
]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def runtime_imports(node: ast.AST):
    """Absolute names of what a file of the core imports when it runs, inside functions too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = {0: [], 1: ["prune_opd", "core"]}.get(node.level, ["prune_opd"])
        yield ".".join([*package, *filter(None, [node.module])])
    type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in node.orelse if type_checking else ast.iter_child_nodes(node):
        yield from runtime_imports(child)


def is_allowed_in_core(module: str) -> bool:
    return any(module == allowed or module.startswith(f"{allowed}.") for allowed in CORE_MAY_IMPORT)


def test_the_configuration_needs_no_torch():
    assert python("import sys, prune_opd.config; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda p: p.stem)
def test_core_imports_torch_and_nothing_else(path):
    beside = {"liger": ["liger_kernel.ops.fused_linear_cross_entropy"]}  # imported where it is called
    foreign = [m for m in runtime_imports(ast.parse(path.read_text())) if not is_allowed_in_core(m)]
    assert foreign == beside.get(path.stem, [])


def test_the_import_check_sees_what_it_should():
    code = """
import numpy.linalg
from ..config import Config
def f():
    from prune_opd.types import Rollouts
if TYPE_CHECKING:
    import jaxtyping
else:
    import os
from .drift import drift_report
import torch.nn
"""
    seen = list(runtime_imports(ast.parse(code)))
    wrong = ["numpy.linalg", "prune_opd.config", "prune_opd.types", "os"]
    assert seen == [*wrong, "prune_opd.core.drift", "torch.nn"]
    assert [m for m in seen if not is_allowed_in_core(m)] == wrong


def test_core_loads_no_other_part_of_the_package():
    modules = ", ".join(f"prune_opd.core.{p.stem}" for p in CORE_FILES if p.stem != "__init__")
    out = python(f"import sys, {modules}; print(*[m for m in sys.modules if m.startswith('prune_opd')])")
    assert {m for m in out.split() if not m.startswith("prune_opd.core")} == {"prune_opd"}


def test_the_public_surface_is_frozen():
    """A change here is a change of the contract: it belongs in the changelog."""
    assert sorted(prune_opd.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_importable(name):
    assert getattr(prune_opd, name).__name__ == name

"""What the plug-in takes from verl is where it was. With a new verl, this says by name what has moved."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import prune_opd.integrations

HOME = Path(prune_opd.integrations.__file__).parent / "verl"
# Methods of our own in classes that extend verl's: nothing of verl calls them.
OURS = {"_run_in_flight", "_score", "_student_topk", "_end_ids", "failures", "_expected_rollouts", "_failed"}


def taken() -> list[tuple[str, str]]:
    """(module, name) of every import in surface.py."""
    tree = ast.parse((HOME / "surface.py").read_text(encoding="utf-8"))
    return [
        (str(node.module), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def test_surface_is_the_only_place_that_imports_verl():
    for path in HOME.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            foreign = [name for name in names if name.partition(".")[0] == "verl"]
            assert not foreign or path.name == "surface.py", f"{path.name} imports {foreign}"
    assert len(taken()) == len(set(taken())) > 20


@pytest.mark.parametrize(("module", "name"), taken())
def test_verl_still_has(module, name):
    pytest.importorskip("verl", reason="verl is not installed here: make test-engines")
    found = importlib.import_module(module)
    assert hasattr(found, name) or name in {each.name for each in pkgutil.iter_modules(getattr(found, "__path__", []))}


def overrides() -> list[tuple[type, type, str]]:
    """(our class, verl's, method) for every method that ours defines and verl is to call."""
    import prune_opd.integrations.verl as plugin

    found = []
    for ours in vars(plugin).values():
        if not inspect.isclass(ours) or not ours.__mro__[1].__module__.startswith("verl."):
            continue
        for name, value in vars(ours).items():
            if inspect.isfunction(value) and name != "__init__" and name not in OURS:
                found.append((ours, ours.__mro__[1], name))
    return found


def test_what_we_override_is_still_called_that_and_with_the_same_arguments():
    pytest.importorskip("verl", reason="verl is not installed here: make test-engines")
    assert len(overrides()) > 10
    for ours, theirs, name in overrides():
        assert hasattr(theirs, name), f"{theirs.__name__}.{name} is gone, which {ours.__name__} overrides"
        mine, verls = (inspect.signature(getattr(cls, name)).parameters.values() for cls in (ours, theirs))
        kinds = {parameter.kind for parameter in mine}
        assert inspect.Parameter.VAR_KEYWORD in kinds or {p.name for p in verls} <= {p.name for p in mine}, (
            f"{theirs.__name__}.{name} takes {[str(p) for p in verls]}, {ours.__name__}'s {[str(p) for p in mine]}"
        )
        named = [p.name for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert named == [p.name for p in verls][: len(named)], f"{theirs.__name__}.{name}: other arguments in front"

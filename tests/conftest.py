"""Determinism for every test, and the shape annotations of `prune_opd.core` checked while the tests run.

The core imports torch alone at run time: its jaxtyping names stand under `if TYPE_CHECKING`. So the checks go
on from here, before any other module of the package can take hold of an unchecked function.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import random
import shutil
import sys
import typing
from types import FunctionType, ModuleType
from typing import Any

import beartype
import hypothesis
import numpy as np
import pytest
import torch
from jaxtyping import jaxtyped

import prune_opd.core

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Liger's kernels, if they are installed, one element after the other

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("repeatable")

# An int is accepted where a float is asked for, as Python does.
_typechecker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def _annotation_names(module: ModuleType) -> dict[str, Any]:
    """What the module's annotations may refer to: its globals and its `if TYPE_CHECKING` imports."""
    names = dict(vars(module))
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            exec(compile(ast.Module(node.body, type_ignores=[]), str(module.__file__), "exec"), names)
    return names


def _checked(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    function.__annotations__ = typing.get_type_hints(function, globalns=names)
    return jaxtyped(function, typechecker=_typechecker)


def _check_module(module: ModuleType) -> dict[Any, Any]:
    """Check its public functions and the methods of its classes; returns {unchecked function: checked}."""
    names = _annotation_names(module)
    replaced = {}
    for name, value in list(vars(module).items()):
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, FunctionType):
            replaced[value] = _checked(value, names)
        elif inspect.isclass(value):
            for method_name, method in list(vars(value).items()):
                public = method_name == "__init__" or not method_name.startswith("_")
                if isinstance(method, FunctionType) and public:
                    setattr(value, method_name, _checked(method, names))
    return replaced


def _check_core_shapes() -> None:
    replaced: dict[Any, Any] = {}
    for found in pkgutil.iter_modules(prune_opd.core.__path__, "prune_opd.core."):
        replaced |= _check_module(importlib.import_module(found.name))
    # Names that modules of the package imported from one another must be the checked functions too.
    for module_name, module in list(sys.modules.items()):
        if module_name == "prune_opd" or module_name.startswith("prune_opd."):
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in replaced:
                    setattr(module, name, replaced[value])


_check_core_shapes()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, whose console can be read."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium and chromedriver on this machine: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    flags = ["--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1200,900"]
    for flag in flags + ["--no-sandbox"] * (os.geteuid() == 0):
        options.add_argument(flag)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()

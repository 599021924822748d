"""CI runs what the README says, on the versions that were tested, with the checks that were promised."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}


def commands(text: str) -> list[str]:
    """The lines of a shell text that are commands, without indentation and trailing comments."""
    lines = (line.split("  #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_ci_runs_the_test_command_of_the_readme():
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert any("make test" in commands(block) for block in blocks)
    assert "make test" in commands((ROOT / ".ci/run").read_text())
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("requirement", [Requirement(r) for r in REQUIREMENTS], ids=str)
def test_each_dependency_is_pinned_within_its_range(requirement):
    pin = PINS[canonicalize_name(requirement.name)]
    (exact,) = pin.specifier
    assert exact.operator == "=="
    assert Version(exact.version) in requirement.specifier


def test_pins_name_no_local_build():
    """A pin of 2.13.0+cpu would refuse every machine with a GPU."""
    assert not [str(pin) for pin in PINS.values() if "+" in str(pin.specifier)]


def entries(*names: str) -> dict[str, str]:
    """The public version of each package in lock files, each with the hashes of its files."""
    locked = {}
    for name in names:
        for entry in re.split(r"\n(?=\S)", (ROOT / name).read_text().strip()):
            if not entry.startswith("#"):
                line, *hashes = entry.split(" \\\n")
                assert hashes and all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", text) for text in hashes), line
                pin = Requirement(line)
                locked[canonicalize_name(pin.name)] = Version(str(pin.specifier).removeprefix("==")).public
    return locked


def test_the_lock_of_the_image_has_the_pins_but_for_those_that_vllm_excludes():
    locked = entries("vllm.lock")
    pins = {name: str(pin.specifier).removeprefix("==") for name, pin in PINS.items()}
    excluded = {"fastapi", "numpy", "setuptools"}  # NOT_WITH_VLLM of scripts/make_lock.py
    assert {name for name in pins.keys() & locked.keys() if pins[name] != locked[name]} <= excluded
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(r) for r in PROJECT["dependencies"] + extras["vllm"] + extras["liger"]]
    assert all(Version(locked[canonicalize_name(r.name)]) in r.specifier for r in wanted)


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_the_lock_has_the_pins_and_a_hash_for_each(torch):
    locked = entries("requirements.lock", f"torch-{torch}.lock")
    pins = {name: str(pin.specifier).removeprefix("==") for name, pin in PINS.items()}
    assert not {name for name in pins.keys() & locked.keys() if pins[name] != locked[name]}
    apart = {"vllm", "verl", "transferqueue", "cachetools", "fastapi"}  # in environments of their own
    apart |= {"triton"} if torch == "cpu" else set()  # for a GPU
    assert pins.keys() - locked.keys() == apart


def test_ruff_finds_undefined_names_and_loose_zips():
    """Shape strings of jaxtyping must pass without F821 being switched off for their sake."""
    bad = "for pair in zip([1], [2]):\n    print(pair, nowhere)\n"
    shapes = 'from jaxtyping import Int\n\n\ndef f(x: Int[list, "B T"]): ...\n'
    assert {"B905", "F821"} <= ruff(bad)
    assert not ruff(shapes)


def ruff(source: str) -> set[str]:
    """Codes that ruff reports for `source` as a file of the package."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
    command += ["--stdin-filename=src/prune_opd/snippet.py", "-"]
    done = subprocess.run(command, input=source, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return set(re.findall(r": ([A-Z]+\d+) ", done.stdout))


def test_every_test_that_the_reliability_page_names_is_there():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 18
    for path, name in named:
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), (path, name)

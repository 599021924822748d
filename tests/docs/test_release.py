"""What `make release` says of its products, and that SECURITY.md names files that are there."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("make_release", ROOT / "scripts/make_release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_statement_has_the_digests_of_what_went_in_and_came_out(release, tmp_path, monkeypatch):
    monkeypatch.setattr(release, "version", lambda tool: f"of {tool}")  # they are installed by the target alone
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"one")
    said = release.provenance([wheel], commit="c0ffee", began="2026-01-01T00:00:00Z", ended="2026-01-01T00:01:00Z")
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["predicateType"] == "https://slsa.dev/provenance/v1"
    assert said["subject"] == [{"name": "a.whl", "digest": {"sha256": hashlib.sha256(b"one").hexdigest()}}]
    source, *locks = said["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert source["digest"] == {"gitCommit": "c0ffee"}
    for lock in locks:
        assert lock["digest"]["sha256"] == hashlib.sha256((ROOT / lock["uri"]).read_bytes()).hexdigest()


def test_the_policy_names_what_is_there():
    page = (ROOT / "SECURITY.md").read_text()
    paths = re.findall(r"`((?:tests|docs|src)/[\w/.]+)`", page)
    assert paths and all((ROOT / path).exists() for path in paths)
    targets = re.findall(r"`make (\w[\w-]*)`", page)
    made = (ROOT / "Makefile").read_text()
    assert targets and all(f"\n{target}:" in made for target in targets)

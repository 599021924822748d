"""vLLM's pairs of tests/invariant/test_matrix.py, with real engines: `make test-engines`."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-engines installs it")

from tests.invariant.matrix import cases, names
from tests.invariant.test_matrix import check, run_all

CASES = [case for case in cases() if "vllm" in names(case)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_all(CASES, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("case", CASES)
def test_pairs_with_vllm_give_the_numbers_of_the_plain_path(case, runs):
    check(case, runs)

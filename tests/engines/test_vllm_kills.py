"""A run that samples with vLLM, killed and resumed: tests/reliability/kills.py with that sampler."""

from __future__ import annotations

import pytest

from tests.reliability.kills import IN_FLIGHT
from tests.reliability.test_kills import check, kill

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-engines installs it")


@pytest.mark.slow
def test_killed_at_three_moments_and_resumed():
    rows = kill(3, ["rollout.use_vllm=true", *IN_FLIGHT])
    check(rows)
    assert sum(row["signals"][0] != 0 for row in rows) == 3
